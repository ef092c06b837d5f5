"""The xArm's own SDK, led by us, against a controller of ours on loopback; as root, for its port 502."""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("xarm", reason="the xArm's SDK is not installed (pip install xarm-python-sdk)")

from robot_client.arms.xarm import XArmHardware
from robot_client.errors import ArmError
from robot_client.hardware import Hardware
from robot_client.pose import Pose
from tests.client.hardware_laws import HardwareLaws
from tests.client.xarm_simulator import GRIPPER_PULSES_S, HOME_7, MOVING, PAUSED, STOPPED, XArmSimulator

pytestmark = pytest.mark.arm

PATIENT_S = 5.0
"""Long enough for a machine with much else to do."""
SHORT_S = 1.0
NUMBERS = itertools.count(2)
CLEARING = {11, 16, 17}
"""Power, clean error, clean warning: what only a person may ask for."""


@pytest.fixture(scope="module")
def closing() -> Iterator[Executor]:
    """The SDK takes up to a second to let go of an arm, which the next test need not wait for."""
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def robots() -> Iterator[Callable[..., XArmSimulator]]:
    """Makes simulators, each at an address of its own; afterwards none may have met anything it does not know."""
    made: list[XArmSimulator] = []

    def make(**options) -> XArmSimulator:
        pid = os.getpid()
        host = f"127.{pid >> 8 & 255}.{pid & 255}.{next(NUMBERS)}"
        try:
            made.append(XArmSimulator(host, **options))
        except OSError as error:
            pytest.skip(f"cannot listen on {host}, port 502: {error}")
        return made[-1]

    yield make
    assert [robot.unknown + robot.refused for robot in made] == [[] for _ in made]


@pytest.fixture
def robot(robots) -> XArmSimulator:
    return robots()


@pytest.fixture
def connect(closing) -> Iterator[Callable[..., XArmHardware]]:
    made: list[tuple[XArmHardware, XArmSimulator]] = []

    def make(robot: XArmSimulator, **options) -> XArmHardware:
        hardware = XArmHardware(**{"host": robot.host, "gripper": "none", "patience_s": PATIENT_S, **options})
        made.append((hardware, robot))
        return hardware

    yield make
    for hardware, robot in made:
        closing.submit(lambda hardware=hardware, robot=robot: (hardware.close(), robot.close()))


@pytest.fixture
def hardware(robot, connect) -> XArmHardware:
    return connect(robot)


