"""Returns and advantages: pure functions over the decisions of a trajectory or the episodes of a batch.

Time is counted in executed ticks: a decision of k ticks discounts what follows it by gamma^k.

Shapes: T decisions of one trajectory, E episodes, n decisions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

# Values closer together than this are equal: their spread is rounding.
ROUNDING = 1e-8


def gae(
    rewards_T: np.ndarray, values_T: np.ndarray, bootstrap: float, ticks_T: np.ndarray, *, gamma: float, lambda_: float
) -> np.ndarray:
    """float64 (T,) advantages (Schulman et al., 2016); the value's targets are advantages + values_T.

    bootstrap: the value of the observation after the last decision; 0 when the task ended there.
    lambda_ counts decisions, gamma ticks.
    """
    discount_T = gamma ** np.asarray(ticks_T, np.float64)
    delta_T = rewards_T + discount_T * np.append(values_T[1:], bootstrap) - values_T
    advantage_T1 = np.zeros(len(delta_T) + 1)
    for t in reversed(range(len(delta_T))):
        advantage_T1[t] = delta_T[t] + lambda_ * discount_T[t] * advantage_T1[t + 1]
    return advantage_T1[:-1]


def batch_gae(
    rewards: Sequence[np.ndarray],
    ticks: Sequence[np.ndarray],
    values_n: np.ndarray,
    after_E: np.ndarray,
    *,
    gamma: float,
    lambda_: float,
) -> np.ndarray:
    """float64 (n,): gae() of each trajectory, whose rewards_T and ticks_T are given, in a row.

    after_E: the value of what each was cut before, 0 where its task ended.
    """
    values = np.split(values_n, np.cumsum([len(ticks_T) for ticks_T in ticks])[:-1])
    parts = [
        gae(r_T, v_T, float(after), ticks_T, gamma=gamma, lambda_=lambda_)
        for r_T, ticks_T, v_T, after in zip(rewards, ticks, values, after_E, strict=True)
    ]
    return np.concatenate(parts)


def group_relative(returns_E: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """float64 (E,): GRPO's (r - mean) / std within each group (Shao et al., 2024); 0 where all are equal.

    groups: what each episode started from, its (task, initial state).
    """
    return _within(groups, returns_E, normalised)


def leave_one_out(returns_E: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """float64 (E,): RLOO's r - mean of the others in its group (Ahmadian et al., 2024); 0 for one without others."""
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
    return _within(groups, returns_E, lambda r: (r - r.mean()) * len(r) / max(1, len(r) - 1))


def normalised(values: np.ndarray) -> np.ndarray:
    """float64, as many: mean 0 and standard deviation 1; all 0 where they are all alike."""
    values = np.asarray(values, np.float64)
    std = values.std()
    return (values - values.mean()) / std if std > ROUNDING else np.zeros(len(values))


def potential_shaping(
    rewards_T: np.ndarray, potential_T: np.ndarray, after: float, ticks_T: np.ndarray, *, gamma: float
) -> np.ndarray:
    """float64 (T,): r + gamma^k Phi(s') - Phi(s) (Ng et al., 1999), which leaves the best policy what it was.

    after: Phi of the observation after the last decision; 0 when the task ended there, kept when it was truncated.
    """
    discount_T = gamma ** np.asarray(ticks_T, np.float64)
    return rewards_T + discount_T * np.append(potential_T[1:], after) - potential_T


def plain_sum(rewards_T: np.ndarray, process_T: np.ndarray) -> np.ndarray:
    """float64 (T,): success plus process reward without a coefficient, as in the paper's algorithm 1."""
    return np.asarray(rewards_T, np.float64) + process_T


def _within(
    groups: Sequence[Hashable], values_E: np.ndarray, transform: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    members: dict[Hashable, list[int]] = {}
    for episode, group in enumerate(groups):
        members.setdefault(group, []).append(episode)
    result_E = np.zeros(len(groups))
    for rows in members.values():
        result_E[rows] = transform(np.asarray(values_E, np.float64)[rows])
    return result_E
