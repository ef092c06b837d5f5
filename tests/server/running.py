"""A real server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from policy_server.episode_store import EpisodeStore
from policy_server.server import PolicyServer
from protos import policy_pb2_grpc, rollout_pb2_grpc
from protos.channel import address_of

DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "max_batch": 4,
    "max_wait_ms": 5.0,
    "queue": 8,
    "episode_idle_s": 600.0,
}


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    address: str
    channel: grpc.Channel
    server: PolicyServer
    loop: asyncio.AbstractEventLoop
    model: Any

    @property
    def policy(self) -> policy_pb2_grpc.PolicyStub:
        return policy_pb2_grpc.PolicyStub(self.channel)

    @property
    def rollouts(self) -> rollout_pb2_grpc.RolloutsStub:
        return rollout_pb2_grpc.RolloutsStub(self.channel)

    @property
    def admin_address(self) -> str:
        return f"127.0.0.1:{self.server.admin_port}"

    def begin_stop(self):
        """Starts a clean stop, once; gives its future."""
        return self._stopping

    @functools.cached_property
    def _stopping(self):
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)


@contextlib.contextmanager
def serving(
    model: Any, *, episodes: Path | None = None, store: EpisodeStore | None = None, warm: bool = True, **options: Any
) -> Iterator[RunningServer]:
    """Serves the model on a free port until the block ends.  With warm=False it stays NOT_SERVING."""
    options = DEFAULTS | options
    if episodes is not None:
        store = EpisodeStore(episodes)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def build() -> tuple[PolicyServer, int]:
        server = PolicyServer(model, store=store, **options)
        port = await server.start()
        if warm:
            await server.warm_up()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(build(), loop).result(60)
    address = address_of(options["host"], port)
    channel = grpc.insecure_channel(address)
    running = RunningServer(address=address, channel=channel, server=server, loop=loop, model=model)
    try:
        with channel:
            yield running
    finally:
        running.begin_stop().result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def eventually(condition: Callable[[], object], *, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
