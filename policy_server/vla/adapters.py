"""Adapters that share the base's passes: any rows of a batch may each have their own.

The base's products are computed once for the whole batch; every row adds the low-rank ones of its adapter.  An adapter
is one piece of memory, so that a batch of them is one copy, and views of it.

Shapes: B batch, I inputs, P layers that read one input, O outputs of each, R rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary, ref

import torch

from policy_server.vla.checkpoint import CheckpointError, digest, fingerprint_of, held_tensors
from policy_server.vla.derived import beside_decoding, sharing
from policy_server.vla.lora import linears, put, read_lora
from policy_server.vla.low_rank import LowRank, RowLinear, SideBySide
from policy_server.vla.model import VLA

MULTIPLE = 4
"""Ranks are filled up with zeros to a multiple of it: other widths take, on some CPUs, a kernel whose rounding depends
on the place in the batch."""


@dataclass(frozen=True)
class Site:
    """Where a pass may add a low-rank product: one layer, or several that read the same input side by side."""

    names: tuple[str, ...]
    inputs: int
    outputs: int
    """Of each layer."""

    def sizes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the factors: (I, P * R) and (P, R, O)."""
        layers = len(self.names)
        return (self.inputs, layers * width), (layers, width, self.outputs)


@dataclass(frozen=True, eq=False)
class FactorLayout:
    """Where the factors lie in an adapter's memory.  Adapters of one layout can share a pass."""

    rank: int
    sites: tuple[Site, ...]

    @functools.cached_property
    def name(self) -> str:
        """Equal for equal layouts, in any process."""
        return hashlib.sha256(repr((self.rank, self.sites)).encode()).hexdigest()

    @property
    def width(self) -> int:
        """Of the factors in memory: the rank, filled up."""
        return -(-self.rank // MULTIPLE) * MULTIPLE

    @property
    def numbers(self) -> int:
        return sum(torch.Size(size).numel() for site in self.sites for size in site.sizes(self.width))

    def views(self, flat: torch.Tensor, rows: int | None = None) -> list[LowRank]:
        """The factors at each site, in the memory of one adapter (numbers,) or of rows (rows, numbers), of so many
        first rows of a batch."""
        sizes = [size for site in self.sites for size in site.sizes(self.width)]
        parts = flat.split([torch.Size(size).numel() for size in sizes], -1)
        factors = iter([part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)])
        return [LowRank(down_IR=down, up_PRO=up, rows=rows) for down, up in zip(factors, factors, strict=True)]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of one base, on its device and in its dtype."""

    home: Adapters
    layout: FactorLayout
    flat: torch.Tensor

    def layers(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Views for each layer: its name, A (R, I) and (alpha / r) B (O, R)."""
        rank = self.layout.rank
        for site, factors in zip(self.layout.sites, self.layout.views(self.flat), strict=True):
            downs_IR, ups_RO = factors.down_IR.split(self.layout.width, -1), factors.up_PRO.unbind()
            for name, down_IR, up_RO in zip(site.names, downs_IR, ups_RO, strict=True):
                yield name, down_IR[:, :rank].T, up_RO[:rank].T

    @property
    def fingerprint(self) -> str:
        """weights_fingerprint() of a learner's model that has this adapter."""
        own = [(name, lora_A, lora_B) for name, lora_A, lora_B in self.layers() if lora_B.any()]
        digests_A = [digest(f"{name}.lora_A", lora_A) for name, lora_A, _ in own]
        digests_B = [digest(f"{name}.lora_B", lora_B) for name, _, lora_B in own]
        return fingerprint_of([*self.home.base_digests, *digests_A, *digests_B])


Rows = list["ref[Adapter] | None"]
"""Whose factors lie in each row of a batch, without keeping them."""


def rows_of(adapters: Sequence[Adapter | None]) -> Rows:
    return [adapter and ref(adapter) for adapter in adapters]


