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
from typing import Literal

import numpy as np

from rl_trainer.advantage import plain_sum, potential_shaping
from rl_trainer.reward_model import RewardModel
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


def shaped_rewards(
    trajectories: Sequence[Trajectory], model: RewardModel | None, config: ShapingConfig, *, gamma: float
) -> list[np.ndarray]:
    """float64 (T,) per trajectory, for Learner.update.

    gamma: the learner's discount of a tick, or 1 where it adds up rewards without one (GRPO, RLOO).
    """
    if config.rule == "none" or model is None:
        return [trajectory.rewards_T for trajectory in trajectories]
    progress = _progress(trajectories, model)
    if config.rule == "paper":
        # The paper's model answers with a word: "1" or "0".
        return [
            plain_sum(trajectory.rewards_T, config.weight * (progress_T > 0.5))
            for trajectory, (progress_T, _) in zip(trajectories, progress, strict=True)
        ]
    return [
        potential_shaping(
            trajectory.rewards_T, config.weight * progress_T, config.weight * after, trajectory.ticks_T, gamma=gamma
        )
        for trajectory, (progress_T, after) in zip(trajectories, progress, strict=True)
    ]


def _progress(trajectories: Sequence[Trajectory], model: RewardModel) -> list[tuple[np.ndarray, float]]:
    """Per trajectory float64 (T,) and that of the observation after it, 0 where the task ended; in one prediction."""
    seen = [[*t.observations, *([] if t.after is None else [t.after])] for t in trajectories]
    predicted_n = np.asarray(model.predict([observation for one in seen for observation in one]), np.float64)
    parts = np.split(predicted_n, np.cumsum([len(one) for one in seen])[:-1])
    return [
        (part[: len(trajectory)], 0.0 if trajectory.after is None else float(part[-1]))
        for trajectory, part in zip(trajectories, parts, strict=True)
    ]
