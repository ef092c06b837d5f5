"""One batch through the model: vision and prefill once, then N fixed steps over a static KV cache.

All shapes of a pass are known before it begins, and nothing in it waits for the device.

Shapes: B batch, L prompt tokens, N action tokens, V action bins, C context tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from policy_server.vla.adapters import Adapter
from policy_server.vla.config import VLAConfig
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
    adapter: Adapter | None = None
    """Of the model that decodes; those of one batch are of one layout."""


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """One shape for every pass, so that each row goes through the same kernels whoever its neighbours are."""

    batch: int
    prompt_length: int

    def fits(self, requests: Sequence[DecodeInput]) -> bool:
        return len(requests) <= self.batch and _longest(requests) <= self.prompt_length


def padded(requests: Sequence[DecodeInput], shape: PassShape | None) -> list[DecodeInput]:
    """With as many rows as the shape has.  Raises ValueError when they do not fit."""
    if shape is None:
        return list(requests)
    if not shape.fits(requests):
        got = f"{len(requests)} requests with up to {_longest(requests)} prompt tokens"
        raise ValueError(f"the batch must fit {shape}, got {got}")
    return [*requests, *[replace(requests[0], adapter=None)] * (shape.batch - len(requests))]


def _longest(requests: Sequence[DecodeInput]) -> int:
    return max(len(one.prepared.input_ids) for one in requests)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a pass reads."""

    prompts: Prompts
    sampler: Sampler

    @classmethod
    def of(cls, config: VLAConfig, requests: Sequence[DecodeInput], *, prompt_length: int | None = None) -> Batch:
        """On the CPU, prompts padded to the longest or to prompt_length."""
        chunk = (config.chunk_length, config.action_dim)
        uniform = [
            uniform_numbers(one.seed, one.decision, chunk, correlation=one.noise_correlation) for one in requests
        ]
        return cls(
            prompts=collate([one.prepared for one in requests], prompt_length=prompt_length),
            sampler=Sampler.of([one.temperature for one in requests], np.stack(uniform).reshape(len(requests), -1)),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        prompts, sampler = self.prompts, self.sampler
        states = [] if prompts.states_BS is None else [prompts.states_BS]
        read = [prompts.images_BHW3, prompts.input_ids_BL, prompts.lengths_B, *states]
        return [*read, sampler.temperature_B, sampler.uniform_BN]

    def to(self, device: torch.device) -> Batch:
        return Batch(prompts=self.prompts.to(device), sampler=self.sampler.to(device))

    def take(self, other: Batch) -> None:
        """Puts another batch of the same shapes in the memory of this one."""
        for own, new in zip(self.tensors, other.tensors, strict=True):
            own.copy_(new.pin_memory() if own.is_cuda else new, non_blocking=True)


class Pass:
    """phases, in this order, leave the answers: columns (B, N) of the action tokens, and float32 log-probabilities."""

    answers: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, vla: VLA, batch: Batch):
        self._vla, self._decoder, self._batch = vla, vla.language_model.model, batch
        self._slots = batch.prompts.input_ids_BL.shape[1] + vla.config.num_context_tokens

    @property
    def phases(self) -> Sequence[Callable[[], None]]:
        # Made anew: if the pass kept them, it would keep itself, and its caches, beyond its use.
        return self._see, self._prefill, self._write

    def _see(self) -> None:
        self._context_BCD = self._vla.context(self._batch.prompts)

    def _prefill(self) -> None:
        prompts, tokens = self._batch.prompts, self._vla.config.action_tokens - 1
        layout = Layout.of(prompts, self._vla.config.num_context_tokens, tokens)
        self._mask = layout.mask(self._vla.action_head.dtype)
        self._rotation = self._vla.language_model.rotation(layout.positions)
        self._cache = self._vla.language_model.cache(len(layout.lengths_B), self._slots + tokens)
        hidden_BMD = self._run(self._vla.embed_prompts(prompts.input_ids_BL, self._context_BCD), 0)
        rows = torch.arange(len(hidden_BMD), device=hidden_BMD.device)
        self._first_BV = self._logits(hidden_BMD[rows, layout.lengths_B - 1])

    def _write(self) -> None:
        logits, columns = [self._first_BV], []
        for step in range(self._vla.config.action_tokens):
            if step:
                x_B1D = self._decoder.embed_tokens(columns[-1][:, None] + self._vla.config.action_begin)
                logits.append(self._logits(self._run(x_B1D, self._slots + step - 1)[:, 0]))
            columns.append(self._batch.sampler.choose(logits[-1], step))
        columns_BN = torch.stack(columns, 1)
        self.answers = columns_BN, self._batch.sampler.logprobs(torch.stack(logits, 1), columns_BN)

    def _run(self, x_BLD: torch.Tensor, start: int) -> torch.Tensor:
        end = start + x_BLD.shape[1]
        mask = self._mask[:, :, start:end, :end]
        return self._decoder(x_BLD, self._rotation.part(start, end), mask, self._cache, start)

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """float32 (B, V)."""
        return functional.linear(hidden_BD, self._vla.action_head).float()


class Laps:
    """How long phases take on their device, without waiting for it between them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = [self._mark()]

    def run(self, phases: Sequence[Callable[[], object]]) -> None:
        for phase in phases:
            phase()
            self._marks.append(self._mark())

    def seconds(self) -> list[float]:
        """Of each phase, once the device has done them all."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1e3 if self._cuda else after - before for before, after in pairs]

    def _mark(self) -> Any:
        """A CUDA event, or a time."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
