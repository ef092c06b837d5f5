"""The servo's process outlives a client that stalls, and says when it is the one that does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from robot_client.errors import ArmError
from robot_client.servo import MotionLimits
from robot_client.servo_process import ServoLink
from tests.client.fake_hardware import HOME, FakeHardware

TICK_S = 0.05
X = np.array([0.002, 0, 0, 0, 0, 0])


def link_of(**settings) -> ServoLink:
    return ServoLink(FakeHardware, settings, MotionLimits(), tick_s=TICK_S)


@pytest.fixture
def link():
    link = link_of()
    yield link
    link.close()


def go(link: ServoLink, ticks: int, good_for_s: float = 2 * TICK_S) -> None:
    for _ in range(ticks):
        link.go(X, 1.0, time.monotonic() + good_for_s)
        time.sleep(TICK_S)


def test_it_leads_the_hardware_between_two_commands(link):
    go(link, 10, good_for_s=30.0)
    until_s = time.monotonic() + 20.0
    while link.status().moving and time.monotonic() < until_s:
        time.sleep(TICK_S)
        if HOME.change_to(link.status().reading.pose)[0] == pytest.approx(0.02, abs=1e-6):
            return
    pytest.fail(f"it is at {HOME.change_to(link.status().reading.pose)}")


def test_a_client_that_falls_silent_is_answered_with_a_stop(link):
    go(link, 6)
    time.sleep(0.5)
    status = link.status()
    assert "no word from the client" in status.trouble and not status.moving
    time.sleep(0.2)
    np.testing.assert_array_equal(link.status().reading.pose.position_m, status.reading.pose.position_m)


def test_a_robot_that_cannot_be_reached_says_so_at_once():
    with pytest.raises(ArmError, match="no route to the robot"):
        link_of(refuse="no route to the robot")


def test_a_broken_connection_is_an_error_of_every_later_call():
    link = link_of(break_after=5)
    time.sleep(0.3)
    for _ in range(2):
        with pytest.raises(ArmError, match="the cable came off"):
            link.status()
    link.close()


def test_a_servo_that_stalls_is_missed_and_its_late_replies_are_passed_over(link):
    os.kill(link._process.pid, signal.SIGSTOP)
    with pytest.raises(ArmError, match=r"has not answered for 1 s"):
        link.hold()
    os.kill(link._process.pid, signal.SIGCONT)
    time.sleep(0.1)
    assert link.cadence().ticks > 0


def test_a_servo_that_dies_is_missed(link):
    os.kill(link._process.pid, signal.SIGKILL)
    link._process.join(5)
    with pytest.raises(ArmError, match=r"the servo process is gone \(exit code -9\)"):
        link.status()


def test_closing_twice_does_no_harm(link):
    link.close()
    link.close()


STALLING_CLIENT = """
import os, signal, sys, time
import numpy as np
from tests.client.test_servo_process import go, link_of
if __name__ == "__main__":
    link = link_of()
    print(link._process.pid, flush=True)
    go(link, 10_000)
"""


def test_the_servo_of_a_client_that_is_killed_ends_too(tmp_path):
    script = tmp_path / "client.py"
    script.write_text(STALLING_CLIENT)
    client = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    servo = int(client.stdout.readline())
    client.kill()
    client.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{servo}"):
            return
        time.sleep(0.05)
    pytest.fail(f"process {servo} is still there")
