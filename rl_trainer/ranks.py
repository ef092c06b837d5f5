"""Data-parallel processes on one machine: each computes its part of a batch, gradients are summed, weights stay equal.

On a CPU, processes with one thread each beat one process with as many threads: small models spend their time between
operators, where threads wait.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

# How long a rank waits for the others: rank 0 collects experience meanwhile.  One that dies is noticed at once.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process's place among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of `count` rows this rank computes."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; the same bits on each."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def from_first(self, *numbers: float) -> list[float]:
        """Rank 0's numbers, on every rank."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            distributed.broadcast(tensor, src=0)
        return tensor.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]


def require_own_devices(size: int, device: str) -> None:
    """Raises ValueError for several ranks on a device that all would share."""
    if size > 1 and device != "cpu":
        raise ValueError(f"ranks must be 1 on {device}, which all would share, got {size}")


@contextmanager
def launched(size: int, work: Callable[..., Any], *arguments: Any) -> Iterator[Ranks]:
    """Starts ranks 1..size-1 as processes that run work(ranks, *arguments), and joins them as rank 0 itself.

    Leaves when they have ended.  Should one die, the next collective call of the others raises.
    """
    if size == 1:
        yield Ranks()
        return
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        processes = [
            context.Process(target=_other_rank, args=(rank, size, meeting, work, arguments), daemon=True)
            for rank in range(1, size)
        ]
        for process in processes:
            process.start()
        try:
            _join(0, size, meeting)
            yield Ranks(rank=0, size=size)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
            distributed.destroy_process_group()


def _other_rank(rank: int, size: int, meeting: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 hears them and tells the others when to stop
        signal.signal(number, signal.SIG_IGN)
    _join(rank, size, meeting)
    work(Ranks(rank=rank, size=size), *arguments)
    distributed.destroy_process_group()


def _join(rank: int, size: int, meeting: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE
    )
