"""Rewards of trajectories with a reward model, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from policy_server.vla.preprocessing import Prepared
from rl_trainer.reward_model import RECORD
from rl_trainer.shaping import ShapingConfig, shaped_rewards
from rl_trainer.trajectories import Trajectory

GAMMA = 0.9
POTENTIAL, PAPER = ShapingConfig(), ShapingConfig(rule="paper")


class Brightness:
    """A reward model that reads the progress off the first pixel, in per cent."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def predict(self, observations: Sequence[Prepared]) -> np.ndarray:
        self.asked.append(len(observations))
        return np.array([observation.image[0, 0, 0] / 100 for observation in observations])


def showing(per_cent: int) -> Prepared:
    return Prepared(image=np.full((2, 2, 3), per_cent, np.uint8), input_ids=np.array([1]), state=None)


def trajectory(
    progress: Sequence[int], ticks: Sequence[int] = (), *, success: bool = False, after: int | None = None
) -> Trajectory:
    """after: progress of the observation it was cut before; None when the task ended."""
    rewards_T = np.zeros(len(progress))
    rewards_T[-1] = success
    tokens = np.zeros((len(progress), 2))
    return Trajectory(
        episode_id="e",
        task="t",
        initial_state="0",
        success=success,
        whole=True,
        observations=tuple(showing(one) for one in progress),
        after=None if after is None else showing(after),
        token_ids_TN=tokens.astype(np.int64),
        logprobs_TN=tokens.astype(np.float32),
        mask_TN=tokens == 0,
        temperature_T=np.ones(len(progress), np.float32),
        version_T=np.ones(len(progress), np.int64),
        ticks_T=np.array(ticks or [1] * len(progress)),
        rewards_T=rewards_T,
    )


def discounted(rewards_T: np.ndarray, ticks_T: np.ndarray) -> float:
    return float((GAMMA ** np.append(0, np.cumsum(ticks_T[:-1])) * rewards_T).sum())


def test_shaping_pays_the_discounted_gain_in_progress_and_nothing_is_left_where_the_task_ended() -> None:
    [rewards_T] = shaped_rewards(
        [trajectory([20, 70, 50], (1, 2, 1), success=True)], Brightness(), POTENTIAL, gamma=0.9
    )
    np.testing.assert_allclose(rewards_T, [0.9 * 0.7 - 0.2, 0.81 * 0.5 - 0.7, 1 - 0.5])


def test_a_trajectory_that_was_cut_keeps_the_progress_it_was_cut_at() -> None:
    [rewards_T] = shaped_rewards([trajectory([20, 70], (1, 2), after=60)], Brightness(), POTENTIAL, gamma=0.9)
    np.testing.assert_allclose(rewards_T, [0.9 * 0.7 - 0.2, 0.81 * 0.6 - 0.7])


def test_shaping_takes_the_same_from_every_way_to_an_end_so_that_returns_keep_their_ranking() -> None:
    rng = np.random.default_rng(0)
    ways = [
        trajectory([30, *rng.integers(0, 100, 4)], rng.integers(1, 5, 5).tolist(), success=bool(number % 2))
        for number in range(12)
    ]
    shaped = shaped_rewards(ways, Brightness(), ShapingConfig(weight=3.0), gamma=GAMMA)
    plain = np.array([discounted(way.rewards_T, way.ticks_T) for way in ways])
    with_shaping = np.array([discounted(r_T, way.ticks_T) for r_T, way in zip(shaped, ways, strict=True)])
    np.testing.assert_allclose(with_shaping, plain - 3 * 0.3)
    assert (rankdata(with_shaping.round(9)) == rankdata(plain.round(9))).all()


def test_progress_alone_is_kept_where_the_task_ended_or_every_way_would_pay_the_same() -> None:
    ways = [trajectory([20, 70], (1, 2), success=True), trajectory([20, 40]), trajectory([20, 40], after=30)]
    far, near, cut = shaped_rewards(ways, Brightness(), POTENTIAL, gamma=0.9, outcome=False)
    np.testing.assert_allclose(far, [0.9 * 0.7 - 0.2, 0.81 * 0.7 - 0.7])
    np.testing.assert_allclose(near, [0.9 * 0.4 - 0.2, 0.9 * 0.4 - 0.4])
    np.testing.assert_allclose(cut, [0.9 * 0.4 - 0.2, 0.9 * 0.3 - 0.4])
    assert discounted(far, ways[0].ticks_T) > discounted(near, ways[1].ticks_T)


def test_the_paper_pays_every_decision_that_is_thought_a_milestone_which_can_be_worth_more_than_success() -> None:
    ways = [trajectory([20, 90], success=True), trajectory([80, 90, 70], after=80)]
    finished, dwelling = shaped_rewards(ways, Brightness(), PAPER, gamma=GAMMA)
    assert finished.tolist() == [0, 2] and dwelling.tolist() == [1, 1, 1]
    [weighted, _] = shaped_rewards(ways, Brightness(), ShapingConfig(rule="paper", weight=0.1), gamma=GAMMA)
    np.testing.assert_allclose(weighted, [0, 1.1])


def test_without_a_model_or_a_rule_the_outcome_alone_is_paid() -> None:
    ways = [trajectory([20, 90], success=True)]
    assert shaped_rewards(ways, None, POTENTIAL, gamma=GAMMA)[0].tolist() == [0, 1]
    assert shaped_rewards(ways, Brightness(), ShapingConfig(rule="none"), gamma=GAMMA)[0].tolist() == [0, 1]


def test_the_model_is_asked_once_for_all_trajectories_and_each_gets_its_own() -> None:
    model, ways = Brightness(), [trajectory([10, 20], after=30), trajectory([40]), trajectory([50, 60], after=70)]
    together = shaped_rewards(ways, model, POTENTIAL, gamma=GAMMA)
    assert model.asked == [3 + 1 + 3]
    for way, rewards_T in zip(ways, together, strict=True):
        np.testing.assert_allclose(rewards_T, shaped_rewards([way], model, POTENTIAL, gamma=GAMMA)[0])


def test_a_sum_of_milestones_wants_a_model_of_milestones(tmp_path: Path) -> None:
    for labels in ("progress", "window"):
        (tmp_path / labels).mkdir()
        (tmp_path / labels / RECORD).write_text(json.dumps({"config": {"milestones": {"rule": labels}}}))
    with pytest.raises(ValueError, match="wants a reward model of the labels keyframes or window, got one of progress"):
        ShapingConfig(rule="paper").check_labels(tmp_path / "progress")
    ShapingConfig(rule="paper").check_labels(tmp_path / "window")
    ShapingConfig().check_labels(tmp_path / "progress")


def test_no_shaping_wants_no_model() -> None:
    ShapingConfig(rule="none").require_model(None)


def test_a_weight_that_adds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="weight must be above 0, got 0"):
        ShapingConfig(weight=0)
