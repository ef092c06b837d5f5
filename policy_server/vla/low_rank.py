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
    """The factors of P layers that read one input; with a row dimension first where rows differ."""

    down_IR: torch.Tensor
    """(I, P * R) or (rows, I, P * R)"""
    up_PRO: torch.Tensor
    """(P, R, O) or (rows, P, R, O)"""
    rows: int | None = None
    """How many rows of a batch, from its first, they are of; None: all."""

    def add_to(self, y_BLO: torch.Tensor, x_BLI: torch.Tensor) -> None:
        """Adds what the factors make of x to y, the layers' outputs side by side (B, L, P * O)."""
        y_BLO, x_BLI = y_BLO[: self.rows], x_BLI[: self.rows]
        inner_BLR = x_BLI @ self.down_IR
        layers, rank, outputs = self.up_PRO.shape[-3:]
        if layers == 1:
            y_BLO += inner_BLR @ self.up_PRO[..., 0, :, :]
        else:
            many = (*y_BLO.shape[:2], layers)
            inner_BPLR = inner_BLR.view(*many, rank).transpose(1, 2)
            y_BLO.view(*many, outputs).transpose(1, 2).add_(inner_BPLR @ self.up_PRO)


class RowLinear(nn.Linear):
    """A linear layer that shares the base's parameters; the factors of the pass under way come and go."""

    low_rank: LowRank | None = None

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x_BLI: torch.Tensor) -> torch.Tensor:
        y_BLO = functional.linear(x_BLI, self.weight, self.bias)
        if self.low_rank is not None:
            self.low_rank.add_to(y_BLO, x_BLI)
        return y_BLO


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
        if self.low_rank is not None:
            self.low_rank.add_to(y_BLO, x_BLI)
        return y_BLO


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
