"""The SpaceMouse by its reports, at the boundary of hidapi.

No real one was seen: the reports marked so were recorded by others from a SpaceNavigator and a SpaceMouse Compact and
are public; the rest follow the layout that these show.
"""

from __future__ import annotations

import queue
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from robot_client.errors import PilotError
from robot_client.pilot import LINGER_S, Together
from robot_client.pilots import spacemouse
from robot_client.pilots.spacemouse import DEAD_ZONE, FULL_COUNTS, SILENCE_S, SpaceMouse
from tests.client.camera_laws import eventually
from tests.client.conftest import HandClock
from tests.client.fake_arm import spec_of

MOUSE = {"vendor_id": 0x046D, "product_id": 0xC077, "usage": 2, "path": b"/dev/hidraw0"}
RECEIVER = {"vendor_id": 0x256F, "product_id": 0xC652, "usage": 2, "path": b"/dev/hidraw1"}
COMPACT = {"vendor_id": 0x256F, "product_id": 0xC635, "usage": 8, "path": b"/dev/hidraw3"}
X, Y, Z, ROLL, PITCH, YAW = np.eye(6)

RIGHT_BUTTON, LEFT_BUTTON, BOTH, NEITHER = (bytes([3, bits, 0]) for bits in (2, 1, 3, 0))
"""Recorded."""
PUSHED_DOWN = [bytes.fromhex("02 1d0000001b00"), bytes.fromhex("01 0d0000002501")]
"""Recorded: 293 downwards, and next to nothing else."""


def moved(*counts: int) -> bytes:
    return b"\x01" + struct.pack("<3h", *counts)


def turned(*counts: int) -> bytes:
    return b"\x02" + struct.pack("<3h", *counts)


class FakeHid:
    """hidapi with what is plugged in; its device plays reports."""

    def __init__(self):
        self.plugged_in = [MOUSE, RECEIVER, COMPACT]
        self.opened: list[bytes] = []
        self.closed = 0
        self.allowed = True
        self.pulled_out = False
        self.reports: queue.Queue[bytes] = queue.Queue()

    def enumerate(self):
        return self.plugged_in

    def device(self):
        return self

    def open_path(self, path: bytes):
        if not self.allowed:
            raise OSError("open failed")
        self.opened.append(path)

    def read(self, max_length: int, timeout_ms: int) -> list[int]:
        if self.pulled_out:
            raise OSError("read error")
        try:
            return list(self.reports.get(timeout=timeout_ms / 1000))[:max_length]
        except queue.Empty:
            return []

    def close(self):
        self.closed += 1


@pytest.fixture
def clock(monkeypatch) -> HandClock:
    clock = HandClock()
    monkeypatch.setattr(spacemouse, "time", clock)
    return clock


@pytest.fixture
def hid(monkeypatch) -> FakeHid:
    hid = FakeHid()
    monkeypatch.setitem(sys.modules, "hidraw", SimpleNamespace(enumerate=hid.enumerate, device=hid.device))
    return hid


@pytest.fixture
def mouse(hid, clock):
    mouse = SpaceMouse()
    yield mouse
    mouse.close()


def after(mouse: SpaceMouse, hid: FakeHid, *reports: bytes):
    """Its gesture once these have been read."""
    for report in (*reports, b"\x17\x64"):  # of the battery, behind which all others have been taken
        hid.reports.put(report)
    eventually(hid.reports.empty)
    return mouse.gesture()


@pytest.mark.parametrize(
    ("report", "drive_6"),
    [
        (moved(350, 0, 0), -Y),
        (moved(0, 350, 0), -X),
        (moved(0, 0, 350), -Z),
        (moved(0, -350, 0), X),
        (turned(350, 0, 0), -PITCH),
        (turned(0, 350, 0), -ROLL),
        (turned(0, 0, 350), -YAW),
        (moved(-350, -350, -350), X + Y + Z),
        (moved(500, 0, 0), -Y),
    ],
)
def test_the_cap_drives_the_way_it_is_pushed(mouse, hid, report, drive_6):
    np.testing.assert_allclose(after(mouse, hid, report).drive_6, drive_6)


