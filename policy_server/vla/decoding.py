"""Action tokens of a batch: vision and prefill once, then N fixed steps over a static KV cache.

What is sampled for a request depends on the request alone: its uniform numbers come from (seed, decision), one a token.
Shapes: B batch, N action tokens, V action bins, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from policy_server.vla.model import VLA, Layout, Prompts, collate
from policy_server.vla.preprocessing import Prepared
from policy_server.vla.sampling import Sampler, uniform_numbers


@dataclass(frozen=True, kw_only=True)
class DecodeInput:
    """One request."""

    prepared: Prepared
    temperature: float = 0.0
    """0 is greedy."""
    noise_correlation: float = 0.0
    """Between the ticks of a chunk, for each action dimension."""
    seed: int = 0
    """uint64; with `decision` it fixes the random stream."""
    decision: int = 0


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """One shape for every pass, so that each row goes through the same kernels whoever its neighbours are."""

    batch: int
    prompt_length: int


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The answers to a batch, and where the time went."""

    token_ids_BN: np.ndarray
    """int32"""
    token_logprobs_BN: np.ndarray
    """float32, over the action tokens, at the request's temperature (at 1 when greedy)"""
    vision_s: float
    prefill_s: float
    decode_s: float


@torch.inference_mode()
def decode(vla: VLA, inputs: Sequence[DecodeInput], shape: PassShape | None = None) -> Decoded:
    """N tokens for each of B requests.  With a shape, rows and prompts are padded to it."""
    clock = _Clock(vla.device)
    batch = _padded(inputs, shape)
    prompts = collate([one.prepared for one in batch], prompt_length=shape and shape.prompt_length).to(vla.device)
    sampler = Sampler(
        [one.temperature for one in batch],
        np.stack([_uniform_numbers(vla, one) for one in batch]),
        device=vla.device,
    )
    context_BCD = vla.context(prompts)
    vision_s = clock.lap_s()
    writer = _Writer(vla, prompts)
    logits_BV = writer.prefill(prompts, context_BCD)
    prefill_s = clock.lap_s()
    columns, logits = [], []
    for step in range(vla.config.action_tokens):
        if step:
            logits_BV = writer.step(step - 1, columns[-1])
        logits.append(logits_BV)
        columns.append(sampler.choose(logits_BV, step))
    columns_BN, logits_BNV = torch.stack(columns, 1), torch.stack(logits, 1)
    logprobs_BN = sampler.logprobs(logits_BNV, columns_BN).cpu()
    token_ids_BN = (columns_BN + vla.config.action_begin).cpu()
    return Decoded(
        token_ids_BN=token_ids_BN[: len(inputs)].numpy().astype(np.int32),
        token_logprobs_BN=logprobs_BN[: len(inputs)].numpy(),
        vision_s=vision_s,
        prefill_s=prefill_s,
        decode_s=clock.lap_s(),
    )


def _uniform_numbers(vla: VLA, one: DecodeInput) -> np.ndarray:
    """float64 (N,)."""
    chunk = (vla.config.chunk_length, vla.config.action_dim)
    return uniform_numbers(one.seed, one.decision, chunk, correlation=one.noise_correlation).reshape(-1)


def _padded(inputs: Sequence[DecodeInput], shape: PassShape | None) -> list[DecodeInput]:
    if shape is None:
        return list(inputs)
    longest = max(len(one.prepared.input_ids) for one in inputs)
    if len(inputs) > shape.batch or longest > shape.prompt_length:
        raise ValueError(f"the batch must fit {shape}, got {len(inputs)} requests with up to {longest} prompt tokens")
    return [*inputs, *[inputs[0]] * (shape.batch - len(inputs))]


class _Writer:
    """The decoder of one pass: its cache, and the mask and rotation of every token to come."""

    def __init__(self, vla: VLA, prompts: Prompts):
        self._vla, self._decoder = vla, vla.language_model.model
        tokens = vla.config.action_tokens - 1
        layout = Layout.of(prompts, vla.config.num_context_tokens, tokens)
        self._slots = layout.prompt_slots
        self._last_B = layout.lengths_B - 1
        self._mask = layout.mask(vla.action_head.dtype)
        self._rotation = vla.language_model.rotation(layout.positions)
        self._cache = vla.language_model.cache(len(layout.lengths_B), layout.prompt_slots + tokens)

    def prefill(self, prompts: Prompts, context_BCD: torch.Tensor) -> torch.Tensor:
        """float32 logits (B, V) of the first action token."""
        x = self._vla.embed_prompts(prompts.input_ids_BL, context_BCD)
        hidden = self._run(x, 0)
        return self._logits(hidden[torch.arange(len(hidden), device=hidden.device), self._last_B])

    def step(self, index: int, columns_B: torch.Tensor) -> torch.Tensor:
        """float32 logits (B, V) of the token after action token `index`, which is columns_B."""
        x = self._decoder.embed_tokens(columns_B[:, None] + self._vla.config.action_begin)
        return self._logits(self._run(x, self._slots + index)[:, 0])

    def _run(self, x_BLD: torch.Tensor, start: int) -> torch.Tensor:
        end = start + x_BLD.shape[1]
        mask = self._mask[:, :, start:end, :end]
        return self._decoder(x_BLD, self._rotation.part(start, end), mask, self._cache, start)

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden_BD, self._vla.action_head).float()


class _Clock:
    def __init__(self, device: torch.device):
        # This stream alone: weights of a new version may be on their way beside it.
        cuda = device.type == "cuda"
        self._synchronise = torch.cuda.current_stream(device).synchronize if cuda else lambda: None
        self._since_s = time.perf_counter()

    def lap_s(self) -> float:
        """Seconds since the last lap."""
        self._synchronise()
        before_s, self._since_s = self._since_s, time.perf_counter()
        return self._since_s - before_s