class Adapters:
    """A base's passes with adapters.  The base, laid out for decoding, stays as it is and takes no more memory.

    One pass at a time; adapters may be loaded beside it.
    """

    def __init__(self, base: VLA):
        self._base = base
        self._model = sharing(base, base.state_dict())
        self._model.language_model.fuse()
        self._products = _products(self._model)
        self._layouts = WeakValueDictionary[tuple[int, tuple[Site, ...]], FactorLayout]()  # each goes with its adapters
        self._batch: tuple[Rows, list[LowRank]] | None = None

    @functools.cached_property
    def base_digests(self) -> list[str]:
        return [digest(*named) for named in held_tensors(self._base)]

    def load(self, folder: Path | str) -> Adapter:
        """Of a folder in PEFT's layout.  Raises CheckpointError."""
        file = read_lora(self._model, folder)
        sites = tuple(site for site in self._products if any(name in file.matrices for name in site.names))
        layout = self._layouts.setdefault((file.rank, sites), FactorLayout(file.rank, sites))
        adapter = Adapter(self, layout, torch.zeros(layout.numbers))
        for name, own_A, own_B in adapter.layers():
            if name in file.matrices:
                lora_A, lora_B = file.matrices[name]
                own_A.copy_(lora_A)
                own_B.copy_(lora_B * (file.alpha / file.rank))
                if not (own_B @ own_A).isfinite().all():  # finite factors may have a product that is not
                    raise CheckpointError(f"{folder}: the product of the factors of {name} is not finite")
        like = {"device": self._model.device, "dtype": self._model.language_model.lm_head.weight.dtype}
        with beside_decoding(self._model.device):
            return Adapter(self, layout, adapter.flat.to(**like))

    @contextlib.contextmanager
    def rows(self, adapters: Sequence[Adapter], *, row_by_row: bool) -> Iterator[VLA]:
        """The model for one pass, whose row b has adapters[b], and none from there on.  They are of one layout.

        row_by_row: even where all have the same one, which would be faster as one product.
        """
        (layout,) = {adapter.layout for adapter in adapters}
        try:
            self._set(layout, self._factors(adapters, layout, row_by_row))
            yield self._model
        finally:
            for site in layout.sites:
                self._products[site].low_rank = None

    def fixed(self, layout: FactorLayout, flat: torch.Tensor) -> VLA:
        """A model of its own that reads its factors from this memory in every pass: (numbers,), or (B, numbers)."""
        twin = Adapters(self._base)
        twin._set(layout, layout.views(flat))
        return twin._model

    def forget(self) -> None:
        """Lets go of the factors of the latest pass."""
        self._batch = None

    def _set(self, layout: FactorLayout, factors: Sequence[LowRank]) -> None:
        for site, own in zip(layout.sites, factors, strict=True):
            self._products[site].low_rank = own

    def _factors(self, adapters: Sequence[Adapter], layout: FactorLayout, row_by_row: bool) -> list[LowRank]:
        """At each site of the layout."""
        if not row_by_row and all(adapter is adapters[0] for adapter in adapters):
            return layout.views(adapters[0].flat, len(adapters))
        rows = rows_of(adapters)
        if self._batch is None or self._batch[0] != rows:  # robots that came together mostly do so again
            stacked = torch.stack([adapter.flat for adapter in adapters])
            self._batch = rows, layout.views(stacked, len(adapters))
        return self._batch[1]


def adapted(
    base: VLA, adapters: Sequence[Adapter], *, row_by_row: bool = False
) -> contextlib.AbstractContextManager[VLA]:
    """What runs a pass whose first rows have these adapters of the base: the base itself where there are none."""
    return adapters[0].home.rows(adapters, row_by_row=row_by_row) if adapters else contextlib.nullcontext(base)


def _products(model: VLA) -> dict[Site, RowLinear | SideBySide]:
    """Where adapters can add to the model; layers that stand alone are replaced by ones that let them."""
    layers, names = linears(model), {layer: name for name, layer in linears(model).items()}
    fused = [product for module in model.modules() if isinstance(product := getattr(module, "fused", None), SideBySide)]
    products: dict[Site, RowLinear | SideBySide] = {}
    for product in fused:
        products[_site([names.pop(layer) for layer in product.linears], layers)] = product
    for name in names.values():
        put(model, name, product := RowLinear(layers[name]))
        products[_site([name], layers)] = product
    return products


def _site(names: Sequence[str], layers: dict[str, torch.nn.Linear]) -> Site:
    first = layers[names[0]]
    return Site(tuple(names), first.in_features, first.out_features)
