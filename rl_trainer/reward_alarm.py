"""The reward-hacking alarm: what the learner is paid goes up while the task succeeds less often.

Over the last W iterations it fires when, by a straight line fitted to each, the mean shaped return rose by at least
`rise` and the success rate fell by at least `fall`, and when both kept their direction: Spearman's rank correlation
with time is at least `steady`, and at most -`steady`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """When a divergence of reward and success is no accident."""

    window: int = 10
    """W, iterations"""
    rise: float = 0.05
    """of the shaped return over the window, in units of it: success is worth 1"""
    fall: float = 0.1
    """of the success rate over the window"""
    steady: float = 0.5
    """rank correlation with time, in (0, 1]"""

    def __post_init__(self) -> None:
        if self.window < 3:
            raise ValueError(f"window must be >= 3, got {self.window}")
        if self.rise <= 0 or self.fall <= 0 or not 0 < self.steady <= 1:
            raise ValueError(
                f"rise and fall must be above 0 and steady in (0, 1], got {self.rise}, {self.fall} and {self.steady}"
            )


class RewardAlarm:
    """Watches a run; what it remembers goes into a checkpoint."""

    def __init__(self, config: AlarmConfig):
        self._config = config
        self._seen = deque[tuple[float, float]](maxlen=config.window)

    def observe(self, shaped_return: float, success: float) -> str | None:
        """How an iteration went: the mean sum of a trajectory's rewards, and the success rate.  A warning, or None."""
        if not np.isfinite([shaped_return, success]).all():
            raise ValueError(f"shaped_return and success must be finite, got {shaped_return} and {success}")
        self._seen.append((float(shaped_return), float(success)))
        config = self._config
        if len(self._seen) < config.window:
            return None
        return_W, success_W = np.array(self._seen).T
        rise, fall = _fitted_change(return_W), -_fitted_change(success_W)
        steady = min(_rank_correlation(return_W), -_rank_correlation(success_W))
        if rise < config.rise or fall < config.fall or steady < config.steady:
            return None
        return (
            f"reward hacking: over {config.window} iterations the shaped return rose by {rise:.2f} "
            f"(to {return_W[-1]:.2f}) while success fell by {fall:.2f} (to {success_W[-1]:.2f}); "
            f"the policy is learning to please the reward model, not to do the task"
        )

    def state(self) -> dict[str, Any]:
        """Everything a continuation needs, as JSON can hold it."""
        return {"seen": [list(one) for one in self._seen]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what state() gave; a shorter window keeps the latest."""
        self._seen = deque(((one[0], one[1]) for one in state["seen"]), maxlen=self._config.window)


def _fitted_change(values_W: np.ndarray) -> float:
    """From the first to the last point of the least-squares line."""
    return float(np.polyfit(np.linspace(0, 1, len(values_W)), values_W, 1)[0])


def _rank_correlation(values_W: np.ndarray) -> float:
    """Spearman's, with time; 0 for what never changes."""
    ranks_W = rankdata(values_W)
    if ranks_W.std() == 0:
        return 0.0
    return float(np.corrcoef(np.arange(len(ranks_W)), ranks_W)[0, 1])
