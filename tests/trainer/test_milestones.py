"""Milestones: both rules on episodes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos.episode_file import read_episode
from rl_trainer.demonstrations import BadDemonstration, demonstration_from_episode
from rl_trainer.milestones import MilestoneConfig, Motion, keyframes, labelled, motion_of
from tests.trainer.fake_demonstrations import actions, write_episode

KEYFRAMES = MilestoneConfig(rule="keyframes", lead_s=0.25)
WINDOW = MilestoneConfig(rule="window")
FAST, STILL = 0.05, 0.001
"""m between two frames a quarter of a second apart: 0.2 and 0.004 m/s"""


def path_of(steps_m: list[float], openness_m: list[float], *, stride: int = 5) -> Motion:
    """A hand that goes along x, so far on the way to each frame; 20 ticks a second."""
    x_D = np.cumsum(steps_m)
    return Motion(
        tick_D=np.arange(len(steps_m)) * stride,
        position_D3=np.stack([x_D, 0 * x_D, 0 * x_D], 1),
        openness_D=np.array(openness_m),
        command_T=np.ones(len(steps_m) * stride),
        tick_rate_hz=20.0,
    )


def commanded(ticks: int, closed: slice, *, stride: int) -> Motion:
    """The gripper is told to close in this span of ticks."""
    command_T = np.ones(ticks)
    command_T[closed] = 0
    frames = np.arange(0, ticks, stride)
    return Motion(
        tick_D=frames,
        position_D3=np.zeros((len(frames), 3)),
        openness_D=np.zeros(len(frames)),
        command_T=command_T,
        tick_rate_hz=20.0,
    )


def positive_ticks(motion: Motion, config: MilestoneConfig) -> list[int]:
    rows, target = labelled(motion, config)
    assert set(target) <= {0.0, 1.0}
    return motion.tick_D[rows][target == 1].tolist()


# A reach, a grasp, a carry: still at the start, at rest in frame 3 while the fingers close until frame 4, then away.
GRASP = path_of(
    [0, FAST, FAST, STILL, STILL, STILL, FAST, FAST, FAST], [0.08, 0.08, 0.08, 0.08, 0.04, 0.04, 0.04, 0.04, 0.04]
)


def test_keyframes_are_where_a_hand_that_moved_in_its_segment_has_come_to_rest_and_the_end() -> None:
    assert np.flatnonzero(keyframes(GRASP, KEYFRAMES)).tolist() == [3, 4, 8]


def test_a_hand_that_rests_before_it_ever_moved_is_at_no_milestone() -> None:
    waiting = path_of([0, STILL, STILL, FAST, FAST], [0.08] * 5)
    assert np.flatnonzero(keyframes(waiting, KEYFRAMES)).tolist() == [4]


def test_the_frames_that_lead_to_a_keyframe_are_positive_as_long_before_it_as_asked() -> None:
    assert positive_ticks(GRASP, KEYFRAMES) == [10, 15, 20, 35, 40]
    assert positive_ticks(GRASP, replace(KEYFRAMES, lead_s=0.5)) == [5, 10, 15, 20, 30, 35, 40]
    assert positive_ticks(GRASP, replace(KEYFRAMES, lead_s=0.0)) == [15, 20, 40]


def test_what_leads_to_a_keyframe_does_not_reach_into_the_segment_before_it() -> None:
    # The fingers come to rest in frame 2, the hand in frame 3.
    motion = path_of([0, FAST, FAST, FAST, STILL, FAST, FAST], [0.08, 0.08, 0.04, 0.04, 0.04, 0.04, 0.04])
    assert positive_ticks(motion, replace(KEYFRAMES, lead_s=1.0)) == [15, 20, 25, 30]


def test_speeds_are_in_metres_a_second_whatever_the_stride() -> None:
    slow = path_of([0, FAST, FAST, 0.02, FAST], [0.08] * 5)  # 0.08 m/s in frame 3
    assert not keyframes(slow, KEYFRAMES)[3]
    assert keyframes(path_of([0, FAST, FAST, 0.02, FAST], [0.08] * 5, stride=10), KEYFRAMES)[3]  # 0.04 m/s


def test_progress_grows_from_0_to_1_as_much_in_every_segment() -> None:
    # The fingers come to rest in frame 4 of 9: what is before it and what is after it count alike.
    rows, target = labelled(GRASP, MilestoneConfig(rule="progress"))
    assert rows.tolist() == list(range(9))
    np.testing.assert_allclose(target, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1])
    early = path_of([0, FAST, FAST, FAST, FAST], [0.08, 0.04, 0.04, 0.04, 0.04])  # at rest in frame 1
    np.testing.assert_allclose(labelled(early, MilestoneConfig(rule="progress"))[1], [0, 3 / 6, 4 / 6, 5 / 6, 1])


def test_with_a_frame_every_tick_the_window_rule_is_the_published_one() -> None:
    motion = commanded(60, slice(20, 40), stride=1)
    # closes at 20: 31 +- 2 of every 5th frame; opens at 40: 40 +- 2; the last ten are 50 to 59
    assert positive_ticks(motion, WINDOW) == [30, 40, 50, 55]
    assert len(labelled(motion, WINDOW)[0]) == 12


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("closed", [17, 18, 19, 20, 21])
def test_at_any_stride_a_frame_shows_the_gripper_closing_and_one_shows_it_opening(stride: int, closed: int) -> None:
    ticks = positive_ticks(commanded(100, slice(closed, 60), stride=stride), WINDOW)
    assert any(abs(tick - closed - 11) <= 4 for tick in ticks)
    assert any(abs(tick - 60) <= 4 for tick in ticks)
    assert all(min(abs(t - closed - 11), abs(t - 60)) <= 4 or t >= 90 for t in ticks)


def test_a_gripper_that_is_never_told_anything_else_leaves_only_the_end() -> None:
    assert positive_ticks(commanded(40, slice(0, 0), stride=4), WINDOW) == [32, 36]


def test_an_episode_is_read_in_its_own_ticks_and_with_what_was_executed(tmp_path: Path) -> None:
    labels_TA = actions(12)
    episode = read_episode(write_episode(tmp_path, "one", labels_TA, stride=4))
    seen = demonstration_from_episode(episode, "agentview")
    motion = motion_of(episode, seen)
    np.testing.assert_array_equal(motion.tick_D, [0, 4, 8])
    np.testing.assert_allclose(motion.command_T, labels_TA[:, -1] + 0.01)  # the label differs from what was executed
    np.testing.assert_allclose(motion.position_D3, seen.state_DS[:, :3])
    np.testing.assert_allclose(motion.openness_D, seen.state_DS[:, 6] - seen.state_DS[:, 7], rtol=1e-6)
    with pytest.raises(BadDemonstration, match="eef_x"):
        motion_of(episode, replace(seen, state_names=()))


def test_thresholds_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="still_m_s must be above 0, got 0"):
        MilestoneConfig(still_m_s=0)
    with pytest.raises(ValueError, match="candidate_ticks must be >= 1, got 0"):
        MilestoneConfig(candidate_ticks=0)
