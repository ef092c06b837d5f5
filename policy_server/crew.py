"""A few threads beside the event loop, for what would hold up the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Crew:
    """`size` threads, in turn.  Work that is given up before its turn is never begun, and nothing of it is held."""

    def __init__(self, size: int, name: str):
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """What work(*args) gives, or raises.  Once begun it is done to the end, though nobody may wait for it."""
        waiting = [args]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*waiting.pop()))
        finally:
            waiting.clear()  # the threads forget what was given up only when its turn has come