def test_a_recorded_push_drives_down_and_no_other_way(mouse, hid):
    down = (293 / FULL_COUNTS - DEAD_ZONE) / (1 - DEAD_ZONE)
    np.testing.assert_allclose(after(mouse, hid, *PUSHED_DOWN).drive_6, -down * Z)


def test_moves_and_turns_come_in_two_reports_or_in_one(mouse, hid):
    both = after(mouse, hid, moved(0, -350, 0), turned(0, 0, -350)).drive_6
    np.testing.assert_allclose(both, X + YAW)
    one = after(mouse, hid, b"\x01" + struct.pack("<6h", 350, 0, 0, 350, 0, 0)).drive_6
    np.testing.assert_allclose(one, -Y - PITCH)


def test_a_touch_within_the_dead_zone_leaves_the_arm_to_the_policy(mouse, hid):
    edge = int(DEAD_ZONE * FULL_COUNTS)
    assert after(mouse, hid, moved(edge, -edge, edge), turned(0, -30, 0)).drive_6 is None


def test_let_go_it_stands_still_and_then_leaves_the_arm_to_the_policy(mouse, hid, clock):
    assert after(mouse, hid, moved(350, 0, 0)).drive_6 is not None
    assert not after(mouse, hid, moved(0, 0, 0), turned(0, 0, 0)).drive_6.any()
    clock.now_s += LINGER_S + 0.01
    assert mouse.gesture().drive_6 is None


def test_a_cap_that_is_not_heard_of_is_let_go(mouse, hid, clock):
    assert after(mouse, hid, moved(350, 0, 0)).drive_6.any()
    clock.now_s += SILENCE_S + 0.01
    assert not mouse.gesture().drive_6.any()


def test_button_1_grips_once_a_press(mouse, hid):
    gesture = after(mouse, hid, LEFT_BUTTON)
    assert gesture.grips and not gesture.drive_6.any() and not gesture.stops
    assert not after(mouse, hid, LEFT_BUTTON).grips
    assert after(mouse, hid, NEITHER, LEFT_BUTTON, NEITHER).grips


def test_button_2_stops_however_short_it_was_pressed(mouse, hid):
    gesture = after(mouse, hid, RIGHT_BUTTON, NEITHER)
    assert gesture.stops == "button 2 of the SpaceMouse was pressed" and not gesture.grips
    assert not mouse.gesture().stops
    gesture = after(mouse, hid, BOTH)
    assert gesture.stops and gesture.grips


def test_pulled_out_it_stops_the_arm(mouse, hid):
    pilot = Together(spec_of(), [mouse])
    assert not pilot.wish().stopped
    hid.pulled_out = True
    eventually(lambda: pilot.wish().stopped == "the SpaceMouse is gone: read error")


def test_the_first_of_the_known_ones_is_opened_or_the_one_that_is_named(hid):
    for device in ("", "/dev/hidraw7"):
        SpaceMouse(device).close()
    assert hid.opened == [b"/dev/hidraw3", b"/dev/hidraw7"] and hid.closed == 2


def test_without_one_it_is_refused(hid):
    hid.plugged_in = [MOUSE, RECEIVER]
    with pytest.raises(PilotError, match=r"there is no SpaceMouse, or not one of ours: .*SpaceMouse Compact"):
        SpaceMouse()


def test_one_that_may_not_be_read_is_refused_with_what_helps(hid):
    hid.allowed = False
    with pytest.raises(PilotError, match=r'/dev/hidraw3 cannot be opened: open failed; .*ATTRS\{idVendor\}=="256f"'):
        SpaceMouse()


def test_the_real_hidapi_says_the_same_of_a_device_that_is_not_there():
    pytest.importorskip("hidraw")
    with pytest.raises(PilotError, match="/dev/hidraw99 cannot be opened"):
        SpaceMouse("/dev/hidraw99")
