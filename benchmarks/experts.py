"""The scripted experts' own success per task, with Wilson intervals, on the fast step or on robosuite's own.

    python benchmarks/experts.py [--suites libero_object libero_goal] [--episodes 50] [--stock] [--noise 0]

No policy, no server, no images.  Tasks without an expert are listed and count as not measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from robot_client.arm import Task
from sim import assets
from sim.evaluate import WORKER_ENVIRONMENT, shown_assets
from sim.expert import Expert
from sim.expert_tasks import experts_of, recipe_for
from sim.job_queue import Finished, Job
from sim.pool import Answer, Deadlines, Pool, Progress, Runner
from sim.report import EpisodeRecord, by_task, outcomes_digest, rate_of
from sim.scene import Scene
from sim.suites import find_suite, find_task
from sim.turns import ShakenExpert


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Measures the experts' own success."""

    suites: tuple[str, ...] = ("libero_object", "libero_spatial", "libero_goal", "robosuite")
    """Suites to measure."""
    split: str = ""
    """Which initial states; none given: the fifty fixed ones of LIBERO, the held-out seeds of robosuite."""
    episodes: int = 50
    """Use only the first so many of them; 0: all."""
    noise: float = 0.0
    """Noise on the executed actions, as when demonstrations are recorded (0.25)."""
    stock: bool = False
    """Step with robosuite's own controller instead of the compiled one."""
    processes: int = 2
    """Simulator workers."""
    out: Path | None = None
    """JSON file to write."""


def main(config: ExpertsConfig) -> None:
    started = time.monotonic()
    jobs = [job for suite in config.suites for job in jobs_of(config, suite)]
    runner = functools.partial(make_runner, config)
    patience = Deadlines(step=300.0)
    with Pool(runner, processes=config.processes, env=WORKER_ENVIRONMENT, deadlines=patience) as pool:
        finished = as_far_as_it_goes(pool, jobs)
    episodes = [item.value for item in finished if item.error is None]
    failed = [f"{item.job.key}: {item.error}" for item in finished if item.error is not None]
    print(table(config, episodes))
    print(f"{time.monotonic() - started:.0f} s, errors {len(failed)}, outcomes {outcomes_digest(episodes)[:16]}")
    for line in failed:
        print(line)
    if config.out:
        tasks = {task: rate_of(of_task).as_json() for task, of_task in by_task(episodes).items()}
        config.out.write_text(json.dumps({"tasks": tasks, "errors": failed}, indent=2) + "\n", encoding="utf-8")


def as_far_as_it_goes(pool: Pool, jobs: list[Job]) -> list[Finished]:
    """All jobs, or those that have ended when Ctrl-C comes."""
    finished: list[Finished] = []
    with contextlib.suppress(KeyboardInterrupt):
        for item in tqdm(pool.run(jobs), total=len(jobs), unit="episode", smoothing=0.1):
            finished.append(item)
    return finished


def jobs_of(config: ExpertsConfig, suite_name: str) -> list[Job]:
    suite = find_suite(suite_name)
    split = config.split or ("held_out" if suite.simulator == "robosuite" else "paper")
    states = suite.states(split)[: config.episodes or None]
    return [
        Job(key=f"{task.id}:{state}", group=task.id, payload=state) for task in experts_of(suite) for state in states
    ]


def make_runner(config: ExpertsConfig) -> Runner:
    """What a worker process runs; called in that process."""
    assets.choose_renderer()
    return functools.partial(_run_group, config)


def _run_group(config: ExpertsConfig, jobs: Iterator[Job], progress: Progress) -> Iterator[Answer]:
    scene: Scene | None = None
    for job in jobs:
        if scene is None:
            progress("build")
            scene = Scene(find_task(job.group), fast=not config.stock)
        yield Answer(key=job.key, value=episode(scene, job.payload, config.noise, progress))
    if scene is not None:
        scene.close()


def episode(scene: Scene, state: str, noise: float, progress: Progress) -> EpisodeRecord:
    """One episode; its noise is a function of the initial state."""
    started = time.monotonic()
    scene.reset(state)
    expert = Expert(scene, recipe_for(scene.task))
    shaken = ShakenExpert(expert, stride=1, noise=noise, noise_memory=0.85)
    task = Task(name=scene.task.id, instruction=scene.task.instruction, initial_state=state)
    shaken.start(task, np.random.default_rng(int(state.rpartition(":")[2])))
    success, ticks = False, 0
    while not success and ticks < scene.task.max_ticks:
        progress("step")
        action = shaken.action(expert.action())
        success = scene.step([*np.clip(action[:6], -1, 1), -np.sign(2 * action[6] - 1)])
        ticks += 1
    return EpisodeRecord(
        task=scene.task.id,
        initial_state=state,
        outcome="success" if success else "failure",
        ticks=ticks,
        wall_s=round(time.monotonic() - started, 2),
    )


def table(config: ExpertsConfig, episodes: list[EpisodeRecord]) -> str:
    """Per task and suite: successes, n, rate, interval, mean length of the successes."""
    step = "robosuite's own step" if config.stock else "the compiled step"
    lines = [f"scripted experts on {step}, noise {config.noise:g}"]
    for name in config.suites:
        suite = find_suite(name)
        mine = [one for one in episodes if one.task.startswith(f"{name}/")]
        tasks = by_task(mine)
        lines.append(f"{name}: {rate_of(mine)}; {shown_assets(suite)}")
        for task in suite.tasks:
            if task.id in tasks:
                ticks = [one.ticks for one in tasks[task.id] if one.outcome == "success"]
                length = f"{np.mean(ticks):4.0f} ticks" if ticks else "         -"
                lines.append(f"  {task.index:>2} {rate_of(tasks[task.id])}  {length}  {task.name}")
            else:
                lines.append(f"  {task.index:>2} no expert  {task.name}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(ExpertsConfig))
