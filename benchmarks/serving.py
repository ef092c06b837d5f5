"""Decisions a second through the network, with and without batching, beside a bare decode() loop.

    python -m benchmarks.serving [--model nano|DIR] [--robots 1 2 4 8 16] [--slice-s 3] [--rounds 4]

Two servers (batching on, and --max-batch 1) and a process that only decodes are started once and take turns in short
slices, so that a disturbance of the machine hits all of them.  The robots are one more process: closed loop, one stream
each, raw 128 px images, no time spent between an answer and the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import tyro

from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import OPTIONS
from protos.codec import encode_image, encode_tensor

INSTRUCTION = "pick up the black bowl and place it on the plate"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure serving throughput and latency."""

    model: str = "nano"
    """As for `python -m policy_server serve`."""
    robots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of robots to try."""
    max_batch: int = 16
    """Of the server that batches."""
    slice_s: float = 3.0
    """How long each contender runs before the next one's turn."""
    rounds: int = 4
    """Turns of each contender."""
    threads: int = 1
    """Threads within one operation, in all three processes that decode."""
    json: Path | None = None
    """Also write the figures here."""


@dataclass(kw_only=True)
class Tally:
    """What one contender did over all its slices."""

    decisions: int = 0
    wall_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    robots_cpu_s: float = 0.0
    server_cpu_s: float = 0.0

    @property
    def rate_hz(self) -> float:
        return self.decisions / self.wall_s

    def row(self) -> dict[str, float]:
        if not self.latencies_s:
            return {"decisions_per_s": self.rate_hz}
        p50_ms, p99_ms = 1e3 * np.percentile(self.latencies_s, [50, 99])
        return {
            "decisions_per_s": self.rate_hz,
            "p50_ms": p50_ms,
            "p99_ms": p99_ms,
            "mean_batch": float(np.mean(self.batches)),
            "robots_share_of_cpu": self.robots_cpu_s / (self.robots_cpu_s + self.server_cpu_s),
        }


def main(config: BenchmarkConfig) -> None:
    os.environ["OMP_NUM_THREADS"] = str(config.threads)  # for the processes started below
    rows = []
    with (
        server(config, max_batch=config.max_batch) as batching,
        server(config, max_batch=1) as single,
        child(bare_loop, config.model, config.threads) as bare,
        child(robots_loop) as robots,
    ):
        for number in config.robots:
            contenders: dict[str, Callable[[Tally], None]] = {
                "batched": lambda tally, n=number: drive(robots, batching, [0] * n, config.slice_s, tally),
                "bare at that batch": lambda tally, n=number: decode(bare, n, config, tally),
                "max-batch 1": lambda tally, n=number: drive(robots, single, [0] * n, config.slice_s, tally),
                "bare at batch 1": lambda tally: decode(bare, 1, config, tally),
            }
            tallies = {name: Tally() for name in contenders}
            for _ in range(config.rounds):
                for name, run in contenders.items():
                    run(tallies[name])
            rows.append({"robots": number, **{name: tally.row() for name, tally in tallies.items()}})
            print_row(rows[-1])
    if config.json is not None:
        config.json.write_text(json.dumps({"config": asdict(config) | {"json": None}, "rows": rows}, indent=2))


def print_row(row: dict) -> None:
    batched, single = row["batched"], row["max-batch 1"]
    together, alone = (row[name]["decisions_per_s"] for name in ("bare at that batch", "bare at batch 1"))
    print(f"{row['robots']} robots")
    for name in ("batched", "max-batch 1"):
        values = row[name]
        print(
            f"  {name:12} {values['decisions_per_s']:7.1f} decisions/s   p50 {values['p50_ms']:6.1f} ms   "
            f"p99 {values['p99_ms']:6.1f} ms   mean batch {values['mean_batch']:4.1f}   "
            f"robots' share of CPU {values['robots_share_of_cpu']:.1%}"
        )
    print(
        f"  bare loop    {together:7.1f} decisions/s at that batch, {alone:.1f} at batch 1\n"
        f"  batched / max-batch 1 {batched['decisions_per_s'] / single['decisions_per_s']:.2f}x   "
        f"batched / bare {batched['decisions_per_s'] / together:.0%}   "
        f"max-batch 1 / bare {single['decisions_per_s'] / alone:.0%}",
        flush=True,
    )


@dataclass(frozen=True, kw_only=True)
class Server:
    address: str
    pid: int


