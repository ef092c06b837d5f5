"""The stop button through pyserial's loop://, where RTS is wired to CTS as the closed contact does it."""

from __future__ import annotations

import os
import pty
import threading

import pytest

from robot_client.errors import PilotError
from robot_client.pilot import Gesture, Together
from robot_client.pilots.serial_stop import STALE_S, SerialStop
from tests.client.camera_laws import eventually
from tests.client.fake_arm import spec_of

serial = pytest.importorskip("serial")
protocol_loop = pytest.importorskip("serial.urlhandler.protocol_loop")


class Contact(protocol_loop.Serial):
    """A loop whose wire a test can cut."""

    looks = 0
    cut = False
    welded = False
    stalled: threading.Event | None = None

    @property
    def cts(self):
        if self.stalled is not None:
            self.stalled.wait()
        closed = self.welded or (super().cts and not self.cut)
        self.looks += 1
        return closed

    def looked_at(self) -> None:
        """Returns when it has been looked at as it is now, and what was seen has been noted."""
        looks = self.looks
        eventually(lambda: self.looks >= looks + 3)


class LetsGo:
    def gesture(self) -> Gesture:
        return Gesture(lets_go=True)

    def close(self) -> None:
        pass


@pytest.fixture
def contact(monkeypatch) -> Contact:
    contact = Contact()
    contact.port = "loop://"

    def opened(url):
        contact.open()
        return contact

    monkeypatch.setattr(serial, "serial_for_url", opened)
    return contact


@pytest.fixture
def stop(contact):
    stop = SerialStop("loop://")
    yield stop
    stop.close()


def stopped(stop: SerialStop) -> str:
    return Together(spec_of(), [stop]).wish().stopped


def test_pyserials_own_loop_is_a_closed_contact():
    stop = SerialStop("loop://")
    eventually(lambda: not stopped(stop))
    assert stop.gesture() == Gesture()
    stop.close()


def test_an_open_contact_stops(stop, contact):
    eventually(lambda: not stopped(stop))
    contact.cut = True
    eventually(lambda: stopped(stop) == "the stop button at loop:// is pressed, or its wire cut")
    assert stopped(stop) and stopped(stop)
    contact.cut = False
    eventually(lambda: not stopped(stop))


def test_a_press_between_two_looks_is_not_missed(stop, contact):
    eventually(lambda: not stopped(stop))
    contact.cut = True
    contact.looked_at()
    contact.cut = False
    contact.looked_at()
    assert stop.gesture().stops
    assert not stop.gesture().stops


def test_it_starts_stopped_while_the_contact_is_open(contact):
    contact.cut = True
    stop = SerialStop("loop://")
    assert stopped(stop) == "the stop button at loop:// is pressed, or its wire cut"
    stop.close()


def test_nobody_lets_go_while_the_contact_is_open(stop, contact):
    pilot = Together(spec_of(), [stop, LetsGo()])
    contact.cut = True
    eventually(lambda: pilot.wish().stopped)
    for _ in range(5):
        contact.looked_at()
        assert pilot.wish().stopped
    contact.cut = False
    eventually(lambda: not pilot.wish().stopped)


def test_an_adapter_that_is_unplugged_stops_and_nobody_lets_go(stop, contact):
    contact.close()
    pilot = Together(spec_of(), [stop, LetsGo()])
    eventually(lambda: "is gone: Attempting to use a port that is not open" in pilot.wish().stopped)
    contact.open()
    assert pilot.wish().stopped


def test_a_contact_that_is_not_seen_for_a_while_counts_as_open(stop, contact):
    contact.stalled = threading.Event()
    eventually(lambda: "has not been seen for" in stopped(stop))
    assert stopped(stop).endswith(f"(limit {STALE_S:g} s)")
    contact.stalled.set()


def test_closed_by_us_it_is_gone_as_well(stop):
    stop.close()
    stop.close()
    with pytest.raises(PilotError, match="the stop button at loop:// is gone: closed"):
        stop.gesture()


def test_an_adapter_that_shows_cts_whatever_is_wired_is_refused(contact):
    contact.welded = True
    with pytest.raises(PilotError, match="the stop button at loop:// is none: CTS is on without RTS"):
        SerialStop("loop://")
    assert not contact.is_open


def test_a_port_without_such_lines_is_refused():
    ends = pty.openpty()
    with pytest.raises(PilotError, match=r"cannot be watched: .*Inappropriate ioctl"):
        SerialStop(os.ttyname(ends[1]))
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(("device", "why"), [("/dev/nowhere", "No such file"), ("radio://x", "protocol 'radio'")])
def test_a_port_that_is_not_there_is_refused_by_name(device, why):
    with pytest.raises(PilotError, match=f"the stop button at {device} cannot be watched: .*{why}"):
        SerialStop(device)
