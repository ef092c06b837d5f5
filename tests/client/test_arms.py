"""What every arm promises, and what the two of the base install add."""

from __future__ import annotations

import platform
import sys
import time

import numpy as np
import pytest

from protos import episode_pb2
from protos.codec import encode_image, encode_tensor
from protos.episode_file import EpisodeWriter
from robot_client import arms
from robot_client.arm import ACTION_NAMES, STATE_NAMES, Arm, Task
from robot_client.arms.kinematic import HOME_M, METRES_PER_UNIT, KinematicArm
from robot_client.arms.replay import ReplayArm
from robot_client.errors import ArmError, UnknownArm
from tests.client.fake_arm import FakeArm

TASK = Task(name="task", instruction="pick up the bowl")


@pytest.fixture
def recording(tmp_path):
    """Two decisions; the first three ticks follow decision 0, one holds, two follow decision 1."""
    start = episode_pb2.EpisodeStart(episode_id="e", tick_rate_hz=20, state_names=STATE_NAMES)
    writer = EpisodeWriter(tmp_path / "recorded.episode", start)
    for d in range(2):
        observation = episode_pb2.Observation(
            images={"agentview": encode_image(np.full((8, 8, 3), 100 * d, np.uint8))},
            state=encode_tensor(np.full(8, d, np.float32)),
            instruction="put it down",
        )
        writer.decision(episode_pb2.Decision(decision=d, observation=observation))
        action, policy = [0.1 * (d + 1)] * 6 + [1.0], episode_pb2.SOURCE_POLICY
        indices = range(3) if d == 0 else range(2)
        ticks = [episode_pb2.Tick(decision=d, index=k, action=action, source=policy) for k in indices]
        if d == 0:
            ticks.append(episode_pb2.Tick(index=3, action=[0.0] * 6 + [1.0], source=episode_pb2.SOURCE_HOLD))
        writer.executed(ticks)
    writer.finish(episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_SUCCESS, terminal=True))
    return tmp_path / "recorded.episode"


class ArmLaws:
    """Subclassed by each make."""

    @pytest.fixture
    def arm(self) -> Arm:
        raise NotImplementedError

    def test_state_and_observation_are_as_wide_as_the_spec_says(self, arm):
        arm.reset(TASK)
        assert arm.state().state_S.shape == (len(arm.spec.state_names),)
        assert arm.state().state_S.dtype == np.float32
        observation = arm.observe()
        np.testing.assert_array_equal(observation.state_S, arm.state().state_S)
        assert sorted(observation.images) == sorted(arm.spec.image_names)
        for image in observation.images.values():
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3

    def test_observations_are_stamped_with_the_robots_clock_and_never_twice_the_same(self, arm):
        arm.reset(TASK)
        before = time.monotonic_ns()
        stamps = [arm.observe().capture_time_ns for _ in range(3)]
        assert before <= stamps[0] < stamps[1] < stamps[2] <= time.monotonic_ns()

    def test_limits_have_a_bound_for_every_action(self, arm):
        assert len(arm.spec.limits.low) == len(arm.spec.action_names)

    def test_apply_says_what_was_sent_and_counts_a_tick(self, arm):
        arm.reset(TASK)
        action_A = np.zeros(len(arm.spec.action_names), np.float32)
        np.testing.assert_array_equal(arm.apply(action_A), action_A)
        assert arm.state().tick == 1

    def test_a_hold_does_not_move_and_says_what_it_amounts_to(self, arm):
        arm.reset(TASK)
        before = arm.state().state_S
        held_A = arm.hold()
        assert held_A.shape == (len(arm.spec.action_names),) and not held_A[:6].any()
        np.testing.assert_array_equal(arm.state().state_S, before)

    def test_reset_goes_back_to_the_start(self, arm):
        arm.reset(TASK)
        start = arm.state()
        arm.apply(np.full(len(arm.spec.action_names), 0.5, np.float32))
        arm.reset(TASK)
        np.testing.assert_array_equal(arm.state().state_S, start.state_S)
        assert arm.state().tick == 0


class TestFakeArm(ArmLaws):
    @pytest.fixture
    def arm(self):
        return FakeArm()


