"""Hiding the server's latency: how often the arm waits, and what that does to success.

    python -m benchmarks.latency [--parts idle] [--idle-s 60] [--episodes-per-task 10]

Idle ticks, in real time: the kinematic arm at 20 Hz, and a server that answers after 50, 150 or 400 ms; asked when the
chunk is exhausted, or ahead by measured latency.  With chunks of 8 actions, which are nano's, and of 20: one question
is open at a time, so that a chunk hides a latency of up to half its length.

Success, in simulation: nano on libero_object's held-out states, greedy, the same latencies played in lockstep, as 1, 3
and 8 of the 280 ticks of an episode.
    when empty  the next chunk is asked for when the last is exhausted, and the arm holds until it is there
    in order    it is asked for as late as the latency allows, and follows on the last: nothing overlaps
    latest      it is asked for as soon as the last is in, and takes over where the arm has got to
Asked for at the same tick, in order and latest would differ only where chunks overlap: each is asked as suits it.

Prints tables, writes benchmarks/results/latency.json after each cell; what is there is not measured again.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from protos import episode_pb2
from robot_client.arm import ArmState, Task
from robot_client.arms.kinematic import KinematicArm
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep, run_real_time
from robot_client.episode import EpisodeConfig
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout
from sim.evaluate import WORKER_ENVIRONMENT, EvaluateConfig, plan
from sim.job_queue import Finished, Job
from sim.local_server import served
from sim.pool import Answer, Deadlines, Pool, Progress, Runner
from sim.report import Rate
from sim.scene import Scene
from sim.scenes import Scenes, default_budget_gb
from sim.suites import find_suite, find_task
from sim.worker import SERVER_PATIENCE_S, Heartbeat, arms_on, job_of, key_of
from tests.client.scripted_policy import Running, ScriptedPolicy, spec_of

RESULT = Path(__file__).parent / "results" / "latency.json"
RATE_HZ = 20
LATENCIES_MS = (50, 150, 400)
K = 8
"""Of nano."""
CHUNKS = (K, 20)
WARM_UP_S = 5
"""Of each cell in real time, not counted: before the first answers there is no latency to go by."""
MAX_AGE_S = 2.0
"""Asked when empty, the last of 20 actions is 1.4 s old at 400 ms: the default of 1 s would hold the arm for that."""
EMPTY = "when empty"
IDLE_MODES = {EMPTY: EpisodeConfig(ahead_ticks=0), "ahead": EpisodeConfig(ahead_ticks=None)}
SUCCESS_MODES = {
    EMPTY: EpisodeConfig(ahead_ticks=0),
    "in order": EpisodeConfig(ahead_ticks=None, overlap="in_order"),
    "latest": EpisodeConfig(ahead_ticks=K - 1, overlap="latest"),
}


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Measure what asking ahead hides of the server's latency."""

    parts: tuple[Literal["idle", "success"], ...] = ("idle", "success")
    """Idle ticks want a quiet machine; success, in lockstep, does not."""
    idle_s: int = 60
    """Of each cell in real time, after the warm-up."""
    episodes_per_task: int = 10
    """Of each cell in simulation; there are ten tasks, with ten held-out states each."""
    processes: int = 2
    """Simulator workers; one a core."""
    slots: int = 4
    """Episodes interleaved in each."""
    result: Path = RESULT
    """Where cells are kept."""


class Kept:
    """Cells by name, on disk as soon as they are measured.

    settings: of all of them.  Raises SystemExit when the file has other ones.
    """

    def __init__(self, path: Path, settings: dict):
        self._path = path
        self._figures = json.loads(path.read_text()) if path.exists() else {"settings": settings, "cells": {}}
        if self._figures["settings"] != settings:
            raise SystemExit(f"{path} was measured with {self._figures['settings']}, not {settings}: move it away")

    @property
    def cells(self) -> dict[str, dict]:
        return self._figures["cells"]

    def measure(self, name: str, how: Callable[[], dict]) -> None:
        """Does nothing when the cell is there."""
        if name in self.cells:
            return
        began_s = time.monotonic()
        self.cells[name] = how() | {"minutes": round((time.monotonic() - began_s) / 60, 1)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._figures, indent=1) + "\n")
        print(f"{name}: measured in {self.cells[name]['minutes']} minutes", flush=True)


def main(config: LatencyConfig) -> None:
    kept = Kept(config.result, {"idle_s": config.idle_s, "episodes_per_task": config.episodes_per_task})
    if "idle" in config.parts:
        for cell in itertools.product(LATENCIES_MS, CHUNKS, IDLE_MODES):
            kept.measure(idle_name(*cell), functools.partial(idle, config, *cell))
        print_idle(kept.cells)
    if "success" in config.parts:
        for cell in ((0, EMPTY), *itertools.product(LATENCIES_MS, SUCCESS_MODES)):
            kept.measure(success_name(*cell), functools.partial(success, config, *cell))
        print_success(kept.cells)


def idle_name(latency_ms: int, chunk: int, mode: str) -> str:
    return f"idle, {latency_ms} ms, K = {chunk}, {mode}"


def success_name(latency_ms: int, mode: str) -> str:
    return f"success, {latency_ms} ms, {mode}"


