"""Robotiq's gripper behind a URCap of ours: its fingers move on nobody's word but a person's, and its faults last."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from robot_client.arms import robotiq
from robot_client.arms.robotiq import RobotiqGripper
from robot_client.errors import ArmError
from tests.client.ur_simulator import PERIOD_S, Gripper

NOT_ACTIVE = "the gripper is not activated; clearing this moves its fingers"


class URCap(socketserver.ThreadingTCPServer):
    """Its socket, until close(); every question is also a period of the gripper's own time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Line)
        self.gripper, self.asked, self.deaf = Gripper(), [], False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Line(socketserver.StreamRequestHandler):
        server: URCap

        def handle(self) -> None:
            for line in self.rfile:
                if self.server.deaf:
                    return
                self.server.asked.append(line.decode().strip())
                for _ in range(round(0.02 / PERIOD_S)):
                    self.server.gripper.step()
                self.wfile.write(self.server.gripper.answer(line.decode()).encode())

    def close(self) -> None:
        self.deaf = True
        self.shutdown()
        self.server_close()


@pytest.fixture
def cap() -> Iterator[URCap]:
    cap = URCap()
    yield cap
    cap.close()


@pytest.fixture
def connect(cap) -> Iterator[Callable[[], RobotiqGripper]]:
    made: list[RobotiqGripper] = []

    def connected() -> RobotiqGripper:
        made.append(RobotiqGripper("127.0.0.1", port=cap.server_address[1]))
        return made[-1]

    yield connected
    for gripper in made:
        gripper.close()


def wait_until(there: Callable[[], object], patience_s: float = 6.0) -> None:
    until_s = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.01)


def test_to_connect_moves_no_finger(cap, connect):
    assert connect().fault == NOT_ACTIVE
    cap.gripper.values["FLT"] = 0x0E
    assert connect().fault == "gripper fault 0x0E: overcurrent"
    assert not [line for line in cap.asked if line.startswith("SET")]


def test_a_person_activates_it_and_it_then_moves(cap, connect):
    gripper = connect()
    gripper.recover()
    assert gripper.fault == "" and gripper.opening == 1
    gripper.move(0.0)
    wait_until(lambda: gripper.opening == 0)


def test_one_that_is_active_already_needs_no_person(cap, connect):
    connect().recover()
    assert connect().fault == ""


def test_one_that_loses_its_activation_says_so(cap, connect):
    gripper = connect()
    gripper.recover()
    cap.gripper.values |= {"ACT": 0, "STA": 0}
    wait_until(lambda: gripper.fault == NOT_ACTIVE)


def test_a_gripper_that_is_gone_stays_a_fault_however_often_a_person_tries(cap, connect):
    gripper = connect()
    gripper.recover()
    cap.close()
    wait_until(lambda: "lost the gripper" in gripper.fault)
    for _ in range(3):
        with pytest.raises(ArmError, match=r"no gripper at work at 127\.0\.0\.1:.*refused"):
            gripper.recover()
        assert "refused" in gripper.fault


def test_a_gripper_that_does_not_become_active_stays_a_fault(cap, connect, monkeypatch):
    monkeypatch.setattr(robotiq, "ACTIVATION_S", 0.1)
    monkeypatch.setattr(cap.gripper, "step", lambda: None)
    gripper = connect()
    for _ in range(2):
        with pytest.raises(ArmError, match=r"it is not active 0\.1 s after it was told to be"):
            gripper.recover()
        assert "it is not active" in gripper.fault
