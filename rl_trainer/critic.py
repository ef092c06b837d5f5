"""The critic: a small head on the hidden state of the last prompt token, which has seen all but the actions.

Shapes: B batch, D width of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

PREFIX = "critic."


class Critic(nn.Module):
    """D -> hidden -> 1 in float32.  A fresh critic values every state at 0; the same for the same seed."""

    def __init__(self, width: int, *, hidden: int = 256, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden, self.value = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden_BD: torch.Tensor, *, detach: bool = False) -> torch.Tensor:
        """float32 (B,).

        hidden_BD: Scores.hidden_BD.  detach: the gradient ends here, and the policy stays as it is.
        """
        x_BD = (hidden_BD.detach() if detach else hidden_BD).float()
        return self.value(nn.functional.silu(self.hidden(x_BD)))[:, 0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the weights under names of their own, for a safetensors file shared with others."""
        return {PREFIX + name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what tensors() gave, from among others.  Raises ValueError when it is of another critic."""
        mine = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        expected, got = _shapes(self.state_dict()), _shapes(mine)
        if got != expected:
            raise ValueError(f"the critic's tensors must be {expected}, got {got}")
        self.load_state_dict(mine)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}
