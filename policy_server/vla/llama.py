"""The decoder: Llama's layers, over embeddings, with rows at positions of their own.

Shapes: B batch, L tokens of this call, T keys it may see, D width, H heads, d = D / H, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from policy_server.vla.config import LlamaConfig
from policy_server.vla.kv_cache import KVCache
from policy_server.vla.low_rank import SideBySide, side_by_side
from policy_server.vla.recompute import run

# torch prefers cuDNN's attention on an H100, and with a mask that fails: addresses that are not aligned (a small model
# here, pytorch issue 134001), NaN gradients where a row is 64 longer than a multiple of 128 (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotary position embedding of the tokens of a call (Su et al., 2021), halves paired as Llama does."""

    cos_BL1d: torch.Tensor
    sin_BL1d: torch.Tensor
    """Its first half negated, so that rotating is x * cos + roll(x, d / 2) * sin."""

    def __call__(self, x_BLHd: torch.Tensor) -> torch.Tensor:
        half = x_BLHd.shape[-1] // 2
        return torch.addcmul(x_BLHd * self.cos_BL1d, x_BLHd.roll(half, -1), self.sin_BL1d)

    def part(self, start: int, end: int) -> Rotation:
        """The rotation of some of the tokens."""
        return Rotation(cos_BL1d=self.cos_BL1d[:, start:end], sin_BL1d=self.sin_BL1d[:, start:end])


def rotation(positions_BL: torch.Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles are position / theta^(2i/d), in float32, whatever dtype the model computes in."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BL.device) / head_dim
    angles_BLh = positions_BL[..., None].float() / theta**exponents
    cos, sin = angles_BLh.cos(), angles_BLh.sin()
    return Rotation(
        cos_BL1d=torch.cat((cos, cos), -1)[:, :, None].to(dtype),
        sin_BL1d=torch.cat((-sin, sin), -1)[:, :, None].to(dtype),
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; what each token may see is in the mask."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.fused: SideBySide | None = None

    def _qkv(
        self, x_BLD: torch.Tensor, rotate: Rotation, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (from token `first` on) and keys, rotated, and values: (B, L, H, d) each."""
        shape = (*x_BLD.shape[:2], -1, self.head_dim)
        if self.fused is not None and not torch.is_grad_enabled():
            qkv = self.fused(x_BLD).view(shape)
            queries, keys = rotate(qkv[:, :, : 2 * self.heads]).split(self.heads, 2)
            return queries[:, first:], keys, qkv[:, :, 2 * self.heads :]
        # Side by side they would cost a copy, and another in the gradient.
        queries = self.q_proj(x_BLD[:, first:]).unflatten(-1, shape[2:])
        keys, values = self.k_proj(x_BLD).view(shape), self.v_proj(x_BLD).view(shape)
        return rotate.part(first, shape[1])(queries), rotate(keys), values

    def forward(
        self,
        x_BLD: torch.Tensor,
        rotate: Rotation,
        mask_B1LT: torch.Tensor,
        cache: KVCache | None,
        at: tuple[int, int],
        first: int,
    ) -> torch.Tensor:
        """For tokens from `first` on.  `at` is (layer, first slot) in the cache."""
        queries, keys, values = self._qkv(x_BLD, rotate, first)
        if cache is None:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        else:
            keys, values = cache.append(*at, torch.stack((keys, values)).transpose(2, 3))
        mask = mask_B1LT[:, :, first:]
        mixed = functional.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused: SideBySide | None = None

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        if self.fused is not None and not torch.is_grad_enabled():
            gate, up = self.fused(x_BLD).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x_BLD), self.up_proj(x_BLD)
        return self.down_proj(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BLD: torch.Tensor,
        rotate: Rotation,
        mask_B1LT: torch.Tensor,
        cache: KVCache | None,
        at: tuple[int, int],
        first: int,
    ) -> torch.Tensor:
        """What attention takes, for tokens from `first` on."""
        x_BLD = x_BLD[:, first:] + self.self_attn(self.input_layernorm(x_BLD), rotate, mask_B1LT, cache, at, first)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Decoder(nn.Module):
    """Embedding, layers and final norm: `language_model.model` of a checkpoint."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False

    def forward(
        self,
        x_BLD: torch.Tensor,
        rotate: Rotation,
        mask_B1LT: torch.Tensor,
        cache: KVCache | None = None,
        start: int = 0,
        first: int = 0,
    ) -> torch.Tensor:
        """Last hidden states (B, L - first, D) of the tokens from `first` on, after the final norm.

        mask_B1LT is added to the attention scores: 0 where a token may look, -inf where not.  With a cache the call's
        tokens take its slots from `start` on, and T = start + L.
        """
        last = len(self.layers) - 1  # the others' tokens are still to be looked at
        for index, layer in enumerate(self.layers):
            wanted = first if index == last else 0
            x_BLD = run(layer, x_BLD, rotate, mask_B1LT, cache, (index, start), wanted, recompute=self.recompute)
        return self.norm(x_BLD)


class LanguageModel(nn.Module):
    """The decoder and its head, under the published names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def rotation(self, positions_BL: torch.Tensor) -> Rotation:
        config = self.config
        dtype = self.lm_head.weight.dtype
        return rotation(positions_BL, head_dim=config.head_dim, theta=config.rope_theta, dtype=dtype)

    def cache(self, batch: int, capacity: int) -> KVCache:
        config, weight = self.config, self.lm_head.weight
        return KVCache(
            layers=config.num_hidden_layers,
            batch=batch,
            heads=config.num_attention_heads,
            capacity=capacity,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def fuse(self) -> None:
        """Lays q, k, v and gate, up side by side in memory, so that decoding needs one product for each group.

        The parameters become views: their names, and in-place updates, keep working; gradients take the single ones.
        Quantised ones stay as they are.
        """
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            attention.fused = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
            mlp.fused = side_by_side(mlp.gate_proj, mlp.up_proj)

    def unfuse(self) -> None:
        """Decodes with the single layers again, whatever they have been replaced by."""
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.self_attn.fused = layer.mlp.fused = None