@contextlib.contextmanager
def server(config: BenchmarkConfig, *, max_batch: int, more: Sequence[str] = ()) -> Iterator[Server]:
    """more: flags of `python -m policy_server serve`."""
    line = [sys.executable, "-m", "policy_server", "serve", "--model", config.model, "--port", "0"]
    line += ["--max-batch", str(max_batch), "--threads", str(config.threads), "--queue", "64", *more]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise SystemExit(f"no server: {' '.join(line)} says why")
        yield Server(address=words[1], pid=process.pid)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def child(loop: Callable, *args: object) -> Iterator[Connection]:
    """A process that runs loop(connection, *args) until the connection is closed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=loop, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join()


def drive(robots: Connection, target: Server, versions: Sequence[int], slice_s: float, tally: Tally) -> None:
    """A robot for each of the versions."""
    server_before_s = cpu_s(target.pid)
    robots.send((target.address, versions, slice_s))
    latencies_s, batches, wall_s, robots_cpu_s = robots.recv()
    tally.decisions += len(latencies_s)
    tally.wall_s += wall_s
    tally.latencies_s += latencies_s
    tally.batches += batches
    tally.robots_cpu_s += robots_cpu_s
    tally.server_cpu_s += cpu_s(target.pid) - server_before_s


def decode(bare: Connection, batch: int, config: BenchmarkConfig, tally: Tally) -> None:
    bare.send((min(batch, config.max_batch), config.slice_s))
    decisions, wall_s = bare.recv()
    tally.decisions += decisions
    tally.wall_s += wall_s


def cpu_s(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_loop(commands: Connection, model: str, threads: int) -> None:
    """decode() and nothing else."""
    from policy_server.batcher import DecodeRequest
    from policy_server.config import ServeConfig
    from policy_server.loading import load
    from policy_server.observation import read_observation

    policy = load(ServeConfig(model=model, threads=threads))
    prepared = [policy.prepare(read_observation(observation(policy.spec, i), policy.spec, field="")) for i in range(64)]
    requests = [
        DecodeRequest(prepared=one, version=0, temperature=1.0, seed=i, decision=0) for i, one in enumerate(prepared)
    ]
    policy.warm_up()
    with contextlib.suppress(EOFError):
        while True:
            batch, slice_s = commands.recv()
            began_s, passes = time.perf_counter(), 0
            while time.perf_counter() < began_s + slice_s:
                policy.decode(requests[:batch], [policy.first] * batch)
                passes += 1
            commands.send((passes * batch, time.perf_counter() - began_s))


def robots_loop(commands: Connection) -> None:
    """Robots that do nothing but ask."""
    with contextlib.suppress(EOFError):
        while True:
            address, versions, slice_s = commands.recv()
            commands.send(asyncio.run(ask_together(address, versions, slice_s)))


async def ask_together(
    address: str, versions: Sequence[int], slice_s: float
) -> tuple[list[float], list[int], float, float]:
    """Latencies, batch sizes, wall time and CPU time of robots of these versions that ask for slice_s."""
    latencies_s: list[float] = []
    batches: list[int] = []

    async def ask(stream: grpc.aio.StreamStreamCall, request: policy_pb2.ActRequest, until_s: float) -> None:
        while (asked_s := time.perf_counter()) < until_s:
            await stream.write(request)
            reply = await stream.read()
            assert isinstance(reply, policy_pb2.ActReply) and reply.HasField("chunk"), reply
            latencies_s.append(time.perf_counter() - asked_s)
            batches.append(reply.chunk.timing.batch_size)
            request.decision += 1

    async with contextlib.AsyncExitStack() as stack:
        robots = []
        for index, version in enumerate(versions):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OPTIONS))
            robots.append(await begin(policy_pb2_grpc.PolicyStub(channel), index, version))
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask(stream, request, began_s + slice_s) for _, stream, request in robots))
        wall_s, robots_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        for policy, stream, request in robots:
            await stream.done_writing()
            await policy.EndEpisode(
                policy_pb2.EndEpisodeRequest(episode_id=request.episode_id, outcome=episode_pb2.OUTCOME_SUCCESS)
            )
    return latencies_s, batches, wall_s, robots_cpu_s


async def begin(policy: policy_pb2_grpc.PolicyStub, index: int, version: int):
    """An open episode: the stub, its stream, and the request of its first decision."""
    spec = await policy.GetSpec(policy_pb2.GetSpecRequest())
    start = policy_pb2.StartEpisodeRequest(purpose=episode_pb2.PURPOSE_EVALUATE, temperature=1.0, version=version)
    episode_id = (await policy.StartEpisode(start)).episode_id
    request = policy_pb2.ActRequest(episode_id=episode_id, observation=observation(spec, index))
    return policy, policy.ActStream(), request


def observation(spec: policy_pb2.PolicySpec, index: int) -> episode_pb2.Observation:
    """Noise of the sizes that the policy asks for."""
    generator = np.random.default_rng(index)
    return episode_pb2.Observation(
        images={
            image.name: encode_image(generator.integers(0, 255, (image.height, image.width, 3), dtype=np.uint8))
            for image in spec.images
        },
        state=encode_tensor(generator.normal(size=len(spec.state)).astype(np.float32)),
        instruction=INSTRUCTION,
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
