"""One adapted layer: W x + (alpha / r) B A x (Hu et al., 2021), and the one way to merge it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside it; it shares the base's parameters."""

    def __init__(
        self, base: nn.Linear, lora_A: torch.Tensor, lora_B: torch.Tensor, *, alpha: float, dropout: float = 0.0
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.alpha, self.dropout = alpha, dropout

    @classmethod
    def fresh(cls, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> LoRALinear:
        """An adapter that changes nothing yet: A is random, B is zero."""
        like = {"device": base.weight.device, "dtype": torch.float32}
        lora_A = torch.empty(rank, base.in_features, **like)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        return cls(base, lora_A, torch.zeros(base.out_features, rank, **like), alpha=alpha, dropout=dropout)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and (alpha / r) B (out, r) as a layer that computes in `dtype` uses them."""
        return self.lora_A.to(dtype), (self.lora_B * self.scale).to(dtype)

    def over(self, base: nn.Linear) -> LoRALinear:
        """The same adapter beside another layer."""
        return LoRALinear(base, self.lora_A, self.lora_B, alpha=self.alpha, dropout=self.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = functional.linear(x, self.weight, self.bias)
        # The matrices are cast, not x: a float32 copy of every layer's input would be kept for the gradient.
        lora_A, lora_B = self.factors(x.dtype)
        dropped = functional.dropout(x, self.dropout, self.training)
        return base + functional.linear(functional.linear(dropped, lora_A), lora_B)

    def merged(self) -> nn.Linear:
        """A plain linear layer with W + (alpha / r) B A, rounded to the dtype of W."""
        merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = self.lora_B.detach() @ self.lora_A.detach() * self.scale
        merged.weight = nn.Parameter((self.weight.detach().float() + delta).to(self.weight.dtype))
        merged.bias = self.bias
        return merged
