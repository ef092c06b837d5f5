"""The servo follows goals smoothly and exactly, and comes to rest whenever nobody vouches for them."""

from __future__ import annotations

import numpy as np
import pytest

from robot_client.errors import ArmError
from robot_client.servo import SMOOTHING_TICKS, MotionLimits, Servo, SetPoint
from tests.client.fake_hardware import HOME, JOINTS, FakeHardware

TICK_S = 0.05
EXPIRES_TICKS = 2
LIMITS = MotionLimits(speed_m_s=0.25, acceleration_m_s2=5.0)
X = np.array([1.0, 0, 0, 0, 0, 0])


class Ring:
    """A servo, its hardware and a clock that is turned by hand."""

    def __init__(self, limits: MotionLimits = LIMITS, **options):
        self.now_s = 0.0
        self.hardware = FakeHardware(**options)
        self.servo = Servo(self.hardware, limits, tick_s=TICK_S, clock_s=lambda: self.now_s)
        self.period_s = 1 / self.hardware.rate_hz

    def go(self, change_6: np.ndarray, opening: float = 1.0) -> None:
        self.servo.go(change_6, opening, self.now_s + EXPIRES_TICKS * TICK_S)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / self.period_s)):
            self.servo.step()
            self.now_s += self.period_s

    def follow(self, change_6: np.ndarray, ticks: int) -> None:
        for _ in range(ticks):
            self.go(change_6)
            self.run(TICK_S)

    def settle(self) -> None:
        """Vouches for the goal until it is reached."""
        self.follow(0 * X, ticks=2 * SMOOTHING_TICKS)

    @property
    def moved_6(self) -> np.ndarray:
        return HOME.change_to(self.hardware.pose)

    @property
    def speeds(self) -> np.ndarray:
        """m/s between one set point and the next."""
        path = np.array([HOME.position_m, *(pose.position_m for pose in self.hardware.set_points)])
        return np.linalg.norm(np.diff(path, axis=0), axis=1) / self.period_s


@pytest.fixture
def ring() -> Ring:
    return Ring()


@pytest.mark.parametrize("axis", range(6), ids=["x", "y", "z", "about x", "about y", "about z"])
@pytest.mark.parametrize(("metres", "radians"), [(0.001, np.radians(0.5)), (0.01, 0.05)])
def test_a_goal_is_reached_exactly_and_along_the_axis_it_names(ring, axis, metres, radians):
    change_6 = np.zeros(6)
    change_6[axis] = metres if axis < 3 else radians
    ring.go(change_6)
    ring.settle()
    np.testing.assert_allclose(ring.moved_6, change_6, atol=1e-6)


def test_goals_add_up(ring):
    ring.follow(0.005 * X, ticks=10)
    ring.settle()
    np.testing.assert_allclose(ring.moved_6, 0.05 * X, atol=1e-6)


def test_turns_add_up_beyond_half_a_turn():
    ring = Ring(MotionLimits(speed_rad_s=3.0))
    ring.follow(np.array([0, 0, 0, 0, 0, 0.1]), ticks=40)
    ring.settle()
    np.testing.assert_allclose(ring.moved_6, [0, 0, 0, 0, 0, 4.0 - 2 * np.pi], atol=1e-6)


def test_goals_that_keep_coming_blend_into_even_motion(ring):
    """10 mm a tick at 20 Hz is 0.2 m/s: between ticks the speed stays within a tenth of it, where one stop and go would
    halve it."""
    ring.follow(0.01 * X, ticks=20)
    cruising = ring.speeds[40:]
    np.testing.assert_allclose(cruising, 0.2, rtol=0.1)


def test_the_arm_lags_by_less_than_the_smoothing(ring):
    ring.follow(0.01 * X, ticks=20)
    assert 0.2 - ring.moved_6[0] < 0.01 * SMOOTHING_TICKS


def test_no_goal_makes_it_exceed_its_limits(ring):
    ring.follow(0.03 * X, ticks=10)
    ring.follow(-0.03 * X, ticks=10)
    speeds = np.array([twist[0] for twist in ring.hardware.twists])
    assert np.abs(speeds).max() <= 0.25 + 1e-9
    assert np.abs(np.diff(speeds)).max() / ring.period_s <= 5.0 + 1e-6


