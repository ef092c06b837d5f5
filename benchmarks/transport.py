"""What lies between a robot and a policy that answers at once: our two ways to ask, and openpi's, in turns.

    python -m benchmarks.transport [--rounds 40] [--calls 50]

Each question is two raw 224 px images, eight numbers and a sentence; each answer a chunk of 8 actions of 7 numbers,
ours with tokens and log-probabilities besides.  Contenders, each a client in a process of its own, one call at a time:

    ActStream, unary    our messages from arrays to arrays, and a server that does nothing but answer
    openpi              openpi-client, and a server of its protocol that does nothing but answer
                        (benchmarks/openpi_instant.py)
    whole ActStream,    robot_client's PolicyClient, which checks what it gets, and our server, whole but for the model:
    whole unary         observations are validated, episodes tracked, requests queued and batched
    openpi door         openpi-client, and our whole server's openpi port

Of a whole server, what validation and queue took is its own word.  Prints a table, writes
benchmarks/results/transport.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import tyro

from benchmarks.openpi_libero import openpi_environment
from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.engine import SWITCH_S
from policy_server.observation import Observed
from policy_server.server import OPTIONS as SERVER_OPTIONS
from policy_server.server import PolicyServer
from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import MAX_MESSAGE_BYTES, OPTIONS
from protos.codec import decode_tensor, encode_tensor
from robot_client.arm import ArmSpec, Limits, Observation, Task
from robot_client.client import PolicyClient
from robot_client.rollout import Rollout
from robot_client.spec import PolicySpec
from robot_client.wire import deciding, encode_request
from tests.client.scripted_policy import BINS, VOCABULARY, spec_of

RESULT = Path(__file__).parent / "results" / "transport.json"
THEIRS = Path(__file__).with_name("openpi_instant.py")
CAMERAS, SIDE_PX, STATE, ACTIONS, CHUNK = ("agentview", "robot0_eye_in_hand"), 224, 8, 7, 8
INSTRUCTION = "pick up the black bowl and place it on the plate"
FLOOR, AGAINST = "ActStream", "openpi"
WARM_UP_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """Measure the way there and back."""

    rounds: int = 40
    """Turns of each contender."""
    calls: int = 50
    """Of each turn."""
    python: str = sys.executable
    """The interpreter that openpi-client's environment is made of; numpy 1 has wheels up to Python 3.12."""
    json: Path = RESULT


@dataclass(kw_only=True)
class Taken:
    """What the calls of one contender took."""

    round_trip_ms: list[float] = field(default_factory=list)
    validated_ms: list[float] = field(default_factory=list)
    """By our server: from a request's arrival to the queue."""
    queued_ms: list[float] = field(default_factory=list)
    """From there to the model."""


# The servers.


