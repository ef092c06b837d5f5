"""What a suite's scenes cost on this machine: seconds of CPU for a tick, a frame, a reset and a build, and memory.

Of each task the mean of a few.  CPU time of this process, so that whoever shares the machine does not count; beside it
wall time over CPU time, which says how much of a core the process got.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from sim.evaluate import WORKER_ENVIRONMENT
from sim.libero_arm import LiberoArm, SimulatedTask
from sim.scene import Scene
from sim.scenes import resident_gb
from sim.suites import Task, find_suite

TURN = 8
"""Ticks of one arm before the other has its turn."""
HOLD = np.array([0, 0, 0, 0, 0, 0, 1.0])
DOWN = np.array([0, 0, -0.5, 0, 0, 0, 0])
"""Towards the table, where contacts are."""
LOW = np.array([-1.0] * 6 + [0.0])


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """Times a suite's scenes: ticks, frames, resets and builds, and the memory they take."""

    suite: str
    """Whose tasks."""
    tasks: tuple[int, ...] = ()
    """Their indices; none given: all."""
    processes: int = 1
    """That time at once, each its part of the tasks."""
    camera: str = "agentview"
    """What is drawn."""
    size_px: int = 128
    """Side of the images."""
    ticks: int = 40
    """Ticks of each task."""
    frames: int = 4
    """Frames of each task and of each kind of mesh, after a first one that is not counted."""
    coarse: bool = True
    """Time frames of simplified meshes too."""

    def __post_init__(self) -> None:
        tasks = find_suite(self.suite).tasks
        if unknown := [task for task in self.tasks if task not in range(len(tasks))]:
            raise ValueError(f"tasks must be in 0..{len(tasks) - 1}, got {unknown}")
        for name in ("processes", "size_px", "ticks", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(config: TimingConfig) -> None:
    """Prints one JSON object: what timings() gives, the mean over processes."""
    os.environ.update(WORKER_ENVIRONMENT)
    tasks = config.tasks or tuple(range(len(find_suite(config.suite).tasks)))
    parts = [tasks[first :: config.processes] or tasks for first in range(config.processes)]
    with ProcessPoolExecutor(config.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(timings, [replace(config, tasks=part) for part in parts]))
    print(json.dumps({name: float(np.mean([one[name] for one in found])) for name in found[0]}))


def timings(config: TimingConfig) -> dict[str, float]:
    """tick_s, frame_s, coarse_frame_s, reset_s, build_s: means over tasks, CPU seconds.

    A tick is what an arm does for it (state, controller, physics), a build all that a scene costs until its first tick
    and frames are over.  base_gb: memory of the process without a scene; scene_gb: what each adds.  slowdown: wall time
    over CPU time.
    """
    suite, watch, base_gb = find_suite(config.suite), Stopwatch(), resident_gb()
    scenes = [_time_task(suite.tasks[index], suite.states("train")[0], config, watch) for index in config.tasks]
    means_s = {f"{name}_s": float(np.mean(laps_s)) for name, laps_s in watch.cpu_s.items()}
    scene_gb = (resident_gb() - base_gb) / len(scenes)
    return {**means_s, "base_gb": base_gb, "scene_gb": scene_gb, "slowdown": watch.slowdown}


class Stopwatch:
    """CPU seconds by name, and how much of a core there was for them."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, list[float]] = {}
        self._wall_s = self._cpu_s = 0.0

    @property
    def slowdown(self) -> float:
        return self._wall_s / self._cpu_s

    @contextmanager
    def lap(self, name: str, times: int = 1) -> Iterator[None]:
        """The block does one thing so many times."""
        began_wall_s, began_cpu_s = time.perf_counter(), time.process_time()
        yield
        spent_s = time.process_time() - began_cpu_s
        self._wall_s += time.perf_counter() - began_wall_s
        self._cpu_s += spent_s
        self.cpu_s.setdefault(name, []).append(spent_s / times)


def _time_task(task: Task, state: str, config: TimingConfig, watch: Stopwatch) -> Scene:
    """Two arms take turns on the scene, as episodes of a worker do."""
    kinds = {False: "frame", True: "coarse_frame"} if config.coarse else {False: "frame"}
    size = {config.camera: (config.size_px, config.size_px)}
    starts = {
        coarse: SimulatedTask(name=task.id, instruction="", initial_state=state, max_ticks=1, coarse=coarse)
        for coarse in kinds
    }
    with watch.lap("build"):
        scene = Scene(task)
        arms = [LiberoArm(scene=scene, image_sizes=size) for _ in range(2)]
        for start in starts.values():
            arms[0].reset(start)
            arms[0].observe()
            arms[0].apply(HOLD)
    for coarse, name in kinds.items():
        for arm in arms:
            with watch.lap("reset"):
                arm.reset(starts[coarse])
        with watch.lap(name, config.frames):
            for _ in range(config.frames):
                arms[1].observe()
    turns = np.random.default_rng(0).uniform(-1, 1, (-(-config.ticks // TURN), 7)) + DOWN
    with watch.lap("tick", TURN * len(turns)):
        for arm, action_A in zip(itertools.cycle(arms), np.clip(turns, LOW, 1.0), strict=False):
            for _ in range(TURN):
                arm.state()
                arm.apply(action_A)
    return scene