class TestKinematicArm(ArmLaws):
    @pytest.fixture
    def arm(self):
        return KinematicArm(size=64)

    def test_a_delta_moves_the_gripper_by_its_scale(self, arm):
        arm.apply(np.array([1, -0.5, 0, 0, 0, 0, 1], np.float32))
        moved_m = arm.state().state_S[:3] - HOME_M
        np.testing.assert_allclose(moved_m, [METRES_PER_UNIT, -METRES_PER_UNIT / 2, 0], atol=1e-6)

    def test_fingers_close_and_open_over_several_ticks(self, arm):
        widths = []
        for gripper in [0] * 5 + [1] * 5:
            arm.apply(np.array([0, 0, 0, 0, 0, 0, gripper], np.float32))
            widths.append(round(float(arm.state().state_S[6]), 3))
        assert widths == [0.03, 0.02, 0.01, 0.0, 0.0, 0.01, 0.02, 0.03, 0.04, 0.04]

    def test_the_image_shows_that_it_moved(self, arm):
        before = arm.observe().images["agentview"]
        arm.apply(np.array([0, 1, 0, 0, 0, 0, 1], np.float32))
        assert (arm.observe().images["agentview"] != before).any()

    def test_every_place_of_the_workspace_can_be_drawn(self, arm):
        for delta in np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T:
            arm.reset(TASK)
            for _ in range(12):
                arm.apply(np.array([*delta, 0, 0, 0, 0], np.float32))
            assert arm.observe().images["agentview"].shape == (64, 64, 3)


class TestReplayArm(ArmLaws):
    @pytest.fixture
    def arm(self, recording):
        return ReplayArm(path=recording)

    def test_each_observation_is_shown_from_the_tick_on_at_which_it_was_taken(self, arm):
        shown = []
        for _ in range(6):
            shown.append(int(arm.observe().images["agentview"][0, 0, 0]))
            arm.apply(np.zeros(7, np.float32))
        assert shown == [0, 0, 0, 0, 100, 100]

    def test_it_ends_with_the_recording(self, arm):
        for _ in range(6):
            assert arm.state().outcome is None
            arm.apply(np.zeros(7, np.float32))
        assert arm.state().outcome == "success"

    def test_it_measures_how_far_answers_are_from_what_was_done(self, arm):
        for _ in range(6):
            arm.apply(np.array([0.1] * 6 + [1.0], np.float32))
        deviation = arm.deviation()
        # Off by nothing at three ticks, by 0.1 at the hold and at the two of decision 1.
        np.testing.assert_allclose(deviation.mean_A, [0.05] * 6 + [0], atol=1e-6)
        np.testing.assert_allclose(deviation.max_A, [0.1] * 6 + [0], atol=1e-6)
        assert str(deviation).startswith("distance from the recorded actions over 6 ticks, mean (max): x 0.05 (0.1), ")

    def test_the_recordings_own_instruction_is_used(self, arm):
        arm.reset(TASK)
        assert arm.observe().instruction == "put it down"


def test_a_damaged_recording_is_refused_by_name(recording):
    recording.write_bytes(recording.read_bytes()[:-20])
    with pytest.raises(ArmError, match=r"cannot replay .*recorded\.episode: .*checksum"):
        ReplayArm(path=recording)


def test_arms_are_found_by_name():
    assert {"kinematic", "replay"} <= set(arms.available())
    assert arms.load("kinematic") is KinematicArm


def test_an_unknown_arm_is_refused_with_those_there_are():
    with pytest.raises(UnknownArm, match=r"must be one of \[.*'kinematic'.*'replay'.*\], got 'hexapod'"):
        arms.load("hexapod")


def test_the_names_everyone_relies_on():
    assert len(ACTION_NAMES) == 7 and ACTION_NAMES[-1] == "gripper"
    assert len(STATE_NAMES) == 8 and STATE_NAMES[:3] == ("eef_x", "eef_y", "eef_z")


def test_an_arm_whose_package_is_not_made_for_every_python_says_for_which(monkeypatch):
    """Its extra installs nothing on a newer one."""
    monkeypatch.delitem(sys.modules, "robot_client.arms.ur", raising=False)
    monkeypatch.setitem(sys.modules, "dashboard_client", None)
    with pytest.raises(UnknownArm, match=rf"ur_rtde is for Python 3\.12 or older, this is {platform.python_version()}"):
        arms.load("ur")
