"""One ActStream per robot: requests go out at once, answers come back in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue

import grpc

from protos import policy_pb2
from robot_client.errors import PolicyError, ServerLost, Superseded, of_rpc

Key = tuple[str, int]
"""Episode and decision."""


class ActStream:
    """Matches answers to requests by (episode, decision), and opens a new stream after a break.

    open_stream: the method, whose requests are bytes.  A stream has no deadline of its own: whoever asks cancels the
    future that comes too late.
    """

    def __init__(self, open_stream: grpc.StreamStreamMultiCallable, address: str):
        self._open_stream = open_stream
        self._address = address
        self._lock = threading.Lock()
        self._waiting: dict[Key, Future[policy_pb2.ActReply]] = {}
        self._unsent: dict[Key, bytes] = {}
        self._call: grpc.Call | None = None
        self._outbox: SimpleQueue[Key | None] = SimpleQueue()

    def ask(self, key: Key, request: bytes) -> Future[policy_pb2.ActReply]:
        """The reply to come.  Fails with a PolicyError when the stream breaks."""
        future: Future[policy_pb2.ActReply] = Future()
        with self._lock:
            if self._call is None:
                self._open()
            replaced = self._waiting.pop(key, None)
            self._waiting[key] = future
            self._unsent[key] = request
            self._outbox.put(key)
        if replaced is not None:
            _fail(replaced, Superseded("asked again with a newer observation"))
        return future

    def close(self) -> None:
        """Ends the stream; what is still waiting fails."""
        with self._lock:
            call, self._call = self._call, None
            self._outbox.put(None)
        if call is not None:
            call.cancel()

    def _open(self) -> None:
        self._outbox = SimpleQueue()
        self._call = self._open_stream(self._requests(self._outbox))
        threading.Thread(target=self._read, args=(self._call, self._outbox), name="act-stream", daemon=True).start()

    def _requests(self, outbox: SimpleQueue[Key | None]) -> Iterator[bytes]:
        """What is sent, as fast as the network takes it: of a decision the newest request, while somebody waits."""
        while (key := outbox.get()) is not None:
            with self._lock:
                if outbox is not self._outbox:
                    return  # what waits now goes out over a newer stream
                request, future = self._unsent.pop(key, None), self._waiting.get(key)
                if future is not None and future.cancelled():
                    del self._waiting[key]
            if request is not None and future is not None and not future.cancelled():
                yield request

    def _read(self, call, outbox: SimpleQueue[Key | None]) -> None:
        try:
            for reply in call:
                with self._lock:
                    future = self._waiting.pop((reply.episode_id, reply.decision), None)
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result(reply)
            error: PolicyError = ServerLost(f"{self._address}: the server ended the stream")
        except grpc.RpcError as broken:
            error = of_rpc(broken, self._address)
        with self._lock:
            outbox.put(None)  # lets go the thread that gRPC sends from
            lost = list(self._waiting.values())
            self._waiting.clear()
            self._unsent.clear()
            if self._call is call:
                self._call = None
        for future in lost:
            _fail(future, error)


def _fail(future: Future, error: PolicyError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