@pytest.mark.parametrize("rate_hz", [50, 100, 125, 250])
def test_a_goal_however_near_or_overdue_can_be_planned_for(rate_hz):
    """Two seconds of small random goals at 20 Hz, two of rest, 40 times."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        set_point, goal, due_s = SetPoint(HOME, 1 / rate_hz, MotionLimits()), HOME, 0.0
        for step in range(4 * rate_hz):
            if step < 2 * rate_hz and step % (rate_hz // 20) == 0:
                goal = goal.moved(rng.integers(0, 2, 6) * rng.uniform(-1, 1, 6) * np.repeat([0.003, 0.02], 3))
                due_s = step / rate_hz + SMOOTHING_TICKS * TICK_S
            set_point.towards(goal, due_s - step / rate_hz)
        np.testing.assert_allclose(set_point.pose.change_to(goal), np.zeros(6), atol=1e-6)


def test_a_hold_is_at_rest_within_two_ticks_and_stays(ring):
    ring.follow(0.01 * X, ticks=10)
    ring.servo.hold()
    ring.run(2 * TICK_S)
    assert not ring.servo.status.moving
    resting = ring.hardware.pose
    ring.run(1.0)
    np.testing.assert_array_equal(ring.hardware.pose.position_m, resting.position_m)


def test_silence_is_a_hold_and_says_so(ring):
    """The dead man: a command is good for two ticks."""
    ring.follow(0.01 * X, ticks=10)
    ring.run(EXPIRES_TICKS * TICK_S)
    assert "no word from the client: its last command expired" in ring.servo.status.trouble
    assert not ring.servo.status.moving


def test_in_trouble_no_goal_is_followed_before_a_hold_answers_it(ring):
    ring.follow(0.01 * X, ticks=4)
    ring.run(0.5)
    resting = ring.hardware.pose
    ring.follow(0.01 * X, ticks=4)
    np.testing.assert_array_equal(ring.hardware.pose.position_m, resting.position_m)
    ring.servo.hold(ring.servo.status.trouble)
    ring.follow(0.01 * X, ticks=4)
    assert ring.hardware.pose.position_m[0] > resting.position_m[0] + 0.02


def test_a_hold_by_one_who_does_not_know_of_the_trouble_does_not_answer_it(ring):
    ring.follow(0.01 * X, ticks=4)
    seen = ring.servo.status
    ring.run(0.5)
    ring.servo.hold(seen.trouble)
    trouble = ring.servo.status.trouble
    assert "no word from the client" in trouble
    ring.servo.hold(trouble)
    assert not ring.servo.status.trouble


def test_a_command_that_comes_too_late_moves_nothing(ring):
    ring.servo.go(0.01 * X, 1.0, ring.now_s - 0.001)
    ring.run(0.2)
    np.testing.assert_allclose(ring.moved_6, 0, atol=1e-12)
    assert "expired" in ring.servo.status.trouble


@pytest.mark.parametrize("at_rest", [True, False])
def test_a_command_that_comes_too_late_grips_nothing_and_takes_no_control(ring, at_rest):
    if not at_rest:
        ring.follow(0.01 * X, ticks=4)
    before = list(ring.hardware.log)
    ring.servo.go(0.01 * X, 0.0, ring.now_s - 0.001)
    assert ring.hardware.log == before and "no word from the client" in ring.servo.status.trouble
    ring.run(2 * TICK_S)
    assert ring.hardware.opening == 1.0 and not ring.servo.status.moving


def test_a_word_to_go_home_that_comes_too_late_moves_nothing(ring):
    ring.servo.go_home(JOINTS + 0.3, 0.5, 0.0, ring.now_s - 0.001)
    ring.run(TICK_S)
    assert ring.hardware.log == [] and "no word from the client" in ring.servo.status.trouble


def test_a_robot_that_is_held_up_is_not_pushed_on():
    ring = Ring(MotionLimits(leash_m=0.02))
    ring.hardware.stuck = True
    ring.follow(0.01 * X, ticks=10)
    assert max(np.linalg.norm(HOME.change_to(pose)[:3]) for pose in ring.hardware.set_points) < 0.02 + 0.0026
    assert "behind its set point, limit 0.02 m" in ring.servo.status.trouble
    assert ring.hardware.log[-1] == "stop"


def test_after_being_held_up_it_starts_from_where_the_robot_is():
    ring = Ring(MotionLimits(leash_m=0.02))
    ring.hardware.stuck = True
    ring.follow(0.01 * X, ticks=10)
    ring.hardware.stuck = False
    ring.servo.hold(ring.servo.status.trouble)
    ring.go(0.01 * X)
    ring.settle()
    np.testing.assert_allclose(ring.moved_6, 0.01 * X, atol=1e-6)


def test_a_turn_that_the_robot_does_not_make_does_not_add_up():
    about_z = np.array([0, 0, 0, 0, 0, 0.05])
    ring = Ring(MotionLimits(leash_rad=0.2))
    ring.hardware.stuck = True
    ring.follow(about_z, ticks=20)
    np.testing.assert_allclose(HOME.change_to(ring.servo.status.goal), 4 * about_z, atol=1e-6)
    ring.follow(-about_z, ticks=4)
    np.testing.assert_allclose(HOME.change_to(ring.servo.status.goal), 0 * about_z, atol=1e-6)


def test_a_joint_beyond_its_limits_holds_and_is_named():
    ring = Ring(MotionLimits(joints_low_rad=(-1.0,) * 3, joints_high_rad=(1.0,) * 3))
    ring.hardware.joints_J = ring.hardware._joints_goal_J = np.array([0.0, 1.2, 0.0])
    ring.follow(0.01 * X, ticks=3)
    np.testing.assert_allclose(ring.moved_6, 0, atol=1e-12)
    assert ring.servo.status.trouble == "joint 2 is at 1.200 rad, limits -1 to 1"


def test_a_fault_ends_all_motion_and_is_not_cleared_by_a_command(ring):
    ring.follow(0.01 * X, ticks=4)
    ring.hardware.fault = "protective stop"
    ring.run(TICK_S)
    given = len(ring.hardware.set_points)
    ring.follow(0.01 * X, ticks=4)
    assert len(ring.hardware.set_points) == given and ring.servo.status.reading.fault == "protective stop"
    assert "recover" not in ring.hardware.log


def test_a_fault_stops_what_the_robot_does_by_itself(ring):
    ring.servo.go_home(JOINTS + 3.0, 0.1, 1.0, ring.now_s + 10)
    ring.run(0.1)
    ring.hardware.fault = "the gripper is stuck"
    ring.run(0.1)
    assert ring.hardware.log[-1] == "stop" and ring.hardware.log.count("stop") == 1
    assert not ring.servo.status.moving and ring.servo.status.reading.fault == "the gripper is stuck"


def test_a_person_may_clear_a_fault(ring):
    ring.hardware.fault = "protective stop"
    ring.run(TICK_S)
    ring.servo.recover()
    ring.follow(0.01 * X, ticks=4)
    assert ring.servo.status.reading.fault == "" and ring.moved_6[0] > 0.02


def test_going_home_is_done_when_the_joints_are_there(ring):
    home_J = JOINTS + np.array([0.3, 0.0, -0.2])
    for _ in range(200):
        ring.servo.go_home(home_J, 0.5, 1.0, ring.now_s + EXPIRES_TICKS * TICK_S)
        ring.run(TICK_S)
        if not ring.servo.status.moving:
            break
    np.testing.assert_allclose(ring.hardware.joints_J, home_J, atol=0.01)
    assert ring.hardware.log == ["grip 1", "move_joints", "stop"]


def test_going_home_stops_in_silence_too(ring):
    ring.servo.go_home(JOINTS + 3.0, 0.1, 1.0, ring.now_s + 0.1)
    ring.run(1.0)
    assert ring.hardware.log[-1] == "stop" and "expired" in ring.servo.status.trouble
    assert ring.hardware.joints_J[0] < 0.2


def test_going_home_stops_at_a_hold(ring):
    ring.servo.go_home(JOINTS + 3.0, 0.1, 1.0, ring.now_s + 10)
    ring.run(0.1)
    ring.servo.hold()
    ring.run(0.1)
    assert ring.hardware.log[-1] == "stop" and not ring.servo.status.moving


def test_after_a_recovery_and_after_a_failure_the_gripper_is_told_again():
    hardware = FakeHardware()
    servo = Servo(hardware, MotionLimits(), tick_s=TICK_S, clock_s=lambda: 0.0)
    servo.go(np.zeros(6), 1.0, 1.0)
    servo.recover()
    servo.go(np.zeros(6), 1.0, 1.0)
    assert hardware.log.count("grip 1") == 2
    grip, hardware.grip = hardware.grip, lambda opening: (_ for _ in ()).throw(ArmError("jammed"))
    with pytest.raises(ArmError, match="jammed"):
        servo.go(np.zeros(6), 0.0, 1.0)
    hardware.grip = grip
    servo.go(np.zeros(6), 0.0, 1.0)
    assert hardware.log[-1] == "grip 0"


def test_the_gripper_is_told_only_what_is_new(ring):
    for opening in (1.0, 1.0, 0.0, 0.0, 1.0):
        ring.go(0 * X, opening)
        ring.run(TICK_S)
    assert [entry for entry in ring.hardware.log if entry.startswith("grip")] == ["grip 1", "grip 0", "grip 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed_m_s": 0.0}, "speed_m_s must be above 0 and finite, got 0"),
        ({"leash_m": float("nan")}, "leash_m must be above 0 and finite, got nan"),
        ({"joints_low_rad": (0.0,)}, "joints_low_rad and joints_high_rad must be as many, got 1 and 0"),
        (
            {"joints_low_rad": (1.0, 0.0), "joints_high_rad": (2.0, -1.0)},
            "joints_low_rad must be below joints_high_rad",
        ),
    ],
)
def test_limits_that_limit_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MotionLimits(**options)
