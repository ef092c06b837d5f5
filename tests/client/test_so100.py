"""The SO-100 and SO-101 through the vendor's SDK, on emulated servos."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose
from tests.client.hardware_laws import STILL_6, HardwareLaws

pytest.importorskip("scservo_sdk", reason="an SO arm needs its servos' SDK (the package feetech-servo-sdk)")
pytest.importorskip("pinocchio", reason="an SO arm needs Pinocchio (the package pin)")

from robot_client.arms.calibration import RAD, JointCalibration, read_calibration
from robot_client.arms.so100 import SO100Hardware
from tests.client.feetech_emulator import OVERLOAD, FeetechEmulator

pytestmark = pytest.mark.arm

NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CALIBRATION = {
    "shoulder_pan": {"id": 1, "drive_mode": 0, "homing_offset": -1372, "range_min": 741, "range_max": 3462},
    "shoulder_lift": {"id": 2, "drive_mode": 0, "homing_offset": -1188, "range_min": 808, "range_max": 3204},
    "elbow_flex": {"id": 3, "drive_mode": 0, "homing_offset": 965, "range_min": 887, "range_max": 3097},
    "wrist_flex": {"id": 4, "drive_mode": 1, "homing_offset": 0, "range_min": 853, "range_max": 3228},
    "wrist_roll": {"id": 5, "drive_mode": 0, "homing_offset": 1504, "range_min": 0, "range_max": 4095},
    "gripper": {"id": 6, "drive_mode": 0, "homing_offset": -57, "range_min": 2031, "range_max": 3489},
}
"""As lerobot-calibrate writes it; with one joint that turns the other way."""
LIFT, GRIPPER = 2, 6
COUNT_M = 8e-4
"""What half a count of every joint makes at the tool, at the start of a way and at its end."""


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(CALIBRATION))
    return path


class Clock:
    """Time that passes when told to: what the servos do is then the same on a busy machine."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def emulator(clock_s) -> FeetechEmulator:
    """The arm at zero, its gripper half open."""
    middles = {c["id"]: (c["range_min"] + c["range_max"]) // 2 + c["homing_offset"] for c in CALIBRATION.values()}
    bus = FeetechEmulator(middles, clock_s)
    for joint in CALIBRATION.values():
        servo, offset = bus.servos[joint["id"]], joint["homing_offset"]
        servo.put(9, joint["range_min"], 2)
        servo.put(11, joint["range_max"], 2)
        servo.put(31, abs(offset) | (0x800 if offset < 0 else 0), 2)
    return bus


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bus(clock):
    with emulator(clock) as bus:
        yield bus


@pytest.fixture
def connect(bus, calibration):
    opened = []

    def connected(**settings) -> SO100Hardware:
        defaults = {"port": bus.port, "calibration": str(calibration), "patience_s": 0.1}
        opened.append(SO100Hardware(**defaults | settings))
        return opened[-1]

    yield connected
    for hardware in opened:
        hardware.close()


@pytest.fixture
def hardware(connect):
    return connect()


@pytest.fixture
def wait(hardware, clock):
    """Lets time pass, after what was written has arrived; returns how the arm then stands."""

    def waited(seconds: float) -> Reading:
        hardware.read()
        clock.now_s += seconds
        return hardware.read()

    return waited


@pytest.fixture
def lead(hardware, wait):
    """Gives a set point for some periods; returns where the arm then is."""

    def led(pose: Pose, periods: int) -> Pose:
        for _ in range(periods):
            hardware.servo(pose, STILL_6)
            wait(1 / hardware.rate_hz)
        return hardware.read().pose

    return led


class TestSO100(HardwareLaws):
    axes = ("x", "z", "about x", "about y")
    home_J = np.zeros(5)
    tolerance_m = COUNT_M
    tolerance_rad = 6e-3  # the counts of four joints, and 0.004 that the pan turns when the gripper rolls by 10 degrees
    settle_ticks = 4

    @pytest.fixture
    def clock(self):
        return time.monotonic

    @pytest.fixture
    def hardware(self, connect):
        return connect()

    @pytest.fixture
    def ail(self, bus):
        return lambda: bus.servos[GRIPPER].put(63, 74, 1)  # degrees Celsius


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_ten_steps_of_a_millimetre_are_ten_millimetres(hardware, lead, axis):
    """To the counts of the servos at every step; y is reached too, at the price of the yaw."""
    hardware.begin()
    start = hardware.read().pose
    direction_3 = np.eye(3)["xyz".index(axis)]
    missed_m = []
    for k in range(1, 11):
        wanted = start.moved(np.concatenate([0.001 * k * direction_3, np.zeros(3)]))
        missed_m.append(wanted.position_m - lead(wanted, 3).position_m)
    assert np.abs(missed_m).max() < COUNT_M
    assert np.abs(np.mean(missed_m, axis=0)).max() < COUNT_M / 2


@pytest.mark.parametrize("axis", ["about x", "about y"])
def test_ten_steps_of_half_a_degree_are_five_degrees(hardware, lead, axis):
    hardware.begin()
    start, missed_rad = hardware.read().pose, []
    for k in range(1, 11):
        wanted = start.moved(np.radians(0.5 * k) * np.eye(6)[3 if axis == "about x" else 4])
        reached = lead(wanted, 3)
        missed_rad.append(reached.change_to(wanted)[3:])
        np.testing.assert_allclose(reached.position_m, start.position_m, atol=COUNT_M)
    assert np.degrees(np.abs(missed_rad).max()) < 0.25


def test_a_yaw_is_not_followed_and_the_position_stays(hardware, lead):
    hardware.begin()
    start = hardware.read().pose
    turned_6 = start.change_to(lead(start.moved(np.array([0, 0, 0, 0, 0, 0.2])), 10))
    np.testing.assert_allclose(turned_6[:3], 0, atol=COUNT_M)
    assert abs(turned_6[5]) < 0.01


def test_no_joint_leaves_its_range_or_exceeds_its_speed(hardware, bus, lead):
    """A set point a metre ahead, that then jumps a metre to the side."""
    hardware.begin()
    start, told_J = hardware.read().pose, []
    for away_m in [(1, 0, 0), (0, 1, -1)]:
        wanted = start.moved(np.array([*away_m, 0, 0, 0]))
        for _ in range(30):
            lead(wanted, 1)
            told_J.append([bus.servos[CALIBRATION[name]["id"]].goal for name in NAMES[:5]])
    for k, name in enumerate(NAMES[:5]):
        goals = np.array(told_J)[:, k]
        assert CALIBRATION[name]["range_min"] <= goals.min() and goals.max() <= CALIBRATION[name]["range_max"]
        assert np.abs(np.diff(goals)).max() <= 2.0 / hardware.rate_hz / RAD + 1
        assert bus.servos[CALIBRATION[name]["id"]].get(46) <= 2.0 / RAD + 1


def test_joints_out_of_range_are_refused(hardware):
    with pytest.raises(ArmError, match=r"joints must be within \[.*-1\.69.*\] to \[.*\] rad, got \[0\.0, 0\.0, 1\.8"):
        hardware.move_joints(np.array([0, 0, 1.8, 0, 0]), 0.5)
    with pytest.raises(ArmError, match=r"moves 5 joints at a speed in \(0, 1\], got 6 at 0\.5"):
        hardware.move_joints(np.zeros(6), 0.5)


def test_joints_move_at_their_speed_and_arrive_together(hardware, wait):
    goal_J = np.array([0.4, -0.2, 0.1, 0.4, 0.0])
    hardware.move_joints(goal_J, 0.5)
    np.testing.assert_allclose(wait(0.2).joints_J, goal_J / 2, atol=0.005)
    np.testing.assert_allclose(wait(0.21).joints_J, goal_J, atol=0.005)


def test_it_is_limp_until_it_is_led_and_then_begins_where_it_is(hardware, bus, wait):
    assert not any(servo.torque for servo in bus.servos.values())
    bus.servos[LIFT].position += 100  # a person's hand
    hardware.begin()
    before_J = hardware.read().joints_J
    assert all(servo.torque for servo in bus.servos.values())
    np.testing.assert_array_equal(wait(0.1).joints_J, before_J)


@pytest.mark.parametrize("way", ["home", "set points"])
def test_a_stop_holds_within_a_period(hardware, lead, wait, way):
    if way == "home":
        hardware.move_joints(np.full(5, 0.5), 1.0)
        wait(0.1)
    else:
        hardware.begin()
        lead(hardware.read().pose.moved(np.array([0, 0, 0.1, 0, 0, 0])), 3)
    moving_J = hardware.read().joints_J
    hardware.stop()
    stopped_J = wait(1 / hardware.rate_hz).joints_J
    np.testing.assert_array_equal(wait(1.0).joints_J, stopped_J)
    assert 0.02 < np.abs(moving_J).max() < 0.4 and np.abs(stopped_J - moving_J).max() < 0.05


def test_set_points_after_a_stop_are_not_followed(hardware, lead):
    hardware.begin()
    start = lead(hardware.read().pose, 2)
    hardware.stop()
    lead(start.moved(np.array([0.02, 0, 0, 0, 0, 0])), 3)
    np.testing.assert_array_equal(hardware.read().pose.position_m, start.position_m)


def test_a_load_does_not_sink_the_arm_at_every_stop(hardware, bus, lead, wait):
    bus.servos[LIFT].sag = bus.servos[3].sag = 25
    hardware.begin()
    lead(hardware.read().pose, 3)
    resting = wait(30.0).pose
    for _ in range(5):
        hardware.stop()
        hardware.begin()
        lead(hardware.read().pose, 3)
        wait(30.0)
    np.testing.assert_allclose(hardware.read().pose.position_m, resting.position_m, atol=COUNT_M)


@pytest.mark.parametrize("speed", [0.05, 1.0])
def test_a_load_keeps_no_joint_from_arriving_and_none_goes_too_far(hardware, bus, wait, speed):
    bus.servos[LIFT].sag = bus.servos[3].sag = 25
    goal_J = np.array([0.1, 0.1, 0.0, 0.1, 0.1])
    hardware.move_joints(goal_J, speed)
    readings_TJ = np.array([wait(1 / hardware.rate_hz).joints_J for _ in range(100)])
    assert (readings_TJ <= goal_J + 1.5 * RAD).all()
    np.testing.assert_allclose(readings_TJ[-1], goal_J, atol=1.5 * RAD)
    hardware.stop()
    np.testing.assert_allclose(wait(0.5).joints_J, goal_J, atol=1.5 * RAD)


def test_what_is_gripped_is_held_without_an_overload(connect, bus, clock):
    bus.servos[GRIPPER].walls = (2500 - 57, np.inf)
    bus.servos[GRIPPER].put(36, 25, 1)  # LeRobot's setting, in %
    hardware = connect()
    hardware.grip(0.0)
    for _ in range(20):
        hardware.read()
        clock.now_s += 0.5
    held = hardware.read()
    assert held.fault == "" and held.opening == pytest.approx((2500 - 2031) / (3489 - 2031), abs=0.01)


FAULTS = {
    "overheat": (lambda servo: servo.put(63, 74, 1), lambda servo: servo.put(63, 40, 1), "overheat .*74 degrees"),
    "voltage": (lambda servo: servo.put(62, 39, 1), lambda servo: servo.put(62, 121, 1), r"voltage .*3\.9 V"),
    "overload": (lambda servo: servo.put(65, OVERLOAD, 1), lambda servo: None, "overload"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named_stops_the_arm_and_lasts_until_recover(hardware, bus, lead, wait, kind):
    ail, heal, words = FAULTS[kind]
    hardware.begin()
    start = lead(hardware.read().pose, 2)
    ail(bus.servos[LIFT])
    assert re.match(rf"servo 2 \(shoulder_lift\): {words}", hardware.read().fault)
    heal(bus.servos[LIFT])
    wait(1.0)
    writes = bus.writes
    stuck = lead(start.moved(np.array([0.02, 0, 0, 0, 0, 0])), 5)
    np.testing.assert_array_equal(stuck.position_m, start.position_m)
    for move in (hardware.begin, lambda: hardware.grip(0), lambda: hardware.move_joints(np.zeros(5), 0.1)):
        with pytest.raises(ArmError, match="will not move: servo 2"):
            move()
    assert "shoulder_lift" in hardware.read().fault and bus.writes == writes
    hardware.recover()
    assert hardware.read().fault == "" and bus.servos[LIFT].torque
    hardware.begin()
    moved_m = lead(start.moved(np.array([0.02, 0, 0, 0, 0, 0])), 5).position_m - start.position_m
    np.testing.assert_allclose(moved_m, [0.02, 0, 0], atol=COUNT_M)


def test_a_fault_that_lasts_is_a_fault_again_after_recover(hardware, bus):
    bus.servos[LIFT].put(63, 74, 1)
    assert "overheat" in hardware.read().fault
    hardware.recover()
    assert "overheat" in hardware.read().fault


def test_a_joint_that_pushes_too_long_is_overloaded(hardware, bus, wait):
    bus.servos[1].walls = (-np.inf, bus.servos[1].position + 50)
    hardware.move_joints(np.array([0.5, 0, 0, 0, 0]), 1.0)
    assert wait(0.5).fault == "" and wait(1.4).fault == ""
    assert wait(0.7).fault.startswith("servo 1 (shoulder_pan): overload (load ")


def test_an_unplugged_servo_is_reported_and_taken_back_by_recover(hardware, bus, lead, wait):
    hardware.begin()
    start = lead(hardware.read().pose, 2)
    bus.servos[3].plugged = False
    assert [wait(0.02).fault for _ in range(2)] == ["", "servo 3 (elbow_flex) does not answer"]
    hardware.recover()
    assert hardware.read().fault == "servo 3 (elbow_flex) does not answer"
    bus.servos[3].replug()
    assert hardware.read().fault and not bus.servos[3].torque
    hardware.recover()
    assert hardware.read().fault == "" and bus.servos[3].torque
    hardware.begin()
    moved_m = lead(start.moved(np.array([0.01, 0, 0, 0, 0, 0])), 5).position_m - start.position_m
    np.testing.assert_allclose(moved_m, [0.01, 0, 0], atol=COUNT_M)


@pytest.mark.parametrize("fate", ["lost", "short", "garbage", "corrupt"])
def test_a_damaged_reply_is_asked_for_again_and_no_fault(hardware, bus, fate):
    before = hardware.read()
    for number in (1, 4, 6):
        bus.servos[number].replies = [fate]
        bus.servos[number].position += 10
        reading = hardware.read()
        assert reading.fault == "" and bus.servos[number].replies == []
    np.testing.assert_allclose(np.abs(reading.joints_J - before.joints_J), 10 * RAD * np.array([1, 0, 0, 1, 0]))
    assert reading.opening > before.opening


def test_a_reply_that_comes_twice_is_not_taken_for_a_new_one(hardware, bus):
    bus.servos[GRIPPER].replies = ["twice"]
    before = hardware.read()
    time.sleep(0.02)
    bus.servos[GRIPPER].position += 100
    assert hardware.read().opening > before.opening + 0.05


def test_a_silent_servo_holds_up_a_reading_for_less_than_a_period(connect, bus):
    hardware, took_s = connect(patience_s=None), []
    bus.servos[2].plugged = False
    for _ in range(10):
        began_s = time.monotonic()
        hardware.read()
        took_s.append(time.monotonic() - began_s)
    assert min(took_s) < 1 / hardware.rate_hz


def test_a_lost_port_is_an_error(hardware, bus):
    bus.pull_out()
    with pytest.raises(ArmError, match=rf"the serial port {bus.port} is gone"):
        hardware.read()
    hardware.close()


def test_no_port_is_an_error(calibration):
    with pytest.raises(ArmError, match=r"the serial port /dev/nowhere is gone: .*nowhere"):
        SO100Hardware(port="/dev/nowhere", calibration=str(calibration))


def test_missing_servos_are_named_at_once(connect, bus):
    bus.servos[2].plugged = bus.servos[5].plugged = False
    with pytest.raises(ArmError, match=r"servo 2 \(shoulder_lift\), servo 5 .* must answer, only \[1, 3, 4, 6\] do"):
        connect()


def test_another_arms_calibration_is_refused(connect, bus):
    bus.servos[3].put(31, 960, 2)
    with pytest.raises(ArmError, match=r"servo 3 \(elbow_flex\): .* must be \(777, 0, 965, .*got \(777, 0, 960, "):
        connect()


def test_a_servo_in_another_mode_is_refused(connect, bus):
    bus.servos[1].put(33, 1, 1)
    with pytest.raises(ArmError, match=r"servo 1 .*: model, mode, .*got \(777, 1, "):
        connect()


@pytest.mark.parametrize("release", [False, True])
def test_close_keeps_the_torque_unless_told_to_release(connect, bus, release):
    hardware = connect(release=release)
    hardware.begin()
    hardware.close()
    connect()  # once it has answered, what was written before has arrived
    assert all(servo.torque is not release for servo in bus.servos.values())


def test_nothing_that_lasts_is_written_to_the_servos(hardware, bus, lead):
    before = [bytes(servo.registers[:40]) for servo in bus.servos.values()]
    hardware.grip(1.0)
    hardware.begin()
    lead(hardware.read().pose.moved(np.array([0.01, 0, 0, 0, 0, 0])), 3)
    assert [bytes(servo.registers[:40]) for servo in bus.servos.values()] == before


def test_servos_with_the_coarse_unit_of_speed_are_no_faster(connect, bus):
    bus.servos[1].put(18, 8, 1)
    hardware = connect()
    hardware.move_joints(np.array([1.0, 0, 0, 0, 0]), 1.0)
    hardware.read()
    assert bus.servos[1].get(46) == np.ceil(2.0 / RAD / 50)


@pytest.mark.parametrize("model", ["so100", "so101"])
def test_both_models_are_known_and_no_other(connect, model):
    assert 0.3 < connect(model=model).read().pose.position_m[0] < 0.5
    with pytest.raises(ValueError, match=r"model must be one of \('so100', 'so101'\), got 'so102'"):
        connect(model="so102")


@pytest.mark.parametrize(("name", "value"), [("rate_hz", 200.0), ("speed_rad_s", 0.0), ("grip_torque", 1.5)])
def test_settings_out_of_range_are_refused(connect, name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and at most .*, got {value:g}"):
        connect(**{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_an_angle_survives_the_way_to_counts_and_back(name):
    joint = JointCalibration(**CALIBRATION[name])
    for angle_rad in np.linspace(-joint.high_rad, joint.high_rad, 101):
        assert abs(joint.angle_rad(joint.counts(angle_rad)) - angle_rad) <= RAD / 2 + 1e-9
    assert joint.counts(10.0) == (joint.range_min if joint.drive_mode else joint.range_max)


def test_lerobots_file_is_read_in_the_order_of_the_joints(calibration):
    found = read_calibration(calibration, NAMES[::-1])
    assert tuple(found) == NAMES[::-1] and found["elbow_flex"].homing_offset == 965


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        ('{"gripper": {"id": 6}}', "missing 4 required keyword-only arguments"),
        (json.dumps({"gripper": CALIBRATION["gripper"] | {"range_min": 3489}}), "got 0, 3489 and 3489"),
        ("{}", r"must calibrate \['gripper'\] too, it has \[\]"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ArmError, match=rf"bad\.json .*{words}"):
        read_calibration(path, ["gripper"])
