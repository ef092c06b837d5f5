"""Episodes whose privileged progress is known at every observation: of experts, and of a policy that samples.

Per task, in a folder of its own:

    expert_train, expert_held   the recorder's successful episodes, on states of the splits train and tune
    policy_train, policy_held   rollouts on the same splits through a policy server that keeps them, success or not
    progress.json               capture time of an observation -> progress; written last, so that a whole task has it

All is drawn with coarse meshes, as practice may be, so that who acted does not show in the pixels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protos.episode_file import SUFFIX, Episode, read_episode
from robot_client.arm import Observation, Task
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.rollout import Rollout
from sim.evaluate import episode_seed
from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.libero_arm import LiberoArm, SimulatedTask
from sim.local_server import served
from sim.progress import TaskProgress
from sim.recorder import Plan, Recorder
from sim.scene import Scene
from sim.suites import find_suite, find_task
from sim.turns import ShakenExpert

SPLITS = {"train": "train", "held": "tune"}
"""what an episode is for -> the split of its initial state"""
STRIDE, NOISE, NOISE_MEMORY, START_OFFSET_M = 4, 0.25, 0.85, 0.06
"""As `python -m sim demos` records."""
SLOTS = 4
NOTES = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """Episodes of each task."""

    expert_train: int = 20
    expert_held: int = 8
    policy_train: int = 8
    policy_held: int = 16


class WitnessedArm(LiberoArm):
    """Notes the progress at every observation under its capture time; draws with coarse meshes."""

    def __init__(self, scene: Scene, image_sizes: dict[str, tuple[int, int]], notes: dict[int, float]):
        super().__init__(scene=scene, image_sizes=image_sizes)
        self._progress, self._notes = TaskProgress(scene, recipe_for(scene.task)), notes

    def reset(self, task: Task) -> None:
        super().reset(
            SimulatedTask(
                name=task.name,
                instruction=task.instruction,
                initial_state=task.initial_state,
                max_ticks=task.max_ticks,
                coarse=True,
            )
        )

    def observe(self) -> Observation:
        observation = super().observe()
        self._notes[observation.capture_time_ns] = self._progress.now(success=self.state().outcome == "success")
        return observation


def record_task(task_id: str, folder: Path, amounts: Amounts, *, model: str, temperature: float) -> None:
    """Records what is missing of a task; a task that was interrupted begins anew."""
    if (folder / NOTES).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    scene, notes = Scene(find_task(task_id)), dict[int, float]()
    try:
        for purpose, split in SPLITS.items():
            states = find_suite(scene.task.suite).states(split)
            with served(model=model, episodes=folder / f"policy_{purpose}") as address, PolicyClient(address) as client:
                sizes = {image.name: (image.height, image.width) for image in client.spec().message.images}
                arms = [WitnessedArm(scene, sizes, notes) for _ in range(SLOTS)]
                work = _rollouts(scene, states, getattr(amounts, f"policy_{purpose}"), temperature)
                outcomes = [result.outcome for result in run_lockstep(arms, work, client)]
            print(f"{task_id} {split}: policy {outcomes.count('success')} of {len(outcomes)}", flush=True)
            if "error" in outcomes:
                raise RuntimeError(f"{task_id}: {outcomes.count('error')} episodes ended as errors")
            _demonstrate(arms[0], scene, states, getattr(amounts, f"expert_{purpose}"), folder / f"expert_{purpose}")
    finally:
        scene.close()
    (folder / NOTES).write_text(json.dumps(notes))


def _rollouts(scene: Scene, states: tuple[str, ...], count: int, temperature: float) -> Iterator[Rollout]:
    task = scene.task
    for number in range(count):
        state = states[number % len(states)]
        yield Rollout(
            task=Task(name=task.id, instruction=task.instruction, initial_state=state, max_ticks=task.max_ticks),
            purpose="train",
            temperature=temperature,
            seed=episode_seed(0, task.id, f"{state}.{number // len(states)}"),
        )


def _demonstrate(arm: WitnessedArm, scene: Scene, states: tuple[str, ...], count: int, out: Path) -> None:
    out.mkdir(parents=True)
    expert = Expert(scene, recipe_for(scene.task))
    shaken = ShakenExpert(expert, stride=STRIDE, noise=NOISE, noise_memory=NOISE_MEMORY)
    recorder = Recorder(arm, expert, [shaken], out=out, start_offset_m=START_OFFSET_M)
    recorded = [
        recorder.record(Plan(task=scene.task.id, index=index, initial_state=states[index % len(states)]))
        for index in range(count)
    ]
    print(f"{scene.task.id}: experts {sum(one.success for one in recorded)} of {count} in {out.name}", flush=True)


def witnessed(folder: Path, group: str) -> list[tuple[Episode, list[float]]]:
    """The episodes of one group of a task, with the progress at each of their decisions, in order of their names."""
    notes = {int(time_ns): progress for time_ns, progress in json.loads((folder / NOTES).read_text()).items()}
    episodes = [read_episode(path) for path in sorted((folder / group).glob(f"*{SUFFIX}"))]
    return [(one, [notes[item.observation.capture_time_ns] for item in one.decisions]) for one in episodes]
