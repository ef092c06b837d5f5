"""A model that is asked about a frame and answers "0" or "1": what every such reward model has in common.

Shapes: B batch, n observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from policy_server.vla.preprocessing import Prepared

ANSWERS = ("0", "1")


class AnsweringModel:
    """A subclass has the module that answers, and says what it thinks of either answer."""

    model: Any
    """the torch module that answers"""
    predict_batch = 64
    """observations of one pass without gradients"""

    def _logits(self, observations: Sequence[Prepared]) -> torch.Tensor:
        """float32 (B, 2): no, yes."""
        raise NotImplementedError

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, observations: Sequence[Prepared], target_B: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy with answers of which a part target_B should be "1"."""
        self.model.train()
        logits_B2 = self._logits(observations)
        target_B2 = torch.from_numpy(np.stack([1 - target_B, target_B], 1)).to(logits_B2)
        return functional.cross_entropy(logits_B2, target_B2)

    @torch.no_grad()
    def predict(self, observations: Sequence[Prepared]) -> np.ndarray:
        """float64 (n,) in [0, 1]: how probable "1" is."""
        self.model.eval()
        size = self.predict_batch
        parts = [observations[start : start + size] for start in range(0, len(observations), size)]
        logits_n2 = torch.cat([self._logits(part) for part in parts])
        return torch.softmax(logits_n2.double(), -1)[:, 1].cpu().numpy()
