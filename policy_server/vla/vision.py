"""Vision towers and the projector: from normalised pixels to tokens the decoder reads.

Shapes: B batch, S image side, P patches of a tower, D width, C image tokens after merging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from policy_server.vla.config import TowerConfig
from policy_server.vla.recompute import run

NORM_EPS = 1e-6


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BPD.shape
        qkv = self.qkv(x_BPD).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), the exact GELU."""

    def __init__(self, width: int, inner: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, config.heads)
        self.ls1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, config.mlp_width, width)
        self.ls2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        x_BPD = x_BPD + self.ls1(self.attn(self.norm1(x_BPD)))
        return x_BPD + self.ls2(self.mlp(self.norm2(x_BPD)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head: in published checkpoints, never applied."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.width
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, config.mlp_width, width)


class PatchEmbed(nn.Module):
    """(B, 3, S, S) to (B, P, D), patches in reading order."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.width, kernel_size=size, stride=size)

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels_B3SS).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """A vision transformer, read after one of its blocks, without the final norm and without prefix tokens."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        # On the patches alone; prefix tokens have no position.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches_per_side**2, width))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.register_tokens, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.final_norm:
            self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        if config.attention_pool:
            self.attn_pool = AttentionPool(config)
        self.recompute = False

    def _prefix(self) -> list[torch.Tensor]:
        names = ["cls_token"] * self.config.class_token + ["reg_token"] * (self.config.register_tokens > 0)
        return [getattr(self, name) for name in names]

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """(B, P, D)."""
        x = self.patch_embed(pixels_B3SS) + self.pos_embed
        if prefix := self._prefix():
            x = torch.cat([token.expand(x.shape[0], -1, -1) for token in prefix] + [x], 1)
        for block in self.blocks[: self.config.output_block + 1]:
            x = run(block, x, recompute=self.recompute)
        return x[:, self.config.prefix_tokens :]


class VisionBackbone(nn.Module):
    """One tower, or two whose features are concatenated; each reads three of the input's channels."""

    def __init__(self, towers: Sequence[TowerConfig]):
        super().__init__()
        self.featurizer = Tower(towers[0])
        if len(towers) == 2:
            self.fused_featurizer = Tower(towers[1])

    @property
    def towers(self) -> list[Tower]:
        return [tower for tower in self.children() if isinstance(tower, Tower)]

    def forward(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """(B, P, sum of widths) of (B, 3 * towers, S, S)."""
        features = [tower(pixels) for tower, pixels in zip(self.towers, pixels_BCSS.split(3, 1), strict=True)]
        return features[0] if len(features) == 1 else torch.cat(features, -1)


class Projector(nn.Module):
    """Linear layers with exact GELUs between: two for one tower, three (the first four times as wide) for two."""

    def __init__(self, vision_width: int, width: int, *, towers: int):
        super().__init__()
        inner = 4 * vision_width if towers == 2 else width
        self.fc1 = nn.Linear(vision_width, inner)
        self.fc2 = nn.Linear(inner, width)
        if towers == 2:
            self.fc3 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc2(functional.gelu(self.fc1(x)))
        return self.fc3(functional.gelu(x)) if hasattr(self, "fc3") else x


def merge_patches(x_BPD: torch.Tensor, side: int) -> torch.Tensor:
    """(B, P / side^2, D * side^2): each square of side x side patches becomes one token, its rows one after another."""
    if side == 1:
        return x_BPD
    batch, patches, width = x_BPD.shape
    grid = round(patches**0.5) // side
    squares = x_BPD.view(batch, grid, side, grid, side, width).transpose(2, 3)
    return squares.reshape(batch, grid * grid, side * side * width)
