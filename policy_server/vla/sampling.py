"""Choosing tokens: greedily, or at a temperature with random numbers that belong to the request.

Shapes: B batch, N action tokens, V action bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Sampler:
    """Chooses columns of the action logits: the largest, or where the cumulative probability passes a random number."""

    def __init__(self, temperatures: Sequence[float], uniform_BN: np.ndarray, *, device: torch.device):
        """A temperature of 0 is greedy; uniform_BN holds a number in [0, 1) for every token."""
        temperature_B = torch.tensor(temperatures, dtype=torch.float32)
        self._any_sampled = bool((temperature_B > 0).any())
        self._sampled_B = (temperature_B > 0).to(device)
        self._temperature_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None].to(device)
        self._uniform_BN = torch.from_numpy(uniform_BN).to(device)

    def choose(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """int64 (B,)."""
        greedy_B = logits_BV.argmax(-1)
        if not self._any_sampled:
            return greedy_B
        cumulative_BV = (logits_BV / self._temperature_B1).double().softmax(-1).cumsum(-1)
        target_B1 = self._uniform_BN[:, step, None] * cumulative_BV[:, -1:]
        sampled_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
        return torch.where(self._sampled_B, sampled_B, greedy_B)

    def logprobs(self, logits_BNV: torch.Tensor, columns_BN: torch.Tensor) -> torch.Tensor:
        """float32 (B, N)."""
        logprobs = torch.log_softmax(logits_BNV / self._temperature_B1[:, :, None], -1)
        return logprobs.gather(-1, columns_BN[..., None])[..., 0]


def uniform_numbers(seed: int, decision: int, count: int) -> np.ndarray:
    """float64 (count,) in [0, 1): a counter-based stream of its own for each (seed, decision)."""
    key = np.array([seed, decision], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
