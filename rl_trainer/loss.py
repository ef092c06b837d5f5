"""The losses of PPO and of cloning beside it: pure functions of what the model scores now and what was recorded.

A loss of a part of a batch is divided by counts of the whole batch, over all parts and ranks: gradients of the parts
add up to the batch's, however it is cut.

Shapes: B decisions, N = K*A action tokens, A tokens of one tick's action, U units that have a ratio (K ticks, or the N
tokens), V action bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

# A ratio beyond exp() of this teaches nothing more: its gradient would drown the batch, and soon not be finite.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How far a batch may move the policy, and what else is asked of it."""

    ratio: Literal["action", "token"] = "action"
    """what a ratio belongs to: the A tokens of one tick's action, as in the paper, or each token"""
    clip_low: float = 0.2
    """a ratio below 1 - clip_low earns nothing more"""
    clip_high: float = 0.2
    """a ratio above 1 + clip_high earns nothing more"""
    behaviour_cap: float = 0.0
    """above 0, for episodes of older policies: ratios are to the policy as the update finds it, and each counts by how
    much likelier that one is to do the same than who played was, at most so many times; 0: ratios to who played"""
    value_clip: float = 0.2
    """how far a value may move from the recorded one; 0 for any distance"""
    entropy_weight: float = 0.0
    """bonus for the mean entropy of a token"""
    reference_weight: float = 0.0
    """penalty on the mean KL divergence of a token from the reference policy"""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(
                f"clip_low must be in (0, 1) and clip_high above 0, got {self.clip_low} and {self.clip_high}"
            )
        for name in ("behaviour_cap", "value_clip", "entropy_weight", "reference_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much there is to score in a whole batch."""

    decisions: int
    ticks: int
    tokens: int

    @classmethod
    def of(cls, mask_BN: np.ndarray, action_dim: int) -> Counts:
        """Of a batch's mask, in which actions are whole."""
        tokens = int(mask_BN.sum())
        return cls(decisions=len(mask_BN), ticks=tokens // action_dim, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A part's contribution; both add up over the parts of a batch."""

    total: torch.Tensor
    """scalar, to be differentiated"""
    metrics: dict[str, torch.Tensor]
    """detached scalars"""


def token_logprobs(
    logits_BNV: torch.Tensor, columns_BN: torch.Tensor, temperature_B: torch.Tensor, mask_BN: torch.Tensor
) -> torch.Tensor:
    """float32 (B, N): natural log-probabilities of the action tokens as the sampler had them; masked ones are constant.

    logits_BNV are over the action tokens alone, columns_BN are ids - action_begin.
    """
    return _log_softmax(logits_BNV, temperature_B, mask_BN).gather(-1, columns_BN[..., None])[..., 0]


def token_entropy(logits_BNV: torch.Tensor, temperature_B: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    """float32 (B, N) in nats, of the distributions that token_logprobs() reads."""
    logprobs_BNV = _log_softmax(logits_BNV, temperature_B, mask_BN)
    return -(logprobs_BNV.exp() * logprobs_BNV).sum(-1)


def token_divergence(
    logits_BNV: torch.Tensor, other_BNV: torch.Tensor, temperature_B: torch.Tensor, mask_BN: torch.Tensor
) -> torch.Tensor:
    """float32 (B, N) in nats: KL(this | other) of the distributions that token_logprobs() reads; 0 where masked."""
    this_BNV, other_BNV = (_log_softmax(logits, temperature_B, mask_BN) for logits in (logits_BNV, other_BNV))
    return (this_BNV.exp() * (this_BNV - other_BNV)).sum(-1)


def _log_softmax(logits_BNV: torch.Tensor, temperature_B: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
    # Masked before the softmax: its gradient multiplies by what it gave, and 0 * nan is nan.
    logits_BNV = torch.where(mask_BN[..., None], logits_BNV.float(), 0.0)
    return torch.log_softmax(logits_BNV / temperature_B[:, None, None], -1)


def ppo_loss(
    logprobs_BN: torch.Tensor,
    behaviour_BN: torch.Tensor,
    advantage_B: torch.Tensor,
    mask_BN: torch.Tensor,
    *,
    config: LossConfig,
    counts: Counts,
    action_dim: int,
    found_BN: torch.Tensor | None = None,
    moved_BN: torch.Tensor | None = None,
    entropy_BN: torch.Tensor | None = None,
    divergence_BN: torch.Tensor | None = None,
) -> Loss:
    """The clipped surrogate (Schulman et al., 2017), with its entropy and reference terms where those are given.

    behaviour_BN: log-probabilities recorded when the tokens were sampled.  Every unit of a decision has its advantage.
    found_BN: those of the policy as the update found it; none given: behaviour_BN.  With behaviour_cap ratios are to
    them: the surrogate is then the decoupled one (Hilton et al., 2021, Batch size-invariance for policy optimization),
    with importance weights that are cut off.
    moved_BN: token_divergence() of that policy from the one that is learned; measured alone.
    divergence_BN: token_divergence() from the reference policy.
    """
    width, units = (action_dim, counts.ticks) if config.ratio == "action" else (1, counts.tokens)

    def log_ratio(new_BN: torch.Tensor, old_BN: torch.Tensor) -> torch.Tensor:
        difference_BN = torch.where(mask_BN, new_BN - old_BN, 0.0)
        return difference_BN.unflatten(1, (-1, width)).sum(-1).clamp(max=MAX_LOG_RATIO)

    scored_BU = mask_BN.unflatten(1, (-1, width)).any(-1)
    weighted_BU = advantage_B[:, None].expand(scored_BU.shape)
    old_BN = behaviour_BN
    if config.behaviour_cap and found_BN is not None:
        old_BN = found_BN
        weighted_BU = weighted_BU * log_ratio(found_BN, behaviour_BN).exp().clamp(max=config.behaviour_cap)
    log_ratio_BU = log_ratio(logprobs_BN, old_BN)
    ratio_BU = log_ratio_BU.exp()
    # min(r A, clip(r, 1 - low, 1 + high) A)
    free_BU = ratio_BU * weighted_BU
    clipped_BU = ratio_BU.clamp(1 - config.clip_low, 1 + config.clip_high) * weighted_BU
    total = -_mean(torch.minimum(free_BU, clipped_BU), scored_BU, units)
    metrics = {
        "policy_loss": total,
        "ratio": _mean(ratio_BU, scored_BU, units),
        "clip_fraction": _mean((clipped_BU < free_BU).float(), scored_BU, units),
    }
    if moved_BN is not None:  # of an action: by the chain rule, along what was played, the sum over its tokens
        metrics["update_kl"] = moved_BN.sum() / counts.ticks
    if entropy_BN is not None:
        metrics["entropy"] = _mean(entropy_BN, mask_BN, counts.tokens)
        total = total - config.entropy_weight * metrics["entropy"]
    if divergence_BN is not None:
        metrics["reference_kl"] = _mean(divergence_BN, mask_BN, counts.tokens)
        total = total + config.reference_weight * metrics["reference_kl"]
    return Loss(total=total, metrics={name: metric.detach() for name, metric in metrics.items()})


def divergence_estimate(log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(old | new) from log(new / old) of what old did, each by r - 1 - log r (Schulman, 2020: k3)."""
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio


def value_loss(
    values_B: torch.Tensor, recorded_B: torch.Tensor, targets_B: torch.Tensor, *, config: LossConfig, counts: Counts
) -> Loss:
    """Half the squared error; with a clip, the larger of it and that of a value kept near the recorded one."""
    error_B = (values_B - targets_B).square()
    if config.value_clip:
        kept_B = recorded_B + (values_B - recorded_B).clamp(-config.value_clip, config.value_clip)
        error_B = torch.maximum(error_B, (kept_B - targets_B).square())
    total = 0.5 * error_B.sum() / counts.decisions
    return Loss(total=total, metrics={"value_loss": total.detach()})


def clone_loss(logprobs_BN: torch.Tensor, mask_BN: torch.Tensor, *, counts: Counts) -> Loss:
    """The mean negative log-likelihood of the tokens under the mask, as behaviour cloning has it."""
    total = -_mean(logprobs_BN, mask_BN, counts.tokens)  # -1/n sum log p(token | observation, tokens before it)
    return Loss(total=total, metrics={"nll": total.detach()})


def _mean(values: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Of the values under the mask, in a batch that has `count` of them in all its parts."""
    return torch.where(mask, values, 0.0).sum() / count