def until(done: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENT_S
    while not done():
        assert time.monotonic() < until_s, "did not come true in time"
        time.sleep(0.005)


def lead(hardware: Hardware, goal: Pose, periods: int = 10) -> list[float]:
    """On a straight line at the hardware's own rate; the seconds that each servo() took."""
    start = hardware.read().pose
    way_6, due_s, took_s = start.change_to(goal), time.monotonic(), []
    for k in range(1, periods + 1):
        called_s = time.monotonic()
        hardware.servo(start.moved(k / periods * way_6), way_6 * hardware.rate_hz / periods)
        took_s.append(time.monotonic() - called_s)
        due_s += 1 / hardware.rate_hz
        time.sleep(max(0.0, due_s - time.monotonic()))
    return took_s


def fault_of(hardware: Hardware) -> str:
    until(lambda: hardware.read().fault)
    return hardware.read().fault


def test_the_simulator_answers_as_the_vendors_manual_says_and_remembers_what_it_does_not_know(robot):
    with socket.create_connection((robot.host, 502)) as end:
        end.sendall(bytes.fromhex("0001 0002 0001 01"))
        assert end.recv(64).startswith(bytes.fromhex("0001 0002 002a 01 10") + b"6,6,XI1304,AC1304,v2.7.1\0")
        end.sendall(bytes.fromhex("0007 0002 0001 c8"))
        assert end.recv(64) == bytes.fromhex("0007 0002 0002 c8 30")  # a warning, and not ready to move
    assert (robot.unknown, robot.warning) == (["command 200"], 13)
    robot.unknown.clear()


# Motion.


class TestXArm(HardwareLaws):
    home_J = HOME_7[:6]
    tolerance_m = tolerance_rad = 1e-5
    settle_ticks = 4

    @pytest.fixture
    def hardware(self, robot, connect):
        return connect(robot, gripper="xarm")

    @pytest.fixture
    def ail(self, robot):
        return lambda: setattr(robot, "gripper_error", 11)


@pytest.mark.parametrize("vector", [(0.3, -0.2, 0.9), (0, math.pi / 2, 0), (2.0, 1.5, -0.5), (0, 0, 3.1)])
def test_every_rotation_is_read_as_it_is(robot, hardware, vector):
    robot.pose = Pose.of((0.4, -0.1, 0.3), vector)
    until(lambda: np.allclose(robot.pose.change_to(hardware.read().pose), 0, atol=1e-5))
    hardware.begin()
    lead(hardware, robot.pose.moved(np.full(6, 0.002)))
    until(lambda: np.allclose(Pose.of((0.4, -0.1, 0.3), vector).change_to(robot.where()), 0.002, atol=1e-5))


@pytest.mark.parametrize("rate_hz", [100.0, 250.0])
def test_every_set_point_arrives_in_its_order_and_at_its_rate(robot, connect, rate_hz):
    hardware = connect(robot, rate_hz=rate_hz)
    hardware.begin()
    periods = round(0.4 * rate_hz)
    lead(hardware, hardware.read().pose.moved(np.array([0.05, 0, 0, 0, 0, 0])), periods=periods)
    came_s = [at_s for at_s, _ in robot.set_points]
    x_m = [pose.position_m[0] for _, pose in robot.set_points]
    np.testing.assert_allclose(np.diff(x_m), 0.05 / periods, atol=1e-6)
    assert len(x_m) == periods and (came_s[-1] - came_s[0]) / (periods - 1) >= 0.5 / rate_hz


def test_no_call_waits_for_a_period_though_the_gripper_is_slow(robots, connect):
    robot = robots(bus_s=0.02)
    hardware = connect(robot, gripper="xarm")
    hardware.begin()
    took_s = {"servo": lead(hardware, hardware.read().pose.moved(np.full(6, 0.002)), periods=30)}
    calls = {"read": hardware.read, "grip": lambda: hardware.grip(next(NUMBERS) % 2)}
    for name, call in calls.items():
        stamps = [time.monotonic()]
        for _ in range(30):
            call()
            stamps.append(time.monotonic())
        took_s[name] = np.diff(stamps).tolist()
    assert {name for name, seconds in took_s.items() if np.median(seconds) > 0.01} == set()


def test_taking_control_does_not_move_it(robot, hardware):
    before = robot.where()
    hardware.begin()
    time.sleep(0.05)
    np.testing.assert_array_equal(before.change_to(robot.where()), 0)


def test_without_set_points_it_rests_at_the_last_one(robot, hardware):
    hardware.begin()
    goal = hardware.read().pose.moved(np.array([0.005, 0, 0, 0, 0, 0]))
    lead(hardware, goal, periods=3)
    until(lambda: robot.state != MOVING)
    np.testing.assert_allclose(goal.change_to(robot.where()), 0, atol=2e-6)


def test_a_stop_is_at_rest_under_power_and_ready_to_go_on(robot, hardware):
    hardware.begin()
    lead(hardware, hardware.read().pose.moved(np.array([0.008, 0, 0, 0, 0, 0])), periods=1)
    hardware.stop()
    resting = robot.where()
    time.sleep(0.05)
    np.testing.assert_array_equal(resting.change_to(robot.where()), 0)
    assert robot.powered and hardware.read().fault == ""
    hardware.begin()
    lead(hardware, hardware.read().pose.moved(np.array([0, 0.002, 0, 0, 0, 0])))
    until(lambda: abs(robot.where().position_m[1] - 0.002) < 2e-6)


def test_a_stop_at_rest_asks_for_nothing(robot, hardware):
    hardware.begin()
    hardware.stop()
    asked = len(robot.commands)
    hardware.stop()
    assert len(robot.commands) == asked


def test_a_set_point_that_the_controller_would_ignore_is_refused(robot, hardware):
    hardware.begin()
    pose = hardware.read().pose
    with pytest.raises(ArmError, match=r"within 0\.01 m of the one before, got 0\.0120 m"):
        hardware.servo(pose.moved(np.array([0, 0, 0.012, 0, 0, 0])), np.zeros(6))
    hardware.servo(pose, np.zeros(6))
    assert len(robot.set_points) == 1


def test_an_arm_that_reads_poses_otherwise_is_not_led(robot, hardware):
    robot.told_apart = Pose.of((0, 0, 0), (0, 0.3, 0))
    with pytest.raises(ArmError, match=r"two rotations 0\.30 rad apart for one pose"):
        hardware.begin()


def test_joints_take_their_time_and_arrive(hardware):
    goal_J = HOME_7[:6] + np.array([0.3, -0.1, -0.2, 0, 0.1, -0.3])
    started_s = time.monotonic()
    hardware.move_joints(goal_J, 0.5)
    until(lambda: np.allclose(hardware.read().joints_J, goal_J, atol=1e-5))
    assert time.monotonic() - started_s >= 0.3 / (0.5 * math.pi)
    hardware.stop()
    hardware.begin()


def test_joints_stop_on_their_way_and_set_out_anew(robot, hardware):
    hardware.move_joints(HOME_7[:6] + 0.5, 0.05)
    hardware.stop()
    resting_7 = robot.joints_7
    time.sleep(0.05)
    np.testing.assert_array_equal(robot.joints_7, resting_7)
    assert 0 < resting_7[0] - HOME_7[0] < 0.5
    hardware.move_joints(HOME_7[:6] + 0.5, 0.05)
    hardware.move_joints(HOME_7[:6], 1.0)
    until(lambda: np.allclose(hardware.read().joints_J, HOME_7[:6], atol=1e-5))


def test_joints_that_set_out_though_the_answer_was_lost_can_be_stopped(robot, connect, monkeypatch):
    hardware = connect(robot, patience_s=SHORT_S)
    settle = hardware._settle
    monkeypatch.setattr(hardware, "_settle", lambda mode: (settle(mode), setattr(robot, "silent", True)))
    with pytest.raises(ArmError, match=r"did not take joint positions .*: RES_TIMEOUT"):
        hardware.move_joints(HOME_7[:6] + 0.5, 0.05)
    assert robot.state == MOVING
    robot.silent = False
    hardware.stop()
    assert robot.state != MOVING


def test_joints_beyond_the_arms_limits_are_refused(robot, hardware):
    with pytest.raises(ArmError, match=r"did not take joint positions \[7\.0, .*: OUT_OF_RANGE \(-8\)"):
        hardware.move_joints(np.array([7.0, 0, 0, 0, 0, 0]), 0.1)
    with pytest.raises(ArmError, match="has 6 joints, got 7 positions"):
        hardware.move_joints(np.zeros(7), 0.1)
    assert (robot.joints_7 == HOME_7).all()


@pytest.mark.parametrize(("model", "joints"), [("xarm5", 5), ("xarm7", 7), ("lite6", 6), ("850", 6)])
def test_every_model_has_its_own_number_of_joints(robots, connect, model, joints):
    hardware = connect(robots(model=model))
    assert hardware.read().joints_J.shape == (joints,)
    hardware.begin()
    hardware.move_joints(np.zeros(joints), 0.5)


# Faults.


@pytest.mark.parametrize(
    ("error", "words"),
    [(31, "C31: Collision Caused Abnormal Current. Please check for collisions"), (24, "C24: Speed Exceeds Limit.")],
)
def test_an_error_is_named_and_stays_until_recover(robot, hardware, error, words):
    hardware.begin()
    robot.fail(error)
    asked = len(robot.commands)
    assert fault_of(hardware).startswith(words)
    with pytest.raises(ArmError, match=words):
        hardware.begin()
    with pytest.raises(ArmError):
        hardware.move_joints(np.zeros(6), 0.5)
    hardware.stop()
    assert fault_of(hardware).startswith(words)
    assert robot.error == error and not CLEARING & set(robot.commands[asked:])
    robot.refused.clear()

    hardware.recover()
    assert robot.error == 0 and hardware.read().fault == ""
    hardware.begin()
    lead(hardware, hardware.read().pose.moved(np.array([0.002, 0, 0, 0, 0, 0])))
    until(lambda: len(robot.set_points) == 10)


def test_an_error_between_a_reading_and_a_set_point_is_a_fault_that_recover_clears(robot, hardware):
    hardware.begin()
    pose = hardware.read().pose
    robot.fail(31)
    hardware.servo(pose, np.zeros(6))
    assert re.search("did not take a set point: .* C31: Collision", hardware.read().fault)
    robot.refused.clear()
    hardware.recover()
    assert robot.error == 0 and hardware.read().fault == ""
    hardware.begin()


def test_a_pressed_emergency_stop_outlasts_recover(robot, hardware):
    words = "C1: The Emergency Stop Button on the xArm Controller is pushed in to stop"
    robot.press_emergency_stop()
    assert fault_of(hardware).startswith(words)
    hardware.recover()
    assert fault_of(hardware).startswith(words) and not robot.powered
    robot.release_emergency_stop()
    assert fault_of(hardware).startswith(words)
    hardware.recover()
    assert robot.powered and hardware.read().fault == ""
    hardware.begin()


def test_a_warning_is_named_and_stays_until_recover(robot, hardware):
    hardware.begin()
    robot.warning = 14
    lead(hardware, hardware.read().pose, periods=1)  # the controller tells with the next answer that there is one
    assert fault_of(hardware) == "W14: User instructions and parameters have no solution"
    hardware.recover()
    assert robot.warning == 0 and hardware.read().fault == ""


@pytest.mark.parametrize(
    ("interference", "words"),
    [
        ({"state": STOPPED}, "stopped by somebody else: state 4"),
        ({"state": PAUSED}, "paused by somebody else: state 3"),
        ({"mode": 2}, "put in mode 2 by somebody else, it was in mode 1"),
    ],
)
def test_another_hand_on_the_arm_is_a_fault(robot, connect, interference, words):
    hardware = connect(robot, patience_s=SHORT_S)
    hardware.begin()
    robot.interfere(**interference)
    assert fault_of(hardware) == words
    hardware.stop()  # clears nothing
    time.sleep(0.1)
    assert robot.state == STOPPED and hardware.read().fault == words
    hardware.recover()
    hardware.begin()


def test_a_fault_from_before_is_left_for_a_person_to_see(robot, connect):
    robot.fail(22)
    hardware = connect(robot)
    assert hardware.read().fault.startswith("C22: Self-Collision Error.")
    assert not robot.powered and not CLEARING & set(robot.commands)
    hardware.recover()
    hardware.begin()
    assert robot.powered


# The gripper.


def test_the_xarms_gripper_takes_its_time_and_says_where_it_is(robot, connect):
    hardware = connect(robot, gripper="xarm")
    assert hardware.read().opening == 1
    started_s = time.monotonic()
    hardware.grip(0.0)
    assert hardware.read().opening > 0
    until(lambda: hardware.read().opening == 0)
    assert time.monotonic() - started_s >= 850 / GRIPPER_PULSES_S
    hardware.grip(0.6)
    until(lambda: abs(hardware.read().opening - 0.6) < 0.001)


def test_a_grippers_error_is_named_and_stays_until_recover(robot, connect):
    hardware = connect(robot, gripper="xarm")
    robot.gripper_error = 11
    assert fault_of(hardware).startswith("G11: Gripper Current Overlimit.")
    with pytest.raises(ArmError, match="G11"):
        hardware.begin()
    hardware.recover()
    assert robot.gripper_error == 0 and hardware.read().fault == ""
    hardware.grip(0.0)
    until(lambda: hardware.read().opening == 0)


def test_the_lite_6s_gripper_opens_or_closes(robots, connect):
    robot = robots(model="lite6")
    hardware = connect(robot, gripper="lite6")
    hardware.grip(0.2)
    assert robot.outputs == [False, True] and hardware.read().opening == 0
    asked = len(robot.commands)
    hardware.grip(0.1)
    assert len(robot.commands) == asked
    hardware.grip(0.7)
    assert robot.outputs == [True, False] and hardware.read().opening == 1


def test_without_a_gripper_it_is_where_it_was_sent(hardware):
    hardware.grip(0.25)
    assert hardware.read().opening == 0.25


# The connection.


@pytest.mark.parametrize("gripper", ["xarm", "none"])
def test_closing_stops_leaves_the_power_on_and_may_be_repeated(robot, connect, gripper):
    hardware = connect(robot, gripper=gripper)
    hardware.move_joints(np.zeros(6), 0.05)
    hardware.close()
    assert robot.powered and robot.state != MOVING
    hardware.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "xarm gripper"]


