"""A real arm: what the profile says of frames and scales is what the robot does, and what is wrong with it is said."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from robot_client import cameras
from robot_client.arm import STATE_NAMES
from robot_client.camera import Camera
from robot_client.errors import ArmError, BadProfile, RobotError
from robot_client.pose import Pose
from robot_client.profile import Box, Frame, Gripper, Home, Profile, Scale
from robot_client.real_arm import RealArm, RealArmConfig, arm_spec
from robot_client.servo import MotionLimits
from tests.client.fake_camera import FakeSource
from tests.client.fake_hardware import HOME, JOINTS, FakeHardware
from tests.client.test_arms import TASK, ArmLaws

STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


def profile_of(**changes) -> Profile:
    values = {
        "arm": "fake",
        "hardware": {},
        "home": Home(joints_rad=tuple(JOINTS), speed=1.0),
        "workspace": Box(low_m=(0.3, -0.2, 0.1), high_m=(0.7, 0.2, 0.5)),
        "scale": Scale(metres=0.01, radians=0.05),
        "slow_start_s": 0.0,
    }
    return Profile(**{**values, **changes})


def arm_of(*, source: FakeSource | None = None, dry_run: bool = False, **changes) -> RealArm:
    camera = Camera("agentview", source or FakeSource(fps=200.0), max_age_s=0.15, frozen_after=5)
    return RealArm(FakeHardware, profile_of(**changes), {"agentview": camera}, dry_run=dry_run, picture_s=1.0)


@pytest.fixture
def arm():
    arm = arm_of()
    yield arm
    arm.close()


def act(arm: RealArm, action: list[float], ticks: int = 1) -> None:
    """In real time, and then stands still until the arm is there."""
    for action_A in [np.array(action, np.float32)] * ticks + [STILL] * 5:
        arm.apply(action_A)
        time.sleep(0.05)


class TestRealArm(ArmLaws):
    @pytest.fixture
    def arm(self):
        arm = arm_of()
        yield arm
        arm.close()

    def test_observations_are_stamped_with_the_robots_clock_and_never_twice_the_same(self, arm):
        """A frame later, that is: between two frames there is nothing new to see."""
        arm.reset(TASK)
        stamps = []
        for _ in range(3):
            stamps.append(arm.observe().capture_time_ns)
            time.sleep(0.5)
        assert stamps[0] < stamps[1] < stamps[2] <= time.monotonic_ns()

    def test_reset_goes_back_to_the_start(self, arm):
        arm.reset(TASK)
        start = arm.state()
        act(arm, [0, 0, 0, 0, 0, 0, 1])
        arm.reset(TASK)
        np.testing.assert_allclose(arm.state().state_S[8:], start.state_S[8:], atol=0.01)
        assert arm.state().tick == 0


def test_a_move_is_scaled(arm):
    arm.reset(TASK)
    act(arm, [1, 0, -0.5, 0, 0, 0, 1], ticks=2)
    moved_m = arm.state().state_S[:3] - HOME.position_m
    np.testing.assert_allclose(moved_m, [0.02, 0, -0.01], atol=1e-5)


def test_a_policys_axes_are_turned_into_the_robots():
    """The robot's base is turned a quarter to the left and stands at (1, 2, 0) in the policy's world."""
    arm = arm_of(
        frame=Frame(base_m=(1.0, 2.0, 0.0), base_rad=(0, 0, np.pi / 2)),
        workspace=Box(low_m=(-9.0,) * 3, high_m=(9.0,) * 3),
    )
    arm.reset(TASK)
    before_m = arm.state().state_S[:3]
    np.testing.assert_allclose(
        before_m, [1.0 - HOME.position_m[1], 2.0 + HOME.position_m[0], HOME.position_m[2]], atol=1e-5
    )
    act(arm, [1, 0, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(arm.state().state_S[:3] - before_m, [0.01, 0, 0], atol=1e-5)
    robot_m = arm._servo.status().reading.pose.position_m - HOME.position_m
    np.testing.assert_allclose(robot_m, [0, -0.01, 0], atol=1e-5)
    arm.close()


def test_a_turn_is_about_the_policys_axes(arm):
    arm.reset(TASK)
    act(arm, [0, 0, 0, 0, 0, 1, 1])
    turned = HOME.change_to(arm._servo.status().reading.pose)
    np.testing.assert_allclose(turned, [0, 0, 0, 0, 0, 0.05], atol=1e-5)


def test_the_state_has_fingers_and_joints(arm):
    arm.reset(TASK)
    state_S = arm.state().state_S
    np.testing.assert_allclose(state_S[6:8], [0.04, -0.04])
    np.testing.assert_allclose(state_S[8:], JOINTS, atol=0.01)


def test_the_goal_runs_ahead_of_the_arm(arm):
    arm.reset(TASK)
    arm.apply(np.array([1, 0, 0, 0, 0, 0, 1], np.float32))
    state = arm.state()
    assert state.goal_m[0] == pytest.approx(HOME.position_m[0] + 0.01, abs=1e-6) and state.state_S[0] < state.goal_m[0]


@pytest.mark.parametrize(
    ("asked", "before", "decided"),
    [(0.9, 0.0, 1.0), (0.1, 1.0, 0.0), (0.55, 0.0, 0.0), (0.45, 1.0, 1.0), (0.65, 0.0, 1.0)],
)
def test_a_binary_gripper_changes_only_well_past_the_middle(asked, before, decided):
    assert Gripper().decided(asked, before=before) == decided


@pytest.mark.parametrize(
    ("gripper", "asked", "sent", "opening"),
    [
        (Gripper(), [0.3, 0.55, 0.8, 0.45], [0, 0, 1, 1], [0, 0, 1, 1]),
        (Gripper(low=0.55, high=0.8), [0.3, 0.55, 0.8, 0.45], [0, 0, 1, 1], [0.55, 0.55, 0.8, 0.8]),
        (Gripper(binary=False, low=0.2), [0.3, 0.55, 0.8], [0.3, 0.55, 0.8], [0.3, 0.55, 0.8]),
    ],
    ids=["binary", "binary within a range", "any opening"],
)
def test_what_the_gripper_was_told_is_what_apply_says_in_the_policys_terms(gripper, asked, sent, opening):
    arm = arm_of(gripper=gripper)
    arm.reset(TASK)
    time.sleep(0.05)
    assert arm.state().state_S[6] == pytest.approx(gripper.high * gripper.finger_m)
    told = []
    for one, other in zip(asked, sent, strict=True):
        np.testing.assert_allclose(arm.apply(np.array([0, 0, 0, 0, 0, 0, one], np.float32)), [0] * 6 + [other])
        np.testing.assert_allclose(arm.hold(), [0] * 6 + [other])
        time.sleep(0.05)
        told.append(arm.state().state_S[6] / gripper.finger_m)
    np.testing.assert_allclose(told, opening, rtol=1e-6)
    arm.close()


@pytest.mark.parametrize(("binary", "limits"), [(True, (0, 1)), (False, (0.2, 0.8))])
def test_a_gripper_that_only_opens_and_closes_is_not_clipped_to_where_it_does_so(binary, limits):
    profile = profile_of(gripper=Gripper(binary=binary, low=0.2, high=0.8), home=Home(joints_rad=(0.0,), opening=0.5))
    assert (arm_spec(profile, ()).limits.low[6], arm_spec(profile, ()).limits.high[6]) == limits


def test_what_a_servo_in_trouble_did_not_take_was_not_sent(arm):
    arm.reset(TASK)
    forward = np.array([1, 0, 0, 0, 0, 0, 0], np.float32)
    np.testing.assert_array_equal(arm.apply(forward), forward)
    time.sleep(0.3)  # the command expires
    assert arm.apply(forward) is None and arm.state().tick == 1
    assert "no word from the client" in arm.state().trouble
    arm.hold()
    np.testing.assert_array_equal(arm.apply(forward), forward)


def test_a_camera_in_trouble_makes_the_arm_blind_and_it_passes():
    source = FakeSource(fps=200.0)
    arm = arm_of(source=source)
    arm.reset(TASK)
    assert arm.state().blind == ""
    source.frozen = True
    time.sleep(0.1)
    assert arm.state().blind.startswith("camera agentview: frozen") and arm.state().trouble == ""
    source.frozen = False
    time.sleep(0.1)
    assert arm.state().blind == ""
    arm.close()


def test_an_arm_without_a_picture_does_not_start():
    source = FakeSource(fps=200.0)
    arm = arm_of(source=source)
    source.stalled = True
    time.sleep(0.3)
    with pytest.raises(ArmError, match=r"no usable picture in 1 s: camera agentview: "):
        arm.reset(TASK)
    source.stalled = False
    arm.close()


def test_a_fault_is_an_error_until_a_person_clears_it(tmp_path):
    file = tmp_path / "fault"
    arm = arm_of(hardware={"fault_file": str(file)})
    arm.reset(TASK)
    file.write_text("protective stop")
    time.sleep(0.05)
    for _ in range(2):
        with pytest.raises(ArmError, match="fake: protective stop"):
            arm.apply(STILL)
        with pytest.raises(ArmError, match="fake: protective stop"):
            arm.reset(TASK)
    arm.recover()
    arm.reset(TASK)
    np.testing.assert_array_equal(arm.apply(STILL), STILL)
    arm.close()


def test_a_person_stops_it_on_its_way_home():
    arm = arm_of(home=Home(joints_rad=(3.0, 3.0, 3.0), speed=0.01, patience_s=20))
    wishes = iter(["", "", "space was pressed"])
    arm.stopped = lambda: next(wishes)
    with pytest.raises(ArmError, match="on the way home: space was pressed"):
        arm.reset(TASK)
    before_J = arm.state().state_S[len(STATE_NAMES) :]
    time.sleep(0.1)
    np.testing.assert_array_equal(arm.state().state_S[len(STATE_NAMES) :], before_J)
    arm.close()


def test_a_word_that_came_too_late_on_the_way_home_is_followed_by_the_next(monkeypatch):
    home_J = JOINTS + 0.1
    arm = arm_of(home=Home(joints_rad=tuple(home_J), speed=1.0))
    late_s = iter([1.0])
    expiry = property(lambda _: time.monotonic() + 0.5 - next(late_s, 0.0))
    monkeypatch.setattr(RealArm, "_expires_s", expiry)
    arm.reset(TASK)
    np.testing.assert_allclose(arm.state().state_S[len(STATE_NAMES) :], home_J, atol=0.01)
    arm.close()


def test_a_home_that_is_never_reached_is_an_error():
    arm = arm_of(home=Home(joints_rad=(3.0, 3.0, 3.0), speed=0.01, patience_s=0.2))
    with pytest.raises(ArmError, match=r"the robot has not come home in 0\.2 s"):
        arm.reset(TASK)
    arm.close()


def test_a_home_for_another_robot_is_refused():
    with pytest.raises(BadProfile, match=r"home\.joints_rad must have 3 angles, got 7"):
        arm_of(home=Home(joints_rad=(0.0,) * 7))


def test_limits_for_another_robot_are_refused():
    with pytest.raises(BadProfile, match=r"motion\.joints_low_rad must have 3 angles, got 2"):
        arm_of(motion=MotionLimits(joints_low_rad=(-1.0, -1.0), joints_high_rad=(1.0, 1.0)))


LAB = """
arm = "fake"
[hardware]
{hardware}
[home]
joints_rad = [0.0, -0.5, 0.5]
[workspace]
low_m = [0.3, -0.2, 0.1]
high_m = [0.7, 0.2, 0.5]
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Opens an arm as the command line does; returns what became of its cameras' sources when it was refused."""

    def refused(match: str, *described: str, hardware: str = "") -> list[list[str]]:
        profile = tmp_path / "lab.toml"
        profile.write_text(LAB.format(hardware=hardware))
        sources: list[FakeSource] = []

        def make(*, device: str = "") -> FakeSource:
            sources.append(FakeSource())
            sources[-1].unplugged = device == "unplugged"
            return sources[-1]

        monkeypatch.setattr(cameras, "load", lambda _: make)
        with pytest.raises(RobotError, match=match):
            RealArm.of("fake", FakeHardware, RealArmConfig(profile=profile, camera=described))
        return [source.log for source in sources]

    return refused


