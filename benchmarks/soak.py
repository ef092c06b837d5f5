"""Ten minutes of sixteen robots that join and leave a server on nano, some of them badly.

    python -m benchmarks.soak [--minutes 10] [--robots 16] [--seed 0]

A robot is a process (benchmarks/soak_robot.py) that plays episodes for a while.  Then it leaves as it was meant to: at
the end of an episode, in the middle of one without a word, by SIGKILL, or by SIGSTOP, which is a machine that is there
and answers nothing any more.  Some never say anything over a stream that they open.  Another takes its place.

The server may not grow by more than 2 % after the first two minutes, may fail nobody who was well-behaved, and has to
be as empty at the end as it was at first.  Prints a table, writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import tyro

from benchmarks.memory import growth
from protos import admin_pb2, admin_pb2_grpc

RESULT = Path(__file__).parent / "results" / "soak.json"
MANNERS = {"leave": 5, "drop": 2, "kill": 2, "stop": 1, "silent": 1}
"""How a robot is, and how often."""
LIFE_S = (15.0, 75.0)
STOPPED_S = 45.0
"""A stopped process is there for so long before it is killed: longer than the server takes to notice."""
SETTLED_S = 120.0
"""What the server takes in the first two minutes does not count."""
IDLE_S = 60.0
"""Of --episode-idle-s: episodes without a robot are closed after so long."""
SAMPLE_S = 1.0
DEADLINE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Let robots come and go."""

    minutes: float = 10.0
    """How long."""
    robots: int = 16
    """At once."""
    model: str = "nano"
    """As for `python -m policy_server serve`."""
    seed: int = 0
    """Of who comes, how long each stays, and how it leaves."""


class Place:
    """Where one robot after another is at work.  `errors` are those that nobody planted."""

    def __init__(self, address: str, number: int, seed: int):
        self._address, self._chance = address, random.Random(1000 * seed + number)
        self._over = threading.Event()
        self.robots: Counter[str] = Counter()
        self.episodes = self.decisions = 0
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()

    def join(self) -> None:
        self._thread.join()

    def _go_on(self) -> None:
        while not self._over.is_set():
            (manners,) = self._chance.choices(list(MANNERS), weights=list(MANNERS.values()))
            self.robots[manners] += 1
            self._host(manners, self._chance.uniform(*LIFE_S))

    def _host(self, manners: str, life_s: float) -> None:
        """One robot, from its start to its end."""
        line = [sys.executable, "-m", "benchmarks.soak_robot", self._address, manners, str(life_s)]
        line.append(str(self._chance.getrandbits(31)))
        robot = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if manners in ("kill", "stop", "silent"):
            self._over.wait(life_s)
            robot.send_signal(signal.SIGSTOP if manners == "stop" else signal.SIGKILL)
        if manners == "stop":
            self._over.wait(STOPPED_S)
            robot.kill()
        told, complaints = robot.communicate()
        self._listen(told, complaints, manners)

    def _listen(self, told: str, complaints: str, manners: str) -> None:
        for line in told.splitlines():
            word, _, rest = line.partition(" ")
            if word == "episode":
                self.episodes, self.decisions = self.episodes + 1, self.decisions + int(rest)
            else:
                self.errors.append(f"{manners}: {line}")
        if "Traceback" in complaints:
            self.errors.append(f"{manners}: {complaints.splitlines()[-1]}")


def main(config: SoakConfig) -> None:
    with tempfile.TemporaryDirectory() as name, served(config, Path(name)) as (process, address, admin):
        empty = Sample.of(process, admin, 0.0)
        places = [Place(address, number, config.seed) for number in range(config.robots)]
        samples = watched(config, process, admin)
        for place in places:
            place.close()
        for place in places:
            place.join()
        time.sleep(IDLE_S + 5)
        after = Sample.of(process, admin, 60 * config.minutes)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        log = (Path(name) / "log").read_text()
    errors = [error for place in places for error in place.errors]
    begin_s = min(SETTLED_S, samples[-1].at_s / 5)  # the first fifth of a shorter try
    memory = growth([(sample.at_s, sample.rss_mb) for sample in samples], from_s=begin_s)
    results = {
        "minutes": config.minutes,
        "robots at once": config.robots,
        "robots": dict(sum((place.robots for place in places), Counter[str]())),
        "episodes": sum(place.episodes for place in places),
        "decisions in them": sum(place.decisions for place in places),
        "errors that were not planted": len(errors),
        "errors, some": errors[:20],
        "memory": memory,
        "before and after": {"before": vars(empty), "after": vars(after)},
        "most at once": {
            "open_episodes": max(sample.open_episodes for sample in samples),
            "files": max(sample.files for sample in samples),
        },
        "tracebacks in the server's log": log.count("Traceback"),
        "exit code": code,
        "held": {
            "memory grew by less than 2 % after the first two minutes": memory["growth"] < 0.02,
            "no error but those planted": not errors and not log.count("Traceback"),
            "nothing is held for those who are gone": after.open_episodes == 0 and after.files <= empty.files + 2,
            "exit code 0": code == 0,
        },
    }
    for what, value in results.items():
        print(f"  {what:<32}{value}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at one moment."""

    at_s: float
    rss_mb: float
    files: int
    threads: int
    open_episodes: int

    @classmethod
    def of(cls, process: subprocess.Popen, admin: admin_pb2_grpc.AdminStub, at_s: float) -> Sample:
        looked = psutil.Process(process.pid)
        status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=DEADLINE_S)
        return cls(
            at_s=round(at_s, 1),
            rss_mb=looked.memory_info().rss / 1e6,
            files=looked.num_fds(),
            threads=looked.num_threads(),
            open_episodes=status.open_episodes,
        )


def watched(config: SoakConfig, process: subprocess.Popen, admin: admin_pb2_grpc.AdminStub) -> list[Sample]:
    """Looks at the server all the while."""
    began_s, samples = time.monotonic(), list[Sample]()
    while (at_s := time.monotonic() - began_s) < 60 * config.minutes:
        samples.append(Sample.of(process, admin, at_s))
        time.sleep(SAMPLE_S)
    return samples


@contextlib.contextmanager
def served(config: SoakConfig, folder: Path) -> Iterator[tuple[subprocess.Popen, str, admin_pb2_grpc.AdminStub]]:
    line = [sys.executable, "-m", "policy_server", "serve", "--model", config.model, "--port", "0", "--admin-port", "0"]
    line += ["--episodes", str(folder / "episodes"), "--keep-gb", "0.5", "--episode-idle-s", str(IDLE_S)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        address, admin_address = (process.stdout.readline().split()[1] for _ in range(2))
        with grpc.insecure_channel(admin_address) as channel:
            yield process, address, admin_pb2_grpc.AdminStub(channel)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(tyro.cli(SoakConfig, description=__doc__))
