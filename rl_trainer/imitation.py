"""The loss of behaviour cloning and what is measured on held-out episodes: pure functions of logits and labels.

Shapes: B batch, N = K*A action tokens, K actions of a chunk, A numbers of an action, V = number of action bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional


def soft_targets(bins: int, sigma: float) -> torch.Tensor:
    """float32 (V, V): row t is the target distribution of label t, a Gaussian of `sigma` bins round t, summing to 1."""
    distance_VV = torch.arange(bins)[:, None] - torch.arange(bins)[None, :]
    return torch.softmax(-0.5 * (distance_VV / sigma) ** 2, dim=1)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How the tokens of a chunk are weighed and how sharp their targets are."""

    weight_N: torch.Tensor
    """float32, any scale"""
    smooth_N: torch.Tensor
    """bool: which tokens have a soft target (a gripper's two states are no neighbours)"""
    target_VV: torch.Tensor | None
    """soft_targets(), or None for hard targets everywhere"""

    def __call__(self, logits_BNV: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the batch and, by weight, over the tokens; labels_BN are columns of the logits."""
        logprobs_BNV = functional.log_softmax(logits_BNV.float(), dim=-1)
        nll_BN = -logprobs_BNV.gather(-1, labels_BN[..., None])[..., 0]
        if self.target_VV is not None:
            soft_BN = -(self.target_VV[labels_BN] * logprobs_BNV).sum(-1)
            nll_BN = torch.where(self.smooth_N, soft_BN, nll_BN)
        return (nll_BN * self.weight_N).sum(1).mean() / self.weight_N.sum()


def learning_rate(progress: float, step: int, *, peak: float, final: float, warmup_steps: int) -> float:
    """Linear warm-up over steps, times a cosine from peak to final over progress (Loshchilov and Hutter, 2017)."""
    cosine = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, progress)))
    return cosine * min(1.0, (step + 1) / max(1, warmup_steps))
