"""Choosing tokens: greedily, or at a temperature with random numbers that belong to the request.

Shapes: B batch, N action tokens, V action bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from policy_server.vla.model import moved


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Chooses columns of the action logits: the largest, or where the cumulative probability passes a random number."""

    temperature_B: torch.Tensor
    """float32; 0 is greedy"""
    uniform_BN: torch.Tensor
    """float64, in [0, 1)"""
    any_sampled: bool
    """False saves the work where all rows are greedy."""

    @classmethod
    def of(cls, temperatures: Sequence[float], uniform_BN: np.ndarray) -> Sampler:
        """On the CPU."""
        temperature_B = torch.tensor(temperatures, dtype=torch.float32)
        sampled = bool((temperature_B > 0).any())
        return cls(temperature_B=temperature_B, uniform_BN=torch.from_numpy(uniform_BN), any_sampled=sampled)

    def to(self, device: torch.device) -> Sampler:
        return replace(self, temperature_B=moved(self.temperature_B, device), uniform_BN=moved(self.uniform_BN, device))

    def choose(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """int64 (B,)."""
        greedy_B = logits_BV.argmax(-1)
        if not self.any_sampled:
            return greedy_B
        cumulative_BV = (logits_BV / self._divisor_B1).double().softmax(-1).cumsum(-1)
        target_B1 = self.uniform_BN[:, step, None] * cumulative_BV[:, -1:]
        sampled_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
        return torch.where(self.temperature_B > 0, sampled_B, greedy_B)

    def logprobs(self, logits_BNV: torch.Tensor, columns_BN: torch.Tensor) -> torch.Tensor:
        """float32 (B, N)."""
        logprobs = torch.log_softmax(logits_BNV / self._divisor_B1[:, :, None], -1)
        return logprobs.gather(-1, columns_BN[..., None])[..., 0]

    @property
    def _divisor_B1(self) -> torch.Tensor:
        return torch.where(self.temperature_B > 0, self.temperature_B, 1.0)[:, None]


def uniform_numbers(seed: int, decision: int, chunk: tuple[int, int], *, correlation: float = 0.0) -> np.ndarray:
    """float64 (K, A) in [0, 1), K ticks of A tokens each: a counter-based stream of its own for each (seed, decision).

    correlation: between the numbers of one dimension at two ticks (those of a Gaussian copula, before its distribution
    function); each number alone is uniform whatever it is, so that each token still follows its own distribution.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, decision], np.uint64)))
    if not correlation:
        return generator.random(chunk)
    shared_A, own_KA = generator.standard_normal(chunk[1]), generator.standard_normal(chunk)
    normal_KA = correlation**0.5 * shared_A + (1 - correlation) ** 0.5 * own_KA
    return torch.special.ndtr(torch.from_numpy(normal_KA)).numpy().clip(max=np.nextafter(1, 0))
