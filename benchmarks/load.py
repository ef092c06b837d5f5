"""Robots that do nothing but ask, in a process of their own, and remember what became of every call.

Every other robot uses a stream, every other pair follows the live version; all sample at temperature 1.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import grpc

from benchmarks.serving import observation
from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import OPTIONS

DEADLINE_S = 60.0
ANSWERED = "ANSWERED"
GONE = "UNAVAILABLE"
"""The server is gone, or going."""

What = Literal["start", "act", "end"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.  Times are of the machine's monotonic clock, which all its processes share."""

    what: What
    robot: int
    began_s: float
    ended_s: float
    outcome: str
    """ANSWERED, or the name of a gRPC status"""
    said: str = ""
    """with a refusal"""
    episode_id: str = ""
    sequence: int = 0
    """of an end that was acknowledged"""
    version: int = -1
    tokens: bytes = b""
    logprobs: bytes = b""
    pass_ms: float = 0.0
    """of the model, for the whole batch"""


class Load:
    """The robots of another process, from start() to stop()."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def start(self, address: str, robots: int, *, decisions: int, spare_s: float = 0.0) -> None:
        """They play episodes of so many decisions, and rest spare_s after each answer."""
        self._pipe.send((address, robots, decisions, spare_s))

    def stop(self) -> list[Call]:
        """Every robot ends its episode, if there is a server; every call there was."""
        self._pipe.send(None)
        return self._pipe.recv()


@contextlib.contextmanager
def loading() -> Iterator[Load]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield Load(here)
    finally:
        here.close()
        process.join()


def _serve(pipe: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            address, number, decisions, spare_s = pipe.recv()
            over = threading.Event()
            robots = [Robot(address, index, decisions, spare_s, over) for index in range(number)]
            for robot in robots:
                robot.start()
            pipe.recv()
            over.set()
            for robot in robots:
                robot.join()
            pipe.send([call for robot in robots for call in robot.calls])


class Robot(threading.Thread):
    """Plays episodes until it is over, or a call fails."""

    def __init__(self, address: str, index: int, decisions: int, spare_s: float, over: threading.Event):
        super().__init__(daemon=True)
        self.calls: list[Call] = []
        self._address, self._index, self._decisions = address, index, decisions
        self._spare_s, self._over = spare_s, over

    def run(self) -> None:
        with grpc.insecure_channel(self._address, options=OPTIONS) as channel, contextlib.suppress(grpc.RpcError):
            policy = policy_pb2_grpc.PolicyStub(channel)
            spec = policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=DEADLINE_S)
            seen = observation(spec, self._index)
            ask = Stream(policy) if self._index % 2 else policy.Act
            while not self._over.is_set():
                self._play(policy, ask, seen)

    def _play(self, policy: policy_pb2_grpc.PolicyStub, ask, seen: episode_pb2.Observation) -> None:
        """Raises RpcError when the server is gone."""
        start = policy_pb2.StartEpisodeRequest(
            purpose=episode_pb2.PURPOSE_EVALUATE, temperature=1.0, follow_live=self._index % 4 > 1
        )
        episode_id = self._call("start", policy.StartEpisode, start, "").episode_id
        for decision in range(self._decisions):
            request = policy_pb2.ActRequest(episode_id=episode_id, decision=decision, observation=seen)
            self._call("act", ask, request, episode_id)
            time.sleep(self._spare_s)
            if self._over.is_set():
                break
        end = policy_pb2.EndEpisodeRequest(episode_id=episode_id, outcome=episode_pb2.OUTCOME_SUCCESS)
        self._call("end", policy.EndEpisode, end, episode_id)

    def _call(self, what: What, call, request, episode_id: str):
        began_s = time.monotonic()
        try:
            reply = call(request, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            outcome, said = error.code().name, error.details()  # pyright: ignore[reportAttributeAccessIssue]
            self._note(what, began_s, outcome, said=said, episode_id=episode_id)
            raise
        except StopIteration:
            self._note(what, began_s, GONE, said="the server ended the stream", episode_id=episode_id)
            raise grpc.RpcError(GONE) from None
        if what == "act" and not reply.HasField("chunk"):  # a refusal, in a stream
            outcome = next(code.name for code in grpc.StatusCode if code.value[0] == reply.refusal.code)
            self._note(what, began_s, outcome, said=reply.refusal.message, episode_id=episode_id)
            raise grpc.RpcError(outcome)
        told = {"sequence": reply.sequence} if what == "end" else {}
        if what == "act":
            chunk, timing = reply.chunk, reply.chunk.timing
            told = {"version": chunk.version, "tokens": chunk.token_ids.data, "logprobs": chunk.token_logprobs.data}
            told["pass_ms"] = timing.vision_ms + timing.prefill_ms + timing.decode_ms
        self._note(what, began_s, ANSWERED, episode_id=episode_id, **told)
        return reply

    def _note(self, what: What, began_s: float, outcome: str, **told) -> None:
        call = Call(what=what, robot=self._index, began_s=began_s, ended_s=time.monotonic(), outcome=outcome, **told)
        self.calls.append(call)


class Stream:
    """Asks over a stream as if it were a call."""

    def __init__(self, policy: policy_pb2_grpc.PolicyStub):
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._replies = policy.ActStream(iter(self._outbox.get, None))

    def __call__(self, request: policy_pb2.ActRequest, timeout: float) -> policy_pb2.ActReply:
        self._outbox.put(request)
        return next(self._replies)
