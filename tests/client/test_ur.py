"""Universal Robots through the real ur_rtde, against a controller of ours (tests/client/ur_simulator.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rtde_control", reason="ur_rtde is not installed (extra ur)")

from robot_client.arms.robotiq import RobotiqGripper
from robot_client.arms.ur import URHardware
from robot_client.errors import ArmError
from robot_client.servo import MotionLimits
from robot_client.servo_process import ServoLink
from tests.client.hardware_laws import HardwareLaws
from tests.client.ur_simulator import HOME_RAD, PLAYING, ScriptError, URSimulator, forward, inverse

pytestmark = pytest.mark.arm

SETTINGS: dict[str, Any] = {"lookahead_time_s": 0.03, "watchdog_hz": 0.2}
"""A busy machine may stall a test for longer than the tenth of a second that the watchdog waits by default."""
STILL_6 = np.zeros(6)
HOME = forward(np.array(HOME_RAD))


def wait_until(there: Callable[[], object], patience_s: float = 6.0) -> None:
    until_s = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.01)


def at_rest(simulator: URSimulator) -> bool:
    state = simulator("state")
    return state["speed_rad_s"] < 1e-6 and not state["led"]


def complaint(hardware: URHardware) -> str:
    """Of recover()."""
    try:
        hardware.recover()
    except ArmError as error:
        return str(error)
    return ""


def lead(hardware: URHardware, speed_m_s: float, seconds: float) -> int:
    """Downwards from home; returns how many set points were given."""
    hardware.begin()
    began_s, given = time.monotonic(), 0
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        down_6 = np.array([0, 0, -speed_m_s, 0, 0, 0])
        hardware.servo(HOME.moved(down_6 * elapsed_s), down_6)
        given += 1
        time.sleep(1 / hardware.rate_hz)
    return given


@pytest.fixture(scope="module")
def simulator() -> Iterator[URSimulator]:
    simulator = URSimulator()
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def connected(simulator: URSimulator) -> Iterator[URHardware]:
    """Connected once: ur_rtde takes two seconds to let go."""
    hardware = URHardware(host=simulator.host, **SETTINGS)
    yield hardware
    hardware.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[URHardware, URSimulator]]:
    """By a watchdog that waits half a second; without a gripper."""
    simulator = URSimulator()
    hardware = URHardware(host=simulator.host, gripper="none", lookahead_time_s=0.03, watchdog_hz=2.0)
    yield hardware, simulator
    hardware.close()
    simulator.close()


@pytest.fixture
def hardware(connected: URHardware, simulator: URSimulator) -> Iterator[URHardware]:
    """At rest at home, without a fault, its gripper open."""
    simulator("put_right")
    wait_until(lambda: complaint(connected) == "")
    simulator("go_home")
    connected.grip(1.0)
    wait_until(lambda: np.allclose(connected.read().joints_J, HOME_RAD) and connected.read().opening == 1)
    yield connected
    connected.stop()
    wait_until(lambda: connected.read().fault or at_rest(simulator))


class TestURHardware(HardwareLaws):
    home_J = np.array(HOME_RAD)

    @pytest.fixture
    def hardware(self, hardware):
        return hardware

    @pytest.fixture
    def ail(self, simulator):
        return lambda: simulator("protective_stop")

    def test_closing_twice_does_no_harm(self):
        simulator = URSimulator()
        hardware = URHardware(host=simulator.host, **SETTINGS)
        hardware.close()
        hardware.close()
        wait_until(lambda: simulator("state")["runtime"] != PLAYING)
        simulator.close()


def test_every_set_point_reaches_the_controller(hardware, simulator):
    before = simulator("state")["set_points"]
    given = lead(hardware, 0.02, 0.5)
    assert 0.7 * given <= simulator("state")["set_points"] - before <= given


def test_no_call_waits_for_the_robot(hardware):
    calls = {
        "begin": hardware.begin,
        "servo": lambda: hardware.servo(HOME, STILL_6),
        "stop servo": hardware.stop,
        "move_joints": lambda: hardware.move_joints(np.array(HOME_RAD) + 0.1, 0.2),
        "stop move": hardware.stop,
        "grip": lambda: hardware.grip(0.5),
        "read": hardware.read,
    }
    took_s = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            began_s = time.monotonic()
            call()
            took_s[name].append(time.monotonic() - began_s)
            time.sleep(0.02)
    assert {name: took for name, took in took_s.items() if np.median(took) > 1 / hardware.rate_hz} == {}
    assert hardware.read().fault == ""


def test_a_stop_is_a_brake(hardware, simulator):
    lead(hardware, 0.1, 0.3)
    hardware.stop()
    stopped_m = hardware.read().pose.position_m
    wait_until(lambda: at_rest(simulator))
    time.sleep(0.05)
    assert hardware.read().pose.position_m[2] < HOME.position_m[2]
    assert np.linalg.norm(hardware.read().pose.position_m - stopped_m) < 0.01
    assert hardware.read().fault == ""


def test_a_reading_on_the_way_is_on_the_way(hardware):
    hardware.move_joints(np.array(HOME_RAD) + np.array([0, 0, 0, 0, 0, 0.3]), 0.3)
    seen = []
    while not seen or seen[-1] < HOME_RAD[5] + 0.299:
        seen.append(hardware.read().joints_J[5])
        assert len(seen) < 1000
        time.sleep(0.01)
    assert len(set(np.round(seen, 3))) > 10 and (np.diff(seen) >= 0).all()
    agreed_6 = forward(hardware.read().joints_J).change_to(hardware.read().pose)
    np.testing.assert_allclose(agreed_6, STILL_6, atol=1e-3)


class TestWatchdog:
    def test_an_arm_at_rest_needs_no_attention(self, guarded):
        hardware, _ = guarded
        time.sleep(2 * hardware.watchdog_s)
        assert hardware.read().fault == ""

    def test_without_a_gripper_it_reads_as_open(self, guarded):
        hardware, _ = guarded
        hardware.grip(0.0)
        assert hardware.read().opening == 1

    def test_a_silent_caller_stops_the_arm(self, guarded):
        hardware, simulator = guarded
        lead(hardware, 0.02, 0.1)
        wait_until(lambda: hardware.read().fault)
        assert hardware.read().fault == "the program on the controller is STOPPED"
        hardware.servo(HOME.moved(np.full(6, 0.1)), STILL_6)
        time.sleep(0.1)
        assert simulator("state")["runtime"] != PLAYING and at_rest(simulator)

    def test_a_move_that_nobody_watches_is_stopped(self, guarded):
        hardware, simulator = guarded
        hardware.recover()
        hardware.move_joints(np.array(HOME_RAD) + 1.0, 0.05)
        wait_until(lambda: simulator("state")["runtime"] != PLAYING)
        assert np.abs(hardware.read().joints_J - HOME_RAD).max() < 0.9

    def test_a_silent_line_is_a_fault(self, guarded):
        hardware, simulator = guarded
        wait_until(lambda: complaint(hardware) == "")
        simulator("be_silent", True)
        wait_until(lambda: hardware.read().fault)
        simulator("be_silent", False)
        assert hardware.read().fault.startswith(f"nothing from {simulator.host} for ")
        wait_until(lambda: complaint(hardware) == "")
        assert hardware.read().fault == ""


def test_a_recovered_arm_does_not_take_up_its_last_set_point(hardware, simulator):
    lead(hardware, 0.05, 0.2)
    simulator("end_program")
    wait_until(lambda: hardware.read().fault and at_rest(simulator))
    resting_m = simulator("state")["position_m"]
    hardware.recover()
    time.sleep(0.2)
    np.testing.assert_array_equal(simulator("state")["position_m"], resting_m)


def test_a_protective_stop_is_named_and_left_to_a_person(hardware, simulator):
    lead(hardware, 0.1, 0.1)
    simulator("protective_stop")
    wait_until(lambda: hardware.read().fault == "safety mode PROTECTIVE_STOP")
    simulator("set_unlock", False)
    with pytest.raises(ArmError, match=r"cannot unlock .*Cannot unlock protective stop until 5s after occurrence"):
        hardware.recover()
    simulator("set_unlock", True)
    stopped_m = simulator("state")["position_m"]
    hardware.begin()
    hardware.servo(HOME, STILL_6)
    time.sleep(0.2)
    np.testing.assert_array_equal(simulator("state")["position_m"], stopped_m)
    assert hardware.read().fault == "safety mode PROTECTIVE_STOP"
    hardware.recover()
    assert hardware.read().fault == ""
    lead(hardware, 0.1, 0.3)
    assert hardware.read().fault == "" and (simulator("state")["position_m"] != stopped_m).any()


def test_a_fault_that_went_away_by_itself_is_still_a_fault(hardware, simulator):
    simulator("protective_stop")
    wait_until(lambda: hardware.read().fault)
    assert simulator("dashboard", "unlock protective stop") == "Protective stop releasing"
    time.sleep(0.2)
    assert hardware.read().fault == "safety mode PROTECTIVE_STOP"


def test_an_emergency_stop_needs_a_person_at_the_robot(hardware, simulator):
    simulator("emergency_stop")
    wait_until(lambda: hardware.read().fault)
    assert hardware.read().fault == "safety mode ROBOT_EMERGENCY_STOP"
    assert complaint(hardware) == f"the UR at {simulator.host} needs a person: safety mode ROBOT_EMERGENCY_STOP"
    simulator("release_emergency_stop")
    wait_until(lambda: complaint(hardware) == f"the UR at {simulator.host} needs a person: robot mode POWER_OFF")
    simulator("dashboard", "power on")
    simulator("dashboard", "brake release")
    wait_until(lambda: complaint(hardware) == "")
    assert hardware.read().fault == ""


def test_a_pose_out_of_reach_is_a_fault(hardware):
    hardware.begin()
    hardware.servo(HOME.moved(np.array([-2.0, 0, 0, 0, 0, 0])), STILL_6)
    wait_until(lambda: hardware.read().fault)
    assert hardware.read().fault == "the program on the controller is STOPPED"


def test_a_fault_of_the_gripper_is_one_of_the_arm(hardware, simulator):
    simulator("gripper_fault", 0x0E)
    wait_until(lambda: hardware.read().fault)
    assert hardware.read().fault == "gripper fault 0x0E: overcurrent"
    hardware.recover()
    assert hardware.read().fault == ""
    hardware.grip(0.0)
    wait_until(lambda: hardware.read().opening == 0)
    assert simulator("state")["force"] == 50


def test_a_gripper_that_is_not_active_is_a_fault_until_a_person_clears_it():
    simulator = URSimulator()
    hardware = URHardware(host=simulator.host, **SETTINGS)
    assert hardware.read().fault == "the gripper is not activated; clearing this moves its fingers"
    assert simulator("state")["gripper"]["ACT"] == 0
    hardware.recover()
    assert hardware.read().fault == "" and simulator("state")["gripper"]["ACT"] == 1
    hardware.close()
    simulator.close()


def test_an_arm_in_local_control_is_refused_in_the_vendors_words(simulator, connected):
    simulator("set_remote", False)
    with pytest.raises(ArmError, match="Please enable remote control on the robot!"):
        URHardware(host=simulator.host)
    simulator("put_right")


def test_an_arm_that_is_not_ready_is_refused(simulator, hardware):
    simulator("protective_stop")
    with pytest.raises(ArmError, match=f"the UR at {simulator.host} is not ready: safety mode PROTECTIVE_STOP"):
        URHardware(host=simulator.host)


def test_nobody_at_the_address_is_an_arm_error():
    with pytest.raises(ArmError, match=r"cannot connect, UR at 127\.0\.31\.1: "):
        URHardware(host="127.0.31.1")
    with pytest.raises(ArmError, match=r"no gripper at work at 127\.0\.31\.1:63352: "):
        RobotiqGripper("127.0.31.1")


@pytest.mark.parametrize(
    "wrong",
    [{"rate_hz": 1000.0}, {"lookahead_time_s": 0.01}, {"gain": 50.0}, {"watchdog_hz": 0.1}, {"gripper": "hand"}],
)
def test_a_wrong_setting_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*, got "):
        URHardware(host="127.0.31.1", **wrong)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_lost_connection_ends_the_servo_and_the_motion_for_good(comes_back):
    """In a process of its own, as in production: ur_rtde 1.6.5 reconnects without end, and may crash."""
    simulator = URSimulator()
    settings = {"host": simulator.host, "gripper": "none", "watchdog_hz": 2.0}
    link = ServoLink(URHardware, settings, MotionLimits(), tick_s=0.05)

    def go() -> str:
        try:
            link.go(np.array([0, 0, -0.002, 0, 0, 0]), 1.0, time.monotonic() + 3)
        except ArmError as error:
            return str(error)
        return ""

    wait_until(lambda: go() == "" and simulator("state")["position_m"][2] < HOME.position_m[2] - 0.01)
    simulator("disconnect", not comes_back)
    wait_until(lambda: "lost the connection to the UR" in (words := go()) or "the servo process is gone" in words)
    wait_until(lambda: simulator("state")["runtime"] != PLAYING and at_rest(simulator))
    time.sleep(0.5)
    assert simulator("state")["runtime"] != PLAYING and simulator("state")["uploads"] == 1
    simulator.close()
    link.close()


def test_the_simulated_arms_joints_and_pose_agree():
    straight = forward(np.zeros(6))
    np.testing.assert_allclose(straight.position_m, [-0.425 - 0.3922, -0.1333 - 0.0996, 0.1625 - 0.0997], atol=1e-9)
    change_6 = np.array([0.05, -0.04, 0.03, 0.2, -0.1, 0.3])
    joints_6 = inverse(HOME.moved(change_6), np.array(HOME_RAD))
    np.testing.assert_allclose(HOME.change_to(forward(joints_6)), change_6, atol=1e-8)
    with pytest.raises(ScriptError):
        inverse(HOME.moved(np.array([-2.0, 0, 0, 0, 0, 0])), np.array(HOME_RAD))
