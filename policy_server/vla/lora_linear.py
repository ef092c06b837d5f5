"""One adapted layer: W x + (alpha / r) B A x (Hu et al., 2021), and the one way to merge it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside it; it shares the base's parameters."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = functional.linear(x, self.weight, self.bias)
        # The matrices are cast, not x: a float32 copy of every layer's input would be kept for the gradient.
        lora_A, lora_B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        dropped = functional.dropout(x, self.dropout, self.training)
        return base + functional.linear(functional.linear(dropped, lora_A), lora_B) * self.scale

    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W + (alpha / r) B A as a server holds it that computes in `dtype`: W is rounded to it, and so is the sum.

        Between, all is float32.  B A is summed rank by rank, every product and every sum rounded by itself: the same
        bits on any device.  A matrix product depends on its kernel's order of summation, and two sides would differ.
        """
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        delta = torch.zeros_like(weight, dtype=torch.float32)
        for row, column in zip(self.lora_A.detach(), self.lora_B.detach().T, strict=True):
            delta += column[:, None] * row
        return (weight.float() + delta * self.scale).to(weight.dtype)

    def merged(self) -> nn.Linear:
        """A plain linear layer with the merged weight."""
        merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        merged.weight = nn.Parameter(self.merged_weight())
        merged.bias = self.bias
        return merged
