"""Linear products to which every row of a batch may add a low-rank one of its own.

Shapes: B batch, L tokens, I inputs, P layers that read one input, O outputs of each, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The factors of P layers that read one input; with a batch dimension first where rows differ."""

    down_IR: torch.Tensor
    """(I, P * R) or (B, I, P * R)"""
    up_PRO: torch.Tensor
    """(P, R, O) or (B, P, R, O)"""

    def add(self, y_BLO: torch.Tensor, x_BLI: torch.Tensor) -> torch.Tensor:
        """y, the layers' outputs side by side (B, L, P * O), and what the factors make of x."""
        layers, rank = self.up_PRO.shape[-3:-1]
        inner_BLR = x_BLI @ self.down_IR
        if layers == 1:
            return y_BLO + inner_BLR @ self.up_PRO[..., 0, :, :]
        inner_BPLR = inner_BLR.unflatten(-1, (layers, rank)).transpose(-3, -2)
        return y_BLO + (inner_BPLR @ self.up_PRO).transpose(-3, -2).flatten(-2)


class RowLinear(nn.Linear):
    """A linear layer that shares the base's parameters; the factors of the pass under way come and go."""

    low_rank: LowRank | None = None

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x_BLI: torch.Tensor) -> torch.Tensor:
        y_BLO = functional.linear(x_BLI, self.weight, self.bias)
        return y_BLO if self.low_rank is None else self.low_rank.add(y_BLO, x_BLI)


class SideBySide:
    """Linear layers of one input, and without biases, as one product.

    Their weights are laid side by side in memory; the parameters become views of it.
    """

    low_rank: LowRank | None = None

    def __init__(self, *linears: nn.Linear):
        self.linears = linears
        self.weight = _side_by_side(linears)

    def __call__(self, x_BLI: torch.Tensor) -> torch.Tensor:
        y_BLO = functional.linear(x_BLI, self.weight)
        return y_BLO if self.low_rank is None else self.low_rank.add(y_BLO, x_BLI)


def side_by_side(*linears: nn.Linear) -> SideBySide | None:
    """None where the weights are quantised: those have a layout of their own."""
    plain = all(type(linear.weight) is nn.Parameter for linear in linears)
    return SideBySide(*linears) if plain else None


def _side_by_side(linears: Sequence[nn.Linear]) -> torch.Tensor:
    parts = [linear.weight.detach() for linear in linears]
    rows = [linear.out_features for linear in linears]
    if _adjacent(parts):  # a model made of another's tensors keeps sharing what it has not replaced
        return parts[0].as_strided((sum(rows), parts[0].shape[1]), parts[0].stride())
    fused = torch.cat(parts)
    for linear, part in zip(linears, fused.split(rows), strict=True):
        linear.weight.data = part
    return fused


def _adjacent(parts: Sequence[torch.Tensor]) -> bool:
    """Whether each part begins where the one before it ends, in one piece of memory."""
    return all(
        before.is_contiguous()
        and before.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        and before.storage_offset() + before.numel() == part.storage_offset()
        for before, part in pairwise(parts)
    )
