"""Keys and values of one pass, in memory set aside beforehand."""

from __future__ import annotations

import torch


class KVCache:
    """Static: every row has `capacity` slots in every layer.  Which slots a row may see is the mask's business."""

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        # Zeros, not garbage: a masked slot has weight 0, and 0 * NaN would be NaN.
        self._kv = torch.zeros(layers, 2, batch, heads, capacity, head_dim, dtype=dtype, device=device)

    def append(self, layer: int, start: int, kv_2BHLd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes L slots from `start` on; gives keys and values (B, H, start + L, d) of everything so far."""
        end = start + kv_2BHLd.shape[3]
        held = self._kv[layer]
        held[:, :, :, start:end] = kv_2BHLd
        keys, values = held[:, :, :, :end].unbind(0)
        return keys, values
