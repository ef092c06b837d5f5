"""One robot's stream, as the server holds it: requests come in, answers leave in the order in which they are ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from policy_server.errors import TooSlow
from protos import policy_pb2

DEPTH = 4
"""Requests of one stream that may be under way; the rest waits in the client's flow control.  A robot has one or two
in the model, one that waits for it, and a newer one that supersedes that."""
READ_S = 10.0
"""How long an answer may wait for a robot that reads none; what a connection holds by itself does not wait."""


class RobotStream:
    """answer(request) never raises; write(reply) returns when the connection has taken the reply."""

    def __init__(
        self,
        answer: Callable[[policy_pb2.ActRequest], Awaitable[policy_pb2.ActReply]],
        write: Callable[[policy_pb2.ActReply], Awaitable[None]],
    ):
        self._answer, self._write = answer, write
        self._writing = asyncio.Lock()
        self._writing_since_s: float | None = None
        self._heard_s = time.monotonic()
        self._under_way: set[asyncio.Task] = set()
        self._unread = False

    async def serve(self, requests: AsyncIterator[policy_pb2.ActRequest]) -> None:
        """Until the robot has closed its side, or stop() or watch() has, and every answer has left.

        Raises TooSlow when the robot does not read them, and what iterating the requests raises.
        """
        self._reading = asyncio.create_task(self._read(requests))
        try:
            await asyncio.wait({self._reading})
            await asyncio.gather(*self._under_way, return_exceptions=True)
            if self._unread:
                raise TooSlow(f"answers must be read within {READ_S:g} s, and were not")
            if not self._reading.cancelled():
                self._reading.result()
        finally:
            self._cancel()

    def stop(self) -> None:
        """Nothing more is read; what is under way is answered."""
        self._reading.cancel()

    def watch(self, idle_s: float) -> None:
        """Ends the stream when nothing was asked for longer than idle_s, or its answers are not read.  Called often."""
        now_s = time.monotonic()
        if self._writing_since_s is not None and now_s - self._writing_since_s > READ_S:
            self._unread = True
            self._cancel()
        elif not self._under_way and now_s - self._heard_s > idle_s:
            self.stop()

    async def _read(self, requests: AsyncIterator[policy_pb2.ActRequest]) -> None:
        async for request in requests:
            self._heard_s = time.monotonic()
            task = asyncio.create_task(self._serve(request))
            del request  # only the task has it, for as long as the answer needs it
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            if len(self._under_way) >= DEPTH:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)

    async def _serve(self, request: policy_pb2.ActRequest) -> None:
        reply = await self._answer(request)
        del request  # while an answer waits to be read, nothing else does
        async with self._writing:
            self._writing_since_s = time.monotonic()
            try:
                await self._write(reply)
            finally:
                self._writing_since_s = None

    def _cancel(self) -> None:
        for task in (self._reading, *self._under_way):
            task.cancel()
