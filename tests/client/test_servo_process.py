"""The servo's process outlives a client that stalls, and says when it is the one that does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.servo import MotionLimits
from robot_client.servo_process import ServoLink
from tests.client.fake_hardware import HOME, JOINTS, FakeHardware

TICK_S = 0.05
X = np.array([0.002, 0, 0, 0, 0, 0])


class TellingHardware(FakeHardware):
    """Leaves a file where it was stopped or closed; while there is one of the name `cut`, its line is silent."""

    def __init__(self, *, folder: str, **settings):
        super().__init__(**settings)
        self._folder = Path(folder)

    def read(self) -> Reading:
        self._require_a_line()
        return super().read()

    def stop(self) -> None:
        self._require_a_line()
        super().stop()
        (self._folder / "stop").touch()

    def close(self) -> None:
        (self._folder / "close").touch()

    def _require_a_line(self) -> None:
        if (self._folder / "cut").exists():
            raise ArmError("the cable came off")


def link_of(make=FakeHardware, **settings) -> ServoLink:
    return ServoLink(make, settings, MotionLimits(), tick_s=TICK_S)


def wait_until(done: Callable[[], object], patience_s: float = 20.0) -> None:
    until_s = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.02)


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
    assert "servo" not in {process.name for process in multiprocessing.active_children()}


def test_a_broken_connection_is_an_error_of_every_later_call():
    link = link_of(break_after=5)
    time.sleep(0.3)
    for _ in range(2):
        with pytest.raises(ArmError, match="the cable came off"):
            link.status()
    link.close()


def test_a_robot_that_falls_silent_at_once_says_so_itself_and_is_let_go(tmp_path):
    (tmp_path / "cut").touch()
    with pytest.raises(ArmError, match="TellingHardware: the cable came off"):
        link_of(TellingHardware, folder=str(tmp_path))
    wait_until((tmp_path / "close").exists)


def test_a_robot_whose_line_was_cut_is_stopped_as_soon_as_it_hears_again(tmp_path):
    link = link_of(TellingHardware, folder=str(tmp_path))
    link.go_home(JOINTS + 3.0, 0.001, 1.0, time.monotonic() + 600)
    (tmp_path / "cut").touch()
    wait_until(lambda: complaint(link.status) == "the cable came off")
    assert complaint(link.hold) == "the cable came off"
    assert not (tmp_path / "stop").exists()
    (tmp_path / "cut").unlink()
    wait_until((tmp_path / "stop").exists)
    link.close()


def test_a_person_takes_up_again_what_an_error_has_ended_once_its_cause_is_gone(tmp_path):
    link = link_of(TellingHardware, folder=str(tmp_path))
    (tmp_path / "cut").touch()
    wait_until(lambda: complaint(link.status) == "the cable came off")
    assert complaint(link.recover) == complaint(link.status) == "the cable came off"
    (tmp_path / "cut").unlink()
    assert complaint(link.status) == "the cable came off"
    assert complaint(link.recover) == complaint(link.status) == ""
    link.close()


def complaint(call: Callable[[], object]) -> str:
    try:
        call()
    except ArmError as error:
        return str(error)
    return ""


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
import sys, time
from tests.client.test_servo_process import JOINTS, TellingHardware, link_of
if __name__ == "__main__":
    link = link_of(TellingHardware, folder=sys.argv[1])
    while True:
        link.go_home(JOINTS + 3.0, 0.001, 1.0, time.monotonic() + 0.5)
        print(link._process.pid, flush=True)
        time.sleep(0.05)
"""


@pytest.fixture
def client(tmp_path):
    """A client on its way home, in a process group of its own as under a shell; its first line is its servo's pid."""
    script = tmp_path / "client.py"
    script.write_text(STALLING_CLIENT)
    client = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        preexec_fn=os.setpgrp,
    )
    yield client
    client.kill()
    client.wait()


def test_the_servo_of_a_client_that_is_killed_ends_too(client):
    servo = int(client.stdout.readline())
    client.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{servo}"))


def test_a_client_that_is_suspended_at_its_terminal_leaves_an_arm_at_rest(client, tmp_path):
    """Ctrl-Z reaches the whole process group."""
    client.stdout.readline()
    (tmp_path / "stop").unlink(missing_ok=True)
    os.killpg(client.pid, signal.SIGTSTP)
    os.waitpid(client.pid, os.WUNTRACED)
    wait_until((tmp_path / "stop").exists)


@pytest.mark.parametrize("ending", [signal.SIGHUP, signal.SIGQUIT])
def test_a_terminal_that_ends_its_client_lets_the_servo_let_go_of_the_arm(client, tmp_path, ending):
    client.stdout.readline()
    os.killpg(client.pid, ending)
    wait_until((tmp_path / "close").exists)
