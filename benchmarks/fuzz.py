"""Ten thousand requests, valid and not, against a live server, and what became of them.

    python -m benchmarks.fuzz [--requests 10000] [--nano-requests 1000] [--seed 0]

What is drawn, and what must come back, is in tests/server/fuzzing.py.  Most go to a server on a stand-in for the model,
which answers at once; some to nano, with --deterministic, so that the neighbour's tokens have to be equal to the bit.
Each server is a process of its own: it must not crash, log a traceback, or end with another code than 0 when told to.
Prints a table, writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.server.fuzzing import Neighbour, Range, Shot, shots

RESULT = Path(__file__).parent / "results" / "fuzz.json"
STAND_IN = """
import signal, sys, threading
from pathlib import Path
from policy_server.version_store import VersionStore
from tests.server.fake_admin import FakeWeights, administered
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
model, folder = FakeWeights(), Path(sys.argv[1])
versions = VersionStore(folder / "versions", first=model.fingerprint(model.first), keep=4)
with administered(model, versions=versions, episodes=folder / "episodes") as (server, _):
    print("SERVING", server.address, flush=True)
    print("ADMIN", server.admin_address, flush=True)
    over.wait()
"""
NANO = ["-m", "policy_server", "serve", "--port", "0", "--admin-port", "0", "--deterministic", "--max-batch", "2"]
SHOWN = 20
"""So many of what was wrong are kept."""


@dataclass(frozen=True, kw_only=True)
class FuzzConfig:
    """Shoot at the policy server."""

    requests: int = 10_000
    """At the stand-in."""
    nano_requests: int = 1_000
    """At nano."""
    seed: int = 0
    """Of what is drawn."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that is shot at."""

    process: subprocess.Popen
    address: str
    admin_address: str

    @property
    def rss_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def main(config: FuzzConfig) -> None:
    results = {}
    for name, requests in (("stand-in", config.requests), ("nano", config.nano_requests)):
        results[name] = shoot(name, requests, config.seed)
        print_result(name, results[name])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def shoot(name: str, requests: int, number: int) -> dict:
    """Fires so many at a server of that name, and gives what became of them."""
    wrongs: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with started(name, Path(folder)) as target:
            shooting = Range(target.address, target.admin_address)
            rss_mb, began_s = target.rss_mb, time.monotonic()

            @settings(
                max_examples=requests,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            )
            @seed(number)
            @given(shots(shooting.spec))
            def fire(shot: Shot) -> None:
                if wrong := shooting.fire(shot):
                    wrongs.append(f"{shot.kind} {shot.method}: {wrong}")

            with Neighbour(target.address) as neighbour:
                fire()
                alive = shooting.alive()
            taken_s = time.monotonic() - began_s
            grown_mb = target.rss_mb - rss_mb
            shooting.close()
            target.process.send_signal(signal.SIGTERM)
            code = target.process.wait(60)
        log = (Path(folder) / "log").read_text()
    return {
        "requests": sum(shooting.fired.values()),
        "by kind": dict(shooting.fired),
        "by outcome": dict(shooting.codes.most_common()),
        "wrong": len(wrongs),
        "wrong, some": wrongs[:SHOWN],
        "neighbour's answers": neighbour.answers,
        "neighbour disturbed": neighbour.disturbed[:SHOWN],
        "alive at the end": alive,
        "exit code": code,
        "tracebacks in its log": log.count("Traceback"),
        "seconds": round(taken_s, 1),
        "rss_mb": [round(rss_mb, 1), round(rss_mb + grown_mb, 1)],
    }


@contextlib.contextmanager
def started(name: str, folder: Path) -> Iterator[Target]:
    line = ["-c", STAND_IN, str(folder)]
    if name == "nano":
        line = [*NANO, "--episodes", str(folder / "episodes"), "--keep-versions", "4"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        address, admin_address = (process.stdout.readline().split()[1] for _ in range(2))
        yield Target(process=process, address=address, admin_address=admin_address)
    finally:
        process.kill()
        process.wait()


def print_result(name: str, result: dict) -> None:
    print(f"{name}: {result['requests']} requests in {result['seconds']:.0f} s")
    for what in ("by kind", "by outcome"):
        print(f"  {what:<24}" + ", ".join(f"{count} {key}" for key, count in result[what].items()))
    for what in ("wrong", "neighbour's answers", "alive at the end", "exit code", "tracebacks in its log", "rss_mb"):
        print(f"  {what:<24}{result[what]}")
    for wrong in [*result["wrong, some"], *result["neighbour disturbed"]]:
        print(f"  BROKEN {wrong}")


if __name__ == "__main__":
    main(tyro.cli(FuzzConfig, description=__doc__))
