"""A picture of a policy at work: a few simulated episodes over the network, rendered smoothly, as MP4 and animation."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from protos import episode_pb2
from protos.animation import captioned, side_by_side
from protos.channel import Credentials
from robot_client.arm import ArmState, Task
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.episode import EpisodeConfig
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout
from sim import assets
from sim.evaluate import episode_seed
from sim.libero_arm import LiberoArm
from sim.local_server import served
from sim.scene import Scene
from sim.suites import Task as SuiteTask
from sim.suites import find_task
from sim.video import write_gif, write_mp4

logger = logging.getLogger(__name__)

TICK_RATE_HZ = 20
HOLD_S = 1.0
"""How long the last frame stands."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs a policy on a few tasks and shows what it does."""

    server: str = ""
    """HOST:PORT of a policy server; none given: one is started with the embedded default model."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    tasks: tuple[str, ...] = ()
    """Tasks such as libero_object/0, one episode each; none given: three of LIBERO's, or robosuite's without LIBERO."""
    state: int = 40
    """Which initial state; by default the first that the model was never trained on."""
    temperature: float = 0.0
    """0 is greedy."""
    replan_after: int = 0
    """Execute only the first so many actions of each chunk, then ask again; 0: all."""
    frame_every: int = 2
    """Ticks between two frames."""
    size_px: int = 192
    """Side of each episode's picture."""
    max_bytes: int = 1_900_000
    """Limit for the animation."""
    out: Path = Path("runs/demo")
    """Writes <out>.gif and <out>.mp4."""


def main(config: DemoConfig) -> int:
    """Runs the episodes, writes the pictures, says how it went."""
    tasks = [find_task(task) for task in config.tasks or default_tasks()]
    clips = []
    with served(config.server) as address, PolicyClient(address, credentials=config.credentials) as client:
        sizes = {image.name: (image.height, image.width) for image in client.spec().message.images}
        for task in tasks:
            clip, result = film(task, config, client, sizes)
            clips.append(clip)
            print(f"{task.id}: {task.instruction}: {result.outcome} after {result.ticks} ticks {result.message}")
    frames_per_s = round(TICK_RATE_HZ / config.frame_every)
    frames = side_by_side(clips, columns=min(3, len(clips)), hold=round(HOLD_S * frames_per_s))
    write_mp4(config.out.with_suffix(".mp4"), frames, frames_per_s=frames_per_s)
    write_gif(config.out.with_suffix(".gif"), frames, frames_per_s=frames_per_s, max_bytes=config.max_bytes)
    print(f"watch {config.out.with_suffix('.gif')} or {config.out.with_suffix('.mp4')}")
    return 0


def default_tasks() -> tuple[str, ...]:
    """Three tasks that can be built on this machine."""
    if assets.has_libero():
        return ("libero_object/0", "libero_object/1", "libero_object/2")
    return ("robosuite/0",)


def film(
    task: SuiteTask, config: DemoConfig, client: PolicyClient, sizes: dict[str, tuple[int, int]]
) -> tuple[list[np.ndarray], EpisodeResult]:
    """One episode of the task and its frames."""
    state = f"seed:{2000 + config.state}" if task.simulator == "robosuite" else str(config.state)
    rollout = Rollout(
        task=Task(name=task.id, instruction=task.instruction, initial_state=state, max_ticks=task.max_ticks),
        seed=episode_seed(0, task.id, state),
        temperature=config.temperature,
        purpose="evaluate",
    )
    scene = Scene(task)
    camera = Camera(scene, task.cameras[0], config.size_px, every=config.frame_every)
    arm = LiberoArm(scene=scene, image_sizes=sizes)
    try:
        follow = EpisodeConfig(replan_after=config.replan_after)
        (result,) = run_lockstep([arm], [rollout], client, follow, observers=lambda _: [camera])
    finally:
        scene.close()
    return [captioned(frame, task.instruction) for frame in camera.frames], result


class Camera(Observer):
    """Renders the scene at every few ticks, beside what the policy sees."""

    def __init__(self, scene: Scene, camera: str, size_px: int, *, every: int):
        self._scene, self._camera, self._size_px, self._every = scene, camera, size_px, every
        self.frames: list[np.ndarray] = []

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        if state.tick % self._every == 0:
            self.frames.append(self._scene.render(self._camera, self._size_px, self._size_px))