def test_a_pulled_cable_is_reported_within_the_patience(robot, connect):
    hardware = connect(robot, patience_s=SHORT_S)
    hardware.begin()
    robot.silent = True
    started_s = time.monotonic()
    hardware.servo(robot.pose, np.zeros(6))
    with pytest.raises(ArmError, match=r"has said nothing for \d\.\d\d s"):
        until(lambda: hardware.read() is None)
    assert time.monotonic() - started_s < 4 * SHORT_S


def test_a_controller_that_is_switched_off_is_reported(robot, connect):
    hardware = connect(robot, patience_s=SHORT_S)
    hardware.begin()
    robot.close()
    with pytest.raises(ArmError, match="has said nothing"):
        until(lambda: hardware.read() is None)


def test_where_there_is_no_arm_the_address_is_named(robot):
    robot.close()
    with pytest.raises(ArmError, match=f"no xArm at {robot.host}: connect socket failed"):
        XArmHardware(host=robot.host)


def test_an_older_firmware_is_refused(robots, connect):
    with pytest.raises(ArmError, match=r"needs firmware 2\.4\.101 or later, got 2\.3\.0"):
        connect(robots(firmware="v2.3.0"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate_hz": 300.0}, "rate_hz must be above 0 and at most 250, got 300"),
        ({"gripper": "robotiq"}, r"gripper must be one of \['lite6', 'none', 'xarm'\], got 'robotiq'"),
    ],
)
def test_settings_that_no_arm_has_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        XArmHardware(host="127.0.0.1", **options)
