"""Rewards of trajectories: the outcomes of their episodes, with what a reward model sees in between.

    potential   r + gamma^k Phi(s') - Phi(s), Phi = weight * predicted progress; 0 where the task ended, Phi of the
                observation that a truncated trajectory was cut before.  The best policy stays what it was.  Give it
                a model of the labels `progress` (milestones.py): one of milestones rises and falls along the way.
    paper       r + weight for every decision whose observation is thought a milestone: VLA-RL's plain sum, for a model
                of the labels `keyframes` or `window`.  A policy may earn more by dwelling at milestones than by
                finishing, hence the alarm (reward_alarm.py).
    none        r

Shapes: T decisions of one trajectory, n observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rl_trainer.advantage import plain_sum, potential_shaping
from rl_trainer.reward_model import RewardModel, labels_of
from rl_trainer.trajectories import Trajectory


@dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    """What a reward model adds to success, which is worth 1."""

    rule: Literal["potential", "paper", "none"] = "potential"
    weight: float = 1.0
    """of progress beside success; the paper gives none"""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight}; rule none adds nothing")

    def require_model(self, reward_model: Path | None) -> None:
        """Raises ValueError where shaping is asked for, and no reward model is given."""
        if reward_model is None and self.rule != "none" and self != ShapingConfig():
            raise ValueError("shaping is of a reward model's progress: there is no reward_model")

    def check_labels(self, reward_model: Path) -> None:
        """Raises ValueError for one of labels (milestones.py) with which this rule pays for dwelling anywhere."""
        if self.rule == "paper" and labels_of(reward_model) == "progress":
            raise ValueError(
                "shaping.rule paper adds up milestones: it wants a reward model of the labels keyframes or window, got"
                " one of progress, which would pay for every decision past the middle of the task"
            )


def shaped_rewards(
    trajectories: Sequence[Trajectory],
    model: RewardModel | None,
    config: ShapingConfig,
    *,
    gamma: float,
    outcome: bool = True,
) -> list[np.ndarray]:
    """float64 (T,) per trajectory, for Learner.update.

    gamma: the learner's discount of a tick, or 1 where it adds up rewards without one (GRPO, RLOO).
    outcome: whether success is a reward.  Without it, progress that is paid back where the task ended would come to the
    same sum whatever was done: the potential of the last observation is kept there.
    """
    rewards = [t.rewards_T if outcome else np.zeros(len(t)) for t in trajectories]
    if config.rule == "none" or model is None:
        return rewards
    progress = _progress(trajectories, model, ends_count=not outcome)
    if config.rule == "paper":
        # The paper's model answers with a word: "1" or "0".
        return [
            plain_sum(rewards_T, config.weight * (progress_T > 0.5))
            for rewards_T, (progress_T, _) in zip(rewards, progress, strict=True)
        ]
    return [
        potential_shaping(rewards_T, config.weight * progress_T, config.weight * after, trajectory.ticks_T, gamma=gamma)
        for rewards_T, trajectory, (progress_T, after) in zip(rewards, trajectories, progress, strict=True)
    ]


def _progress(
    trajectories: Sequence[Trajectory], model: RewardModel, *, ends_count: bool
) -> list[tuple[np.ndarray, float]]:
    """Per trajectory float64 (T,) and that of the observation after it, in one prediction.

    Where the task ended, that after it is 0; ends_count: that of the last one.
    """
    seen = [[*t.observations, *([] if t.after is None else [t.after])] for t in trajectories]
    predicted_n = np.asarray(model.predict([observation for one in seen for observation in one]), np.float64)
    parts = np.split(predicted_n, np.cumsum([len(one) for one in seen])[:-1])
    return [
        (part[: len(trajectory)], float(part[-1]) if ends_count or trajectory.after is not None else 0.0)
        for trajectory, part in zip(trajectories, parts, strict=True)
    ]
