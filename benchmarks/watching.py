"""What watching costs: the counting, in each decision; a page and a Prometheus that look, in a robot's round trip.

    python -m benchmarks.watching [--robots 4] [--slice-s 3] [--rounds 6]

One server answers the robots throughout; in every other slice of time somebody looks: a page asks for the state and
each robot's frame once a second, and Prometheus for the metrics every five.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.serving import BenchmarkConfig, Tally, child, drive, robots_loop, server
from policy_server.batcher import DecodeAnswer, Ticket
from policy_server.metrics import Metrics
from protos.channel import free_port

LOOK_S = 1.0
SCRAPE_S = 5.0
COUNTED = 20_000


@dataclass(frozen=True, kw_only=True)
class WatchingConfig:
    """Measure what it costs to be watched."""

    robots: int = 4
    """One stream each, closed loop."""
    slice_s: float = 3.0
    """How long the robots run before the other turn."""
    rounds: int = 6
    """Turns of each."""
    json: Path | None = None
    """Also write the figures here."""


def main(config: WatchingConfig) -> None:
    figures: dict = {f"counting_us_at_batch_{batch}": counting_us(batch) for batch in (1, 8)}
    port, taken_s = free_port(), dict[str, list[float]]()
    tallies = {"unwatched": Tally(), "watched": Tally()}
    with (
        server(BenchmarkConfig(), max_batch=16, more=["--http-port", str(port)]) as target,
        child(robots_loop) as robots,
    ):
        for _ in range(config.rounds):
            for name, tally in tallies.items():
                watcher = looking(port, taken_s) if name == "watched" else contextlib.nullcontext()
                with watcher:
                    drive(robots, target, [0] * config.robots, config.slice_s, tally)
    figures |= {name: tally.row() for name, tally in tallies.items()}
    figures["replies_ms"] = {
        path: {"n": len(s), "p50": 1e3 * float(np.median(s)), "max": 1e3 * max(s)} for path, s in taken_s.items()
    }
    print(json.dumps(figures, indent=2))
    if config.json is not None:
        config.json.write_text(json.dumps({"config": asdict(config) | {"json": None}, **figures}, indent=2) + "\n")


def counting_us(batch: int) -> float:
    """CPU time of one decision's counting, when so many share a pass."""
    metrics = Metrics()
    answer = DecodeAnswer(
        actions_KA=np.zeros((8, 7), np.float32),
        token_ids_N=np.zeros(56, np.int32),
        token_logprobs_N=np.zeros(56, np.float32),
        vision_ms=1.0,
        prefill_ms=2.0,
        decode_ms=3.0,
    )
    tickets, answers = [Ticket() for _ in range(batch)], [answer] * batch
    for ticket in tickets:
        ticket.submitted_s = time.monotonic()
    began_s = time.thread_time()
    for _ in range(COUNTED // batch):
        for _ in range(batch):
            with metrics.request("act"):
                metrics.prepared(0.001)
        metrics.passed(tickets, answers, time.monotonic())
    return 1e6 * (time.thread_time() - began_s) / COUNTED


@contextlib.contextmanager
def looking(port: int, taken_s: dict[str, list[float]]) -> Iterator[None]:
    """A page and a Prometheus, until the block ends; how long each reply took is added by its path."""
    stopped = threading.Event()

    def get(path: str, kind: str) -> bytes:
        began_s = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as reply:
            body = reply.read()
        taken_s.setdefault(kind, []).append(time.perf_counter() - began_s)
        return body

    def page() -> None:
        for robot in json.loads(get("state", "state"))["robots"]:
            if robot["decisions"]:
                get(f"robots/{robot['episode']}/frame", "frame")

    def every(seconds: float, look: Callable[[], object]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(OSError):  # a frame whose episode has ended meanwhile
                look()
            stopped.wait(seconds)

    watchers = [
        threading.Thread(target=every, args=(LOOK_S, page)),
        threading.Thread(target=every, args=(SCRAPE_S, lambda: get("metrics", "metrics"))),
    ]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        stopped.set()
        for watcher in watchers:
            watcher.join()


if __name__ == "__main__":
    main(tyro.cli(WatchingConfig))
