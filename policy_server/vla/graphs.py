"""Passes captured as CUDA graphs: the GPU repeats them without being told every kernel again.

A graph is of one model, one batch size and one prompt length, with adapters of one layout or without; what it reads
lies where it lay at the capture.  Off CUDA nothing is captured: the same steps run over the same fixed memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from policy_server.vla.adapters import Adapter, FactorLayout
from policy_server.vla.model import VLA
from policy_server.vla.passes import Batch, DecodeInput, Laps, Pass, PassShape, padded

WARM_UPS = 2
"""Eager runs before a capture: libraries choose kernels and set memory aside in them."""

Answers = tuple[torch.Tensor, torch.Tensor]


class PassGraphs:
    """The captured passes of one model, whose weights must stay where they are.

    shapes: batches of these sizes, ascending; smaller ones are padded to the next.  example: any sampled request.
    row_by_row: as for Adapters.rows().
    """

    @torch.inference_mode()
    def __init__(self, vla: VLA, shapes: Sequence[PassShape], example: DecodeInput, *, row_by_row: bool = False):
        self._shapes, self._example, self._row_by_row = shapes, example, row_by_row
        # Passes never overlap: all may use the same memory for what they forget.
        self._pool = torch.cuda.graph_pool_handle() if vla.device.type == "cuda" else None
        self._plain = [_Captured(vla, shape, example, self._pool) for shape in shapes]
        self._adapted: dict[tuple[FactorLayout, bool], _Adapted] = {}

    @torch.inference_mode()
    def admit(self, adapter: Adapter) -> None:
        """Captures passes with adapters of this one's layout: one for each row, and one for all."""
        for alike in (False,) if self._row_by_row else (False, True):
            if (adapter.layout, alike) not in self._adapted:
                self._adapted[adapter.layout, alike] = _Adapted(adapter, alike, self._shapes, self._example, self._pool)

    @torch.inference_mode()
    def run(self, requests: Sequence[DecodeInput], laps: Laps) -> Answers | None:
        """The answers, perhaps with rows after those asked for; None where no captured pass fits."""
        index = next((i for i, shape in enumerate(self._shapes) if shape.fits(requests)), None)
        if index is None:
            return None
        adapters = [request.adapter for request in requests]
        layout = next((adapter.layout for adapter in adapters if adapter is not None), None)
        if layout is None:
            return self._plain[index].run(requests, laps)
        alike = not self._row_by_row and all(adapter is adapters[0] for adapter in adapters)
        family = self._adapted.get((layout, alike))
        if family is None:
            return None
        family.take(adapters)
        return family.captured[index].run(requests, laps)


class _Captured:
    """A pass that can be repeated, and the memory it reads a batch from."""

    def __init__(self, vla: VLA, shape: PassShape, example: DecodeInput, pool):
        self._config, self._shape = vla.config, shape
        self._batch = self._laid_out([example]).to(vla.device)
        one = Pass(vla, self._batch)
        for _ in range(WARM_UPS):
            Laps(vla.device).run(one.phases)
        if pool is None:
            self._phases, self._answers = one.phases, lambda: one.answers
        else:
            self._phases = [_graph(phase, pool) for phase in one.phases]
            answers = one.answers  # and nothing else of the pass is kept
            self._answers = lambda: answers

    def run(self, requests: Sequence[DecodeInput], laps: Laps) -> Answers:
        self._batch.take(self._laid_out(requests))
        laps.run(self._phases)
        return self._answers()

    def _laid_out(self, requests: Sequence[DecodeInput]) -> Batch:
        return Batch.of(self._config, padded(requests, self._shape), prompt_length=self._shape.prompt_length)


class _Adapted:
    """Passes with adapters of one layout, and the memory they read the factors from: for each row, or one for all."""

    def __init__(self, adapter: Adapter, alike: bool, shapes: Sequence[PassShape], example: DecodeInput, pool):
        numbers = adapter.layout.numbers
        self._factors = adapter.flat.new_zeros(numbers if alike else (shapes[-1].batch, numbers))
        self._alike, self._held = alike, []
        self.captured: list[_Captured] = []
        for shape in shapes:
            model = adapter.home.fixed(adapter.layout, self._factors if alike else self._factors[: shape.batch])
            self.captured.append(_Captured(model, shape, example, pool))

    def take(self, adapters: list[Adapter | None]) -> None:
        if self._held == adapters:  # robots that came together mostly do so again
            return
        rows = [self._factors] if self._alike else self._factors
        for row, adapter in zip(rows, adapters, strict=False):
            row.zero_() if adapter is None else row.copy_(adapter.flat)
        self._held = adapters


def _graph(phase: Callable[[], None], pool) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads go on decoding
        phase()
    return graph.replay
