"""A simulator worker: the process that runs rollouts of one task at a time, several episodes interleaved on one scene.

The episodes' calls to the policy server are in flight together, so that the server can batch them; a scene renders only
when a decision is due.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protos import episode_pb2
from protos.animation import captioned
from protos.channel import Credentials
from robot_client.arm import ArmState, Observation
from robot_client.client import Client
from robot_client.connect import connect
from robot_client.drivers import run_lockstep
from robot_client.episode import EpisodeConfig
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout
from sim.corrector import Correction
from sim.job_queue import Job
from sim.libero_arm import LiberoArm
from sim.pool import Answer, Progress, Runner
from sim.report import EpisodeRecord
from sim.scene import Scene
from sim.scenes import Scenes
from sim.shifts import Shift
from sim.suites import find_task
from sim.video import VideoError, write_mp4

logger = logging.getLogger(__name__)

SERVER_PATIENCE_S = 30.0
"""How long an episode waits for a good answer before it is an error."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What every worker of a pool is told."""

    server: str
    """HOST:PORT of the policy server"""
    credentials: Credentials = field(default_factory=Credentials)
    """what it is shown"""
    slots: int = 4
    """episodes interleaved in one process"""
    replan_after: int = 0
    """execute only the first so many actions of each chunk; 0: all"""
    coarse_practice: bool = False
    """training episodes are drawn with simplified meshes"""
    shift: Shift | None = None
    """what is changed in the world"""
    correction: Correction = field(default_factory=Correction)
    """of leased practice"""
    memory_gb: float
    """size above which a process drops scenes, and then retires"""
    videos: Path | None = None
    """where videos go; None: none are made"""
    videos_per_outcome: int = 1
    """how many successes and how many failures of each task are kept as videos"""


def key_of(rollout: Rollout) -> str:
    """The rollout's name among those of one run."""
    return f"{rollout.task.name}:{rollout.task.initial_state}"


def job_of(rollout: Rollout) -> Job:
    """The rollout as a job for a pool of these workers; its task is its group."""
    return Job(key=key_of(rollout), group=rollout.task.name, payload=rollout)


def scenes_of(config: WorkerConfig) -> Scenes:
    """Where this process keeps its scenes; asking for one raises ValueError for a task or world there cannot be."""
    return Scenes(lambda task_id: Scene(find_task(task_id), shift=config.shift), budget_gb=config.memory_gb)


def make_runner(config: WorkerConfig) -> Runner:
    """What the worker process runs; called in that process."""
    scenes = scenes_of(config)
    client = connect(config.server, credentials=config.credentials, give_up_after_s=SERVER_PATIENCE_S)
    return functools.partial(_run_group, config, client, scenes)


def _run_group(
    config: WorkerConfig, client: Client, scenes: Scenes, jobs: Iterator[Job], progress: Progress
) -> Iterator[Answer]:
    first = next(jobs)
    progress("build")
    arms = arms_on(scenes, first.group, client, config.slots)

    def rollouts() -> Iterator[Rollout]:
        yield first.payload
        for job in jobs:
            progress("step")
            yield job.payload

    def observers(rollout: Rollout) -> list[Observer]:
        videos = [] if config.videos is None else [Reel(config.videos, keep=config.videos_per_outcome)]
        return [Heartbeat(progress), *videos]

    follow = EpisodeConfig(replan_after=config.replan_after)
    results = run_lockstep(arms, rollouts(), client, follow, observers=observers, on_wait=lambda: progress("step"))
    for result in results:
        yield _answer(result)
    scenes.require_budget()


def arms_on(scenes: Scenes, task: str, client: Client, slots: int) -> list[LiberoArm]:
    """So many arms, interleaved on the task's scene, that see what the client's policy wants to see."""
    scene = scenes.of(task)
    assert isinstance(scene, Scene)
    sizes = {image.name: (image.height, image.width) for image in client.spec().message.images}
    return [LiberoArm(scene=scene, image_sizes=sizes) for _ in range(slots)]


def _answer(result: EpisodeResult) -> Answer:
    task = result.rollout.task
    if result.outcome == "error":
        return Answer(key=key_of(result.rollout), error=result.message or "the episode ended as an error")
    record = EpisodeRecord(
        task=task.name,
        initial_state=task.initial_state,
        outcome=result.outcome,
        ticks=result.ticks,
        decisions=result.decisions,
        wall_s=round(result.wall_s, 2),
    )
    return Answer(key=key_of(result.rollout), value=record)


class Heartbeat(Observer):
    """Tells the pool at every tick that the work goes on."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._progress("step")


class Reel(Observer):
    """Keeps what the policy saw, and writes it as an MP4 while its task has fewer than `keep` of that outcome."""

    def __init__(self, folder: Path, *, keep: int):
        self._folder = folder
        self._keep = keep
        self._frames: list[np.ndarray] = []
        self._caption = ""

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self._caption = rollout.task.instruction

    def on_observation(self, observation: Observation) -> None:
        self._frames.append(np.concatenate(list(observation.images.values()), axis=1))

    def on_end(self, result: EpisodeResult) -> None:
        task = result.rollout.task
        stem = f"{task.name.replace('/', '-')}.{result.outcome}"
        if not self._frames or len(list(self._folder.glob(f"{stem}.*"))) >= self._keep:
            return
        frames = [captioned(frame, self._caption) for frame in self._frames]
        state = task.initial_state.replace(":", "-")
        frames_per_s = max(1, round(20 * len(frames) / max(1, result.ticks)))
        try:
            write_mp4(self._folder / f"{stem}.state-{state}.mp4", frames, frames_per_s=frames_per_s)
        except VideoError as error:
            logger.error("no video, the episode counts all the same: %s", error)
