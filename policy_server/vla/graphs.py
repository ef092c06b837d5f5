"""Passes captured as CUDA graphs: the GPU repeats them without being told every kernel again.

A graph is of one model, one batch size and one prompt length, with adapters of one layout or without; what it reads
lies where it lay at the capture.  Off CUDA nothing is captured: the same steps run over the same fixed memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from policy_server.vla.adapters import Adapter, FactorLayout, rows_of
from policy_server.vla.derived import beside_decoding
from policy_server.vla.model import VLA
from policy_server.vla.passes import Batch, DecodeInput, Laps, Pass, PassShape, padded

WARM_UPS = 2
"""Eager runs before a capture: libraries choose kernels and set memory aside in them."""

Answers = tuple[torch.Tensor, torch.Tensor]


def graph_pool(device: torch.device) -> Any:
    """Memory that passes which never overlap may all use for what they forget; None off CUDA."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class PassGraphs:
    """The captured passes of one model, whose weights must stay where they are.

    shapes: batches of these sizes, ascending; smaller ones are padded to the next.  example: any sampled request.
    pool: a graph_pool(), which other models' passes may use as well; none given: one of its own.  row_by_row: as for
    Adapters.rows().
    """

    def __init__(
        self, vla: VLA, shapes: Sequence[PassShape], example: DecodeInput, *, pool: Any = None, row_by_row: bool = False
    ):
        self._shapes, self._example, self._row_by_row = shapes, example, row_by_row
        self._pool = pool or graph_pool(vla.device)
        self._plain = _captured([vla] * len(shapes), shapes, example, self._pool)
        self._adapted: MutableMapping[FactorLayout, dict[bool, _Adapted]] = WeakKeyDictionary()

    def admit(self, adapter: Adapter) -> None:
        """Captures passes with adapters of this one's layout: one for each row, and one for all.

        They go with the last adapter of the layout.
        """
        if adapter.layout not in self._adapted:
            kinds = (False,) if self._row_by_row else (False, True)
            with beside_decoding(adapter.flat.device):
                family = {alike: _Adapted(adapter, alike, self._shapes, self._example, self._pool) for alike in kinds}
            self._adapted[adapter.layout] = family

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
        if layout not in self._adapted:
            return None
        alike = not self._row_by_row and all(adapter is adapters[0] for adapter in adapters)
        family = self._adapted[layout][alike]
        family.take(adapters)
        return family.captured[index].run(requests, laps)


@torch.inference_mode()
def _captured(models: Sequence[VLA], shapes: Sequence[PassShape], example: DecodeInput, pool: Any) -> list[_Captured]:
    """A pass of each shape by its model, beside the passes under way.  The largest first: the others use its memory."""
    pairs = list(zip(models, shapes, strict=True))
    with beside_decoding(models[0].device):
        return [_Captured(model, shape, example, pool) for model, shape in reversed(pairs)][::-1]


class _Captured:
    """A pass that can be repeated, and the memory it reads a batch from."""

    def __init__(self, vla: VLA, shape: PassShape, example: DecodeInput, pool: Any):
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

    def __init__(self, adapter: Adapter, alike: bool, shapes: Sequence[PassShape], example: DecodeInput, pool: Any):
        numbers, layout = adapter.layout.numbers, adapter.layout
        self._factors = adapter.flat.new_zeros(numbers if alike else (shapes[-1].batch, numbers))
        self._alike, self._held = alike, rows_of([])
        # Kept, as the graphs read their memory.
        self._models = [
            adapter.home.fixed(layout, self._factors if alike else self._factors[: shape.batch]) for shape in shapes
        ]
        self.captured = _captured(self._models, shapes, example, pool)

    @torch.inference_mode()
    def take(self, adapters: list[Adapter | None]) -> None:
        held = rows_of(adapters)
        if self._held == held:  # robots that came together mostly do so again
            return
        rows = [self._factors] if self._alike else self._factors
        for row, adapter in zip(rows, adapters, strict=False):
            row.zero_() if adapter is None else row.copy_(adapter.flat)
        self._held = held


def _graph(phase: Callable[[], None], pool: Any) -> Callable[[], None]:
    """On the current stream, where it was warmed up.  Raises where it captured nothing."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*graph is empty.*")
        # Other threads go on decoding.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            phase()
    return graph.replay
