"""Closed loop: episodes a minute of `python -m sim evaluate` over the network, server and simulator on the same cores.

    python benchmarks/closed_loop.py [--task 8] [--episodes 60] [--processes 2] [--slots 4] [--server HOST:PORT]

Counts the whole evaluation, workers' start and scene building included, and beside it the rate once they work.  Prints
a table; where the time of the cores went is read from the processes' own clocks.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from sim.evaluate import EvaluateConfig, evaluate
from sim.local_server import served

FLOOR_PER_MINUTE = 0.8 * 48
"""80 % of what a throwaway trial reached in one process without a network (bowl tasks, two cores)."""


@dataclass(frozen=True, kw_only=True)
class ClosedLoopConfig:
    """Measures the closed loop's throughput on one task."""

    server: str = ""
    """A policy server; none given: one is started with the embedded default model."""
    suite: str = "libero_goal"
    """The suite of the task."""
    task: int = 8
    """Its index; libero_goal 8 is "put the bowl on the plate"."""
    protocol: str = "fresh"
    """Which initial states."""
    episodes: int = 60
    """How many of them."""
    processes: int = 2
    """Simulator workers."""
    slots: int = 4
    """Episodes interleaved in each."""
    temperature: float = 0.0
    """0 is greedy."""
    cores: int = 2
    """Everything runs on the first so many cores."""


def main(config: ClosedLoopConfig) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.cores])  # inherited by server and workers
    with served(config.server) as address, tempfile.TemporaryDirectory() as folder:
        children = {child.pid for child in psutil.Process().children()}
        before = cpu_s(children)
        report = evaluate(
            EvaluateConfig(
                server=address,
                suite=config.suite,
                tasks=(config.task,),
                protocol=config.protocol,  # pyright: ignore[reportArgumentType]
                episodes_per_task=config.episodes,
                processes=config.processes,
                slots=config.slots,
                temperature=config.temperature,
                videos=0,
                out=Path(folder),
            )
        )
        server_s = cpu_s(children) - before
    ticks = [episode.ticks for episode in report.episodes]
    decisions = sum(episode.decisions for episode in report.episodes)
    working_s = report.wall_s - report.setup_s
    rows = {
        "episodes a minute, whole run": f"{report.episodes_per_minute:.1f} (floor {FLOOR_PER_MINUTE:.0f})",
        "episodes a minute once the workers work": f"{60 * len(ticks) / working_s:.1f}",
        "ticks a second once the workers work": f"{sum(ticks) / working_s:.0f}",
        "decisions (rendered frames) a second": f"{decisions / working_s:.1f}",
        "mean ticks an episode": f"{sum(ticks) / len(ticks):.0f}",
        "K": f"{report.chunk_length}",
        "outcomes": f"{report.rate}",
        "server's share of the cores": f"{100 * server_s / report.wall_s / config.cores:.0f} %" if children else "-",
    }
    print(report.headline)
    for name, value in rows.items():
        print(f"  {name:<42} {value}")
    print(f"  {dataclasses.asdict(config)}")


def cpu_s(pids: set[int]) -> float:
    """User and system seconds that the processes have used."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main(tyro.cli(ClosedLoopConfig, description=__doc__))