class InstantModel:
    """A policy whose answer is there before it is asked; the server's Model."""

    first, lanes, max_weights_bytes = None, 1, 0

    def __init__(self) -> None:
        self.spec = spec_of(chunk_length=CHUNK)
        del self.spec.images[:], self.spec.state[:], self.spec.versions[:]
        for name in CAMERAS:
            self.spec.images.add(name=name, height=SIDE_PX, width=SIDE_PX, resize="lanczos3")
        for s in range(STATE):
            self.spec.state.add(name=f"state_{s}", unit="1")
        token_ids_N = np.arange(CHUNK * ACTIONS, dtype=np.int32) + np.int32(VOCABULARY - BINS)
        self._answer = DecodeAnswer(
            actions_KA=PolicySpec.of(self.spec).tokens.actions(token_ids_N).astype(np.float32),
            token_ids_N=token_ids_N,
            token_logprobs_N=np.full(CHUNK * ACTIONS, -0.5, np.float32),
            vision_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    def prepare(self, observed: Observed) -> None:
        """It does not look."""

    def decode(self, requests: Sequence[DecodeRequest], weights: Sequence[None], lane: int) -> list[DecodeAnswer]:
        return [self._answer] * len(requests)

    def warm_up(self) -> None:
        pass

    def watch(self, gone: Callable[[], object]) -> None:
        pass


def serve(link: Connection) -> None:
    """In a process of its own: tells its ports, and ends when told anything."""

    async def life() -> None:
        server = PolicyServer(
            InstantModel(),  # pyright: ignore[reportArgumentType] (nothing is published, and nobody sleeps)
            host="127.0.0.1",
            port=0,
            max_batch=8,
            max_wait_ms=0.0,  # else the robots, which take turns, would be waited for
            queue=64,
            store=None,
            episode_idle_s=600.0,
            openpi_port=0,
        )
        port = await server.start()
        await server.warm_up()
        link.send((port, server.openpi_port))
        await asyncio.to_thread(link.recv)
        await server.stop()

    sys.setswitchinterval(SWITCH_S)
    asyncio.run(life())


class AnswerAtOnce(policy_pb2_grpc.PolicyServicer):
    """Does not look, either."""

    def __init__(self) -> None:
        (answer,) = InstantModel().decode([None], [None], 0)  # pyright: ignore[reportArgumentType]
        self._reply = policy_pb2.ActReply(
            chunk=episode_pb2.Chunk(
                actions=encode_tensor(answer.actions_KA),
                token_ids=encode_tensor(answer.token_ids_N),
                token_logprobs=encode_tensor(answer.token_logprobs_N),
            )
        )

    async def Act(self, request: policy_pb2.ActRequest, context: Any) -> policy_pb2.ActReply:
        return self._reply

    async def ActStream(self, requests: AsyncIterator[policy_pb2.ActRequest], context: Any) -> None:
        async for _ in requests:
            await context.write(self._reply)


def serve_at_once(link: Connection) -> None:
    """As serve()."""

    async def life() -> None:
        server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        policy_pb2_grpc.add_PolicyServicer_to_server(AnswerAtOnce(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        link.send(port)
        await asyncio.to_thread(link.recv)
        await server.stop(None)

    sys.setswitchinterval(SWITCH_S)
    asyncio.run(life())


# The clients.


def seen() -> Observation:
    draw = np.random.default_rng(0)
    return Observation(
        images={name: draw.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8) for name in CAMERAS},
        state_S=draw.normal(size=STATE).astype(np.float32),
        instruction=INSTRUCTION,
    )


def ask_at_once(link: Connection, address: str, stream: bool) -> None:
    """In a process of its own: makes as many calls as it is told, and tells what they took."""
    observation = seen()
    with grpc.insecure_channel(address, options=OPTIONS) as channel, contextlib.suppress(EOFError):
        act, act_stream = deciding(channel)
        outbox = SimpleQueue[bytes]()
        replies = act_stream(iter(outbox.get, None)) if stream else None
        while True:
            calls = []
            for decision in range(link.recv()):
                began_s = time.perf_counter()
                request = encode_request("an episode", decision, observation, (), "raw")
                if replies is None:
                    reply = act(request)
                else:
                    outbox.put(request)
                    reply = next(replies)
                for tensor in (reply.chunk.actions, reply.chunk.token_ids, reply.chunk.token_logprobs):
                    decode_tensor(tensor)
                calls.append((1e3 * (time.perf_counter() - began_s),))
            link.send(calls)


def ask(link: Connection, address: str, stream: bool) -> None:
    """As ask_at_once(), and tells what the server says of each."""
    observation = seen()
    with PolicyClient(address, stream=stream) as client, contextlib.suppress(EOFError):
        spec = client.spec()
        arm = ArmSpec(
            name="none",
            action_names=spec.action_names,
            image_names=spec.image_names,
            state_names=spec.state_names,
            tick_rate_hz=spec.tick_rate_hz,
            lockstep=True,
            limits=Limits(low=tuple(spec.low_A), high=tuple(spec.high_A)),
        )
        episode = client.start_episode(Rollout(task=Task(name="none", instruction=INSTRUCTION)), arm)
        decision = 0
        while True:
            calls = []
            for _ in range(link.recv()):
                began_s = time.perf_counter()
                answer = client.act(episode.episode_id, decision, observation)
                taken_ms = 1e3 * (time.perf_counter() - began_s)
                calls.append((taken_ms, answer.timing.prepare_ms, answer.timing.queue_ms))
                decision += 1
            link.send(calls)


class Ours:
    def __init__(self, ask: Callable[[Connection, str, bool], None], address: str, *, stream: bool):
        self._process, self._link = begun(ask, address, stream)

    def call(self, times: int, taken: Taken) -> None:
        self._link.send(times)
        columns = (taken.round_trip_ms, taken.validated_ms, taken.queued_ms)
        for call in self._link.recv():
            for column, value in zip(columns, call, strict=False):
                column.append(value)

    def close(self) -> None:
        self._link.close()
        self._process.join()


class Theirs:
    """openpi-client."""

    def __init__(self, python: Path, address: str):
        self._process = talking(python, "ask", *address.split(":"), str(SIDE_PX), str(STATE), INSTRUCTION)

    def call(self, times: int, taken: Taken) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"openpi-client ended with code {self._process.wait()}; it said why above")
        taken.round_trip_ms += json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def begun(what: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process, and the link that is its first argument."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=what, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def talking(python: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [python, THEIRS, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )


@contextlib.contextmanager
def contenders(python: Path) -> Iterator[dict[str, Ours | Theirs]]:
    (server, link), (at_once, other_link) = begun(serve), begun(serve_at_once)
    instant = talking(python, "serve", str(CHUNK), str(ACTIONS))
    with contextlib.ExitStack() as stack:
        for process, its_link in ((server, link), (at_once, other_link)):
            stack.callback(process.join)
            stack.callback(its_link.send, None)
        stack.callback(instant.wait)
        stack.callback(instant.kill)
        (port, openpi_port), instant_port = link.recv(), other_link.recv()
        assert instant.stdout is not None
        named: dict[str, Ours | Theirs] = {
            FLOOR: Ours(ask_at_once, f"127.0.0.1:{instant_port}", stream=True),
            "unary": Ours(ask_at_once, f"127.0.0.1:{instant_port}", stream=False),
            AGAINST: Theirs(python, f"127.0.0.1:{int(instant.stdout.readline())}"),
            "whole ActStream": Ours(ask, f"127.0.0.1:{port}", stream=True),
            "whole unary": Ours(ask, f"127.0.0.1:{port}", stream=False),
            "openpi door": Theirs(python, f"127.0.0.1:{openpi_port}"),
        }
        for contender in named.values():
            stack.callback(contender.close)
        yield named


def main(config: TransportConfig) -> int:
    """1 when the floor does not hold."""
    with openpi_environment(config.python) as python, contenders(python) as named:
        taken = {name: Taken() for name in named}
        for contender in named.values():
            contender.call(WARM_UP_CALLS, Taken())
        for turn in range(config.rounds):
            first = turn % len(named)
            for name in [*named][first:] + [*named][:first]:
                named[name].call(config.calls, taken[name])
    rows = {name: figures(one) for name, one in taken.items()}
    print("| | p50, ms | p99, ms | of it validation p50 | queue p50 |\n|---|---|---|---|---|")
    for name, row in rows.items():
        apart = [f"{row[key]:.2f}" if key in row else "" for key in ("validated_p50_ms", "queued_p50_ms")]
        print(f"| {name} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {' | '.join(apart)} |")
    ratios = {key: rows[FLOOR][key] / rows[AGAINST][key] for key in ("p50_ms", "p99_ms")}
    held = all(ratio <= 1 for ratio in ratios.values())
    print(f"{FLOOR} against {AGAINST}: " + ", ".join(f"{key} x {ratio:.2f}" for key, ratio in ratios.items()))
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps({"calls": config.rounds * config.calls, "rows": rows}, indent=1) + "\n")
    return int(not held)


def figures(taken: Taken) -> dict[str, Any]:
    p50_ms, p99_ms = np.percentile(taken.round_trip_ms, [50, 99])
    row = {"p50_ms": round(p50_ms, 3), "p99_ms": round(p99_ms, 3)}
    if taken.validated_ms:
        row["validated_p50_ms"] = round(float(np.median(taken.validated_ms)), 3)
        row["queued_p50_ms"] = round(float(np.median(taken.queued_ms)), 3)
    return row


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TransportConfig, description=__doc__)))
