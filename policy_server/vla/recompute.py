"""Memory for time: a block's activations are dropped after the forward pass and computed again for its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, *inputs: Any, recompute: bool) -> torch.Tensor:
    """block(*inputs); with recompute, only the inputs are kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
