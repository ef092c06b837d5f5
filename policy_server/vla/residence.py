"""Moving tensors off their device and back, in place: whoever refers to one, or to a view of it, need not know."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Lodging:
    """The memory of some tensors, on the host while they are away.

    Between leave() and come_back() nobody may use them.  Graphs that were captured over them are of no use any more:
    they come back to other addresses.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        by_address = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self._away = [(storage, storage.nbytes()) for storage in by_address.values() if storage.nbytes()]
        self._copies: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._away)

    def leave(self) -> None:
        for storage, size in self._away:
            copy = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            copy.untyped_storage().copy_(storage)
            self._copies.append(copy)
            storage.resize_(0)

    def come_back(self) -> None:
        for (storage, size), copy in zip(self._away, self._copies, strict=True):
            storage.resize_(size)
            storage.copy_(copy.untyped_storage())
        self._copies.clear()
