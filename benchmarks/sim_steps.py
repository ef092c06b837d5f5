"""Simulator steps per second beside LIBERO's own SubprocVectorEnv, in one run, and the drift from stock trajectories.

Both sides hold the same tasks in the same number of processes, get the same actions and give official pixels.  LIBERO's
environment renders at every step; ours at every K-th, when a decision is due.  The rounds alternate between the sides,
so that a busy machine slows both.

    python -m benchmarks.sim_steps
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import tyro

from sim import assets
from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.initial_states import fixed_state
from sim.libero_arm import environment_action
from sim.scene import Scene
from sim.suites import Task, find_task


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    tasks: tuple[str, ...] = ("libero_object/0", "libero_goal/1", "libero_spatial/2")
    """tasks, one after the other"""
    processes: int = 2
    """environments, each in a process of its own"""
    cameras: tuple[str, ...] = ("agentview",)
    """cameras rendered"""
    size_px: int = 128
    """side of the images"""
    ticks: int = 32
    """ticks of each environment in a round; a multiple of 8"""
    rounds: int = 3
    """rounds of each side"""
    drift_ticks: int = 120
    """length of the free-running trajectories"""
    expert_states: int = 5
    """initial states on which the expert acts in closed loop, on either step"""


def main(config: Config) -> None:
    """Print the tables."""
    print(f"{config.processes} processes, {', '.join(config.cameras)} at {config.size_px} px, {assets.asset_tree()}\n")
    print(f"{'steps/s':24}{'LIBERO':>8}{'K = 1':>8}{'K = 8':>8}{'1/LIBERO':>10}{'8/LIBERO':>10}")
    for task_id in config.tasks:
        stock, every, eighth = compare(find_task(task_id), config)
        print(
            f"{task_id:24}{stock:8.1f}{every:8.1f}{eighth:8.1f}{every / stock:9.2f}x{eighth / stock:9.2f}x", flush=True
        )
    print(f"\n{'drift from stock':24}{'tick 1':>9}{'tick 30':>9}{'tick 60':>9}{'end':>9}{'hand':>9}  success at tick")
    for task_id in config.tasks:
        print_drift(find_task(task_id), config)
    print(f"\n{'expert succeeds':24}{'stock':>9}{'ours':>9}")
    for task_id in config.tasks:
        print_experts(find_task(task_id), config)


def compare(task: Task, config: Config) -> tuple[float, float, float]:
    """Steps/s of all processes together: LIBERO's own, ours with K = 1, ours with K = 8."""
    spawn = multiprocessing.get_context("spawn")
    sides = [Side(spawn, worker, task, config) for worker in (stock_side, our_side)]
    steps = config.processes * config.ticks * config.rounds
    seconds = {(side, k): 0.0 for side, k in ((0, 1), (1, 1), (1, 8))}
    for _ in range(config.rounds):
        for side, k in seconds:
            seconds[side, k] += sides[side].run(k)
    for side in sides:
        side.close()
    stock, every, eighth = (steps / total for total in seconds.values())
    return stock, every, eighth


class Side:
    """A process that holds a side's environments and times rounds on demand."""

    def __init__(self, spawn, worker: Callable, task: Task, config: Config) -> None:
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=worker, args=(theirs, task.id, config))
        self._process.start()
        self._pipe.recv()

    def run(self, k: int) -> float:
        """Seconds that one round takes."""
        self._pipe.send(k)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(0)
        self._process.join()


def smooth_actions(config: Config) -> np.ndarray:
    """(ticks, 7) the same for everyone: a slow random walk downwards with an opening and closing gripper."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(-1, 1, (config.ticks // 8, 7))
    corners[:, 2] -= 0.5
    corners[:, 6] = np.sign(corners[:, 6])
    return np.repeat(np.clip(corners, -1, 1), 8, axis=0)


def stock_side(pipe: Connection, task_id: str, config: Config) -> None:
    """LIBERO's SubprocVectorEnv."""
    multiprocessing.set_start_method("fork", force=True)  # LIBERO's default; a spawned child has inherited "spawn"
    task = find_task(task_id)
    envs = assets.load_libero()
    arguments = {
        "bddl_file_name": str(assets.libero_root() / "bddl_files" / task.suite / f"{task.name}.bddl"),
        "camera_heights": config.size_px,
        "camera_widths": config.size_px,
        "camera_names": list(config.cameras),
    }
    vector = envs.SubprocVectorEnv([lambda: envs.OffScreenRenderEnv(**arguments)] * config.processes)
    vector.seed(0)
    vector.reset()
    states = np.stack([fixed_state(task, i) for i in range(config.processes)])
    pipe.send("ready")
    while pipe.recv():
        vector.set_init_state(states)
        vector.step(np.zeros((config.processes, 7)))
        started = time.perf_counter()
        for action in smooth_actions(config):
            vector.step(np.tile(action, (config.processes, 1)))
        pipe.send(time.perf_counter() - started)
    vector.close()


