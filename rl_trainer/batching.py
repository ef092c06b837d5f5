"""From trajectories to one batch of decisions, and from a batch to the passes of a learner.

Shapes: n decisions of a batch, N = K*A action tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policy_server.vla.preprocessing import Prepared
from rl_trainer.trajectories import Trajectory


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The decisions of all trajectories, one after the other."""

    observations: Sequence[Prepared]
    """n"""
    token_ids_nN: torch.Tensor
    behaviour_nN: torch.Tensor
    """float32: log-probabilities when they were sampled"""
    mask_nN: torch.Tensor
    temperature_n: torch.Tensor
    version_n: np.ndarray

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Batch:
        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(trajectory, name) for trajectory in trajectories])

        return cls(
            observations=[observation for trajectory in trajectories for observation in trajectory.observations],
            token_ids_nN=torch.from_numpy(joined("token_ids_TN")),
            behaviour_nN=torch.from_numpy(joined("logprobs_TN")),
            mask_nN=torch.from_numpy(joined("mask_TN")),
            temperature_n=torch.from_numpy(joined("temperature_T")),
            version_n=joined("version_T"),
        )

    def __len__(self) -> int:
        return len(self.observations)


def minibatches(count: int, size: int, *, epochs: int, seed: int, iteration: int) -> Iterator[np.ndarray]:
    """Rows of each optimiser step: every epoch a fresh permutation, cut evenly into parts of about `size`."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, iteration, epoch)).permutation(count)
        yield from np.array_split(order, max(1, round(count / size)))