def idle(config: LatencyConfig, latency_ms: int, chunk: int, mode: str) -> dict:
    """In real time, against a scripted policy behind a real socket."""
    policy = ScriptedPolicy(spec_of(chunk_length=chunk, tick_rate_hz=RATE_HZ))
    policy.delay_s = latency_ms / 1e3
    ticks, watch = RATE_HZ * (WARM_UP_S + config.idle_s), Holds()
    arm, rollout = KinematicArm(size=64), Rollout(task=Task(name="idle", instruction="move", max_ticks=ticks))
    follow = replace(IDLE_MODES[mode], max_age_s=MAX_AGE_S)
    server = Running(policy)
    try:
        with PolicyClient(server.address, stream=True) as client:
            (result,) = run_real_time(arm, [rollout], client, follow, observers=lambda _: [watch])
    finally:
        server.stop()
    if result.outcome == "error":
        raise SystemExit(f"the episode was cut short: {result.message}")
    counted = watch.held[RATE_HZ * WARM_UP_S :]
    return {
        "held_per_minute": 60 * RATE_HZ * sum(counted) / len(counted),
        "held_before": sum(watch.held) - sum(counted),
        "answer_p50_ms": 1e3 * statistics.median(result.answer_s),
        "cadence": str(result.cadence),
    }


class Holds(Observer):
    """Whether the arm held, tick by tick."""

    def __init__(self) -> None:
        self.held: list[bool] = []

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self.held.append(tick.source == episode_pb2.SOURCE_HOLD)


def success(config: LatencyConfig, latency_ms: int, mode: str) -> dict:
    """Of nano on the same states as in every other cell."""
    suite = find_suite("libero_object")
    follow = replace(SUCCESS_MODES[mode], latency_ticks=latency_ms * RATE_HZ // 1000)
    with served() as address:
        evaluation = EvaluateConfig(
            server=address, suite=suite.name, protocol="held_out", episodes_per_task=config.episodes_per_task
        )
        with PolicyClient(address) as client:
            jobs = [job_of(rollout) for rollout in plan(evaluation, suite, client.spec().message.live_version)]
        runner = functools.partial(make_runner, address, follow, config.slots, default_budget_gb(config.processes))
        patience = Deadlines(step=evaluation.step_deadline_s)
        with Pool(runner, processes=config.processes, deadlines=patience, env=WORKER_ENVIRONMENT) as pool:
            return summary(list(tqdm(pool.run(jobs), total=len(jobs), unit="episode")))


def make_runner(address: str, follow: EpisodeConfig, slots: int, memory_gb: float) -> Runner:
    """What a worker process runs: sim/worker.py's, but that the arm follows the policy in a way of ours."""
    scenes = Scenes(lambda task_id: Scene(find_task(task_id)), budget_gb=memory_gb)
    client = PolicyClient(address, give_up_after_s=SERVER_PATIENCE_S)
    return functools.partial(run_group, client, scenes, follow, slots)


def run_group(
    client: PolicyClient, scenes: Scenes, follow: EpisodeConfig, slots: int, jobs: Iterator[Job], progress: Progress
) -> Iterator[Answer]:
    first = next(jobs)
    progress("build")
    arms = arms_on(scenes, first.group, client, slots)
    rollouts = (job.payload for job in itertools.chain([first], jobs))
    beat = Heartbeat(progress)
    for result in run_lockstep(
        arms, rollouts, client, follow, observers=lambda _: [beat], on_wait=lambda: progress("step")
    ):
        failed = result.outcome == "error"
        yield Answer(key=key_of(result.rollout), value=result, error=result.message if failed else None)
    scenes.require_budget()


def summary(finished: list[Finished]) -> dict:
    """The rate with its interval, and each episode."""
    results: list[EpisodeResult] = [item.value for item in finished if item.error is None]
    outcomes = [result.outcome for result in results]
    rate = Rate(
        successes=outcomes.count("success"),
        failures=outcomes.count("failure"),
        errors=len(finished) - len(results),
    )
    ticks = sum(result.ticks for result in results)
    return rate.as_json() | {
        "held_share": sum(result.holds for result in results) / ticks,
        "mean_ticks": ticks / len(results),
        "decisions": sum(result.decisions for result in results),
        "episodes": {
            key_of(result.rollout): [result.outcome, result.ticks, result.holds]
            for result in sorted(results, key=lambda result: key_of(result.rollout))
        },
    }


def print_idle(cells: dict[str, dict]) -> None:
    columns = list(itertools.product(CHUNKS, IDLE_MODES))
    print_line("held ticks a minute, of 1200", *(f"K = {chunk}, {mode}" for chunk, mode in columns))
    for latency_ms in LATENCIES_MS:
        held = [cells[idle_name(latency_ms, *column)]["held_per_minute"] for column in columns]
        print_line(f"{latency_ms} ms", *(f"{number:.0f}" for number in held))


def print_success(cells: dict[str, dict]) -> None:
    print_line("success, Wilson 95 %; share of ticks held", *SUCCESS_MODES)
    print_line("0 ms", rate_of(cells[success_name(0, EMPTY)]))
    for latency_ms in LATENCIES_MS:
        print_line(f"{latency_ms} ms", *(rate_of(cells[success_name(latency_ms, mode)]) for mode in SUCCESS_MODES))


def rate_of(cell: dict) -> str:
    low, high = cell["wilson_95"]
    share = f"{cell['successes']}/{cell['n']} [{100 * low:.1f}, {100 * high:.1f}]; {100 * cell['held_share']:.0f} %"
    return share + (f", {cell['errors']} errors" if cell["errors"] else "")


def print_line(*entries: str) -> None:
    print(f"| {' | '.join(entries)} |")


if __name__ == "__main__":
    main(tyro.cli(LatencyConfig, description=__doc__))