def our_side(pipe: Connection, task_id: str, config: Config) -> None:
    """As many processes of ours, driven in step like LIBERO's."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for index in range(config.processes):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=our_worker, args=(theirs, task_id, index, config), daemon=True).start()
        pipes.append(ours)
    for worker in pipes:
        worker.recv()
    pipe.send("ready")
    while k := pipe.recv():
        exchange(pipes, None)
        started = time.perf_counter()
        for chunk in smooth_actions(config).reshape(-1, k, 7):
            exchange(pipes, chunk)
        pipe.send(time.perf_counter() - started)
    for worker in pipes:
        worker.send("stop")


def exchange(pipes: Sequence[Connection], message: object) -> None:
    """Send everyone the message and wait for everyone's answer."""
    for pipe in pipes:
        pipe.send(message)
    for pipe in pipes:
        pipe.recv()


def our_worker(pipe: Connection, task_id: str, index: int, config: Config) -> None:
    """One scene: a chunk of actions in, the images after it out; None resets, "stop" ends."""
    scene = Scene(find_task(task_id))
    pipe.send("ready")
    while not isinstance(chunk := pipe.recv(), str):
        if chunk is None:
            scene.reset(str(index))
        else:
            for action in chunk:
                scene.step(action)
        pipe.send([scene.render(camera, config.size_px, config.size_px) for camera in config.cameras])


def print_drift(task: Task, config: Config) -> None:
    """The expert acts on the stock step; the same actions run freely on the compiled one."""
    stock, fast = Scene(task, fast=False), Scene(task)
    expert = Expert(stock, recipe_for(task), gain=2.0, speed=1.0)
    for scene in (stock, fast):
        scene.reset("0")
    distance, solved = [], ([], [])
    for _ in range(config.drift_ticks):
        action = environment_action(expert.action())
        for scene, verdicts in zip((stock, fast), solved, strict=True):
            verdicts.append(scene.step(action))
        distance.append(float(np.abs(stock.data.qpos - fast.data.qpos).max()))
    hand_m = float(np.abs(stock.data.site("gripper0_grip_site").xpos - fast.data.site("gripper0_grip_site").xpos).max())
    shown = "".join(f"{value:9.0e}" for value in (distance[0], distance[29], distance[59], distance[-1], hand_m))
    first = [verdicts.index(True) + 1 if True in verdicts else None for verdicts in solved]
    print(f"{task.id:24}{shown}  {first[0]} and {first[1]}", flush=True)


def print_experts(task: Task, config: Config) -> None:
    """The expert in closed loop on either step: how many states it solves, and after how many ticks."""
    ticks = []
    for fast in (False, True):
        scene = Scene(task, fast=fast)
        ticks.append([expert_ticks(scene, str(state)) for state in range(config.expert_states)])
    stock, compiled = ticks
    equal = sum(a == b for a, b in zip(stock, compiled, strict=True))
    counts = [f"{sum(t is not None for t in side)}/{config.expert_states}" for side in ticks]
    print(f"{task.id:24}{counts[0]:>9}{counts[1]:>9}  same tick in {equal}", flush=True)


def expert_ticks(scene: Scene, state: str) -> int | None:
    """Ticks until the expert succeeds; None when it does not."""
    scene.reset(state)
    expert = Expert(scene, recipe_for(scene.task), gain=2.0, speed=1.0)
    for tick in range(scene.task.max_ticks):
        if scene.step(environment_action(expert.action())):
            return tick + 1
    return None


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
