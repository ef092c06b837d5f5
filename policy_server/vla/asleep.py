"""Weights that wait in host memory while somebody else computes on their device."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Asleep:
    """Copies of tensors, which stay as they are until lie_down(): then nobody may compute with them before get_up().

    Views of one memory stay that.  They come back to other addresses: what was captured with them (a CUDA graph) is of
    no more use.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        storages = {storage.data_ptr(): storage for tensor in tensors for storage in [tensor.untyped_storage()]}
        # A file that is mapped into memory cannot be let go, and takes no room on a device.
        self._kept = [(storage, _copy(storage)) for storage in storages.values() if storage.resizable()]

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes() for _, copy in self._kept)

    def lie_down(self) -> None:
        """Their device has their memory back, and all that nobody uses."""
        for storage, _ in self._kept:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def get_up(self) -> None:
        """Raises torch.OutOfMemoryError where the device has no room for them all; they are to lie down again then."""
        for storage, copy in self._kept:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def _copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage(storage.nbytes(), device="cpu").copy_(storage)