def test_an_arm_that_cannot_be_opened_lets_go_of_the_cameras_that_could(lab):
    assert lab("no route", "left=fake", "right=fake", hardware='refuse = "no route"') == [["open", "close"]] * 2
    assert lab("nothing is plugged in", "left=fake", "right=fake:unplugged") == [["open", "close"]] * 2


def test_two_cameras_of_one_name_are_refused_before_either_is_opened(lab):
    assert lab("each --camera must have a name of its own, got", "front=fake", "front=fake:1") == []


def test_a_dry_run_reads_everything_and_moves_nothing():
    arm = arm_of(dry_run=True)
    arm.reset(TASK)
    sent_A = arm.apply(np.array([1, 0, 0, 0, 0, 0, 0], np.float32))
    time.sleep(0.2)
    np.testing.assert_array_equal(sent_A, STILL)
    np.testing.assert_array_equal(arm.state().state_S[:3], HOME.position_m.astype(np.float32))
    assert arm.observe().images["agentview"].any()
    arm.close()


def test_a_gripper_that_points_down_reads_as_in_the_simulator_on_both_sides_of_pi():
    """robosuite's quat2axisangle goes through pi; MuJoCo's quaternions keep their sign on the way."""
    arm = arm_of()
    hardware_turn = partial(np.multiply, [1.0, 1e-3, 0.0])
    arm.reset(TASK)
    status, told = arm._read(), []
    for angle in [*np.linspace(2.9, 3.4, 21), *np.linspace(3.4, 2.9, 21)]:
        reading = replace(status.reading, pose=Pose.of((0.5, 0.0, 0.3), hardware_turn(angle)))
        told.append(arm._state_S(replace(status, reading=reading))[3:6])
    arm.close()
    np.testing.assert_allclose([turn[0] for turn in told][:21], np.linspace(2.9, 3.4, 21), atol=1e-5)
    assert np.abs(np.diff(told, axis=0)).max() < 0.03
