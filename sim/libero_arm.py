"""A LIBERO or robosuite task behind the Arm protocol.

Several arms may share one scene: each is a virtual episode that swaps its state in when it is its turn (see
Scene.save).  The arm speaks the policy's convention:

- images as OpenVLA's protocol shows them: robosuite's raw frame, which is upside down, rotated by 180 degrees.  That is
  the scene's upright picture mirrored left to right.
- gripper g in [0, 1], 1 = open; the environment gets -sign(2g - 1), -1 = open.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from robot_client.arm import ACTION_NAMES, STATE_NAMES, ArmSpec, ArmState, Limits, Observation, Task
from robot_client.errors import ArmError
from sim import assets
from sim.scene import Scene, State
from sim.shifts import find_shift, in_world
from sim.suites import Task as SuiteTask
from sim.suites import find_task

TICK_RATE_HZ = 20.0
OPEN = 1.0


def environment_action(action_A: np.ndarray) -> np.ndarray:
    """A policy's action (7,) in the environment's words: deltas within [-1, 1], gripper -1 opens, +1 closes."""
    return np.append(np.clip(action_A[:6], -1.0, 1.0), -np.sign(2.0 * action_A[6] - 1.0))


def arm_spec(task: SuiteTask, image_names: tuple[str, ...]) -> ArmSpec:
    """What an arm on the task is; needs no scene, so that a misfit shows before one is built."""
    libero = task.simulator == "libero"
    return ArmSpec(
        name=task.simulator,
        action_names=ACTION_NAMES,
        image_names=image_names,
        state_names=STATE_NAMES,
        tick_rate_hz=TICK_RATE_HZ,
        lockstep=True,
        limits=Limits(low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7),
        asset_tree=assets.asset_tree() if libero else "robosuite's own",
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedTask(Task):
    """A task with what only a simulator can be asked for."""

    coarse: bool = False
    """Practice on simplified visual meshes, which render in a third of the time."""


class LiberoArm:
    """One episode on a scene; in lockstep, for the simulator's clock stands still between ticks.

    image_sizes: camera name -> (height, width) in pixels of what observe() renders.
    """

    def __init__(self, *, scene: Scene, image_sizes: Mapping[str, tuple[int, int]]):
        unknown = sorted(set(image_sizes) - set(scene.task.cameras))
        if unknown:
            raise ArmError(f"cameras of {scene.task.id} are {list(scene.task.cameras)}, got {unknown}")
        self.scene = scene
        self._image_sizes = dict(image_sizes)
        self._saved: State | None = None
        self._instruction = ""
        self._coarse = False
        self._ticks = 0
        self._success = False
        self._gripper = OPEN

    @property
    def spec(self) -> ArmSpec:
        spec = arm_spec(self.scene.task, tuple(self._image_sizes))
        tree = in_world(spec.asset_tree, self.scene.shift)
        return replace(spec, asset_tree=f"{tree}, coarse meshes" if self._coarse else tree)

    def reset(self, task: Task) -> None:
        """Starts an episode from task.initial_state; when that is empty, from the first of the train split."""
        if "/" in task.name and task.name != self.scene.task.id:
            raise ArmError(f"this arm's scene is {self.scene.task.id}, got task {task.name!r}")
        self._enter()
        first = "seed:0" if self.scene.task.simulator == "robosuite" else "0"
        try:
            self.scene.reset(task.initial_state or first)
        except ValueError as error:
            raise ArmError(str(error)) from error
        self._instruction = task.instruction
        self._coarse = isinstance(task, SimulatedTask) and task.coarse
        self._ticks, self._success, self._gripper = 0, False, OPEN

    def state(self) -> ArmState:
        self._enter()
        outcome = "success" if self._success else None
        return ArmState(tick=self._ticks, state_S=self.scene.proprio(), outcome=outcome)

    def observe(self) -> Observation:
        self._enter()
        images = {
            name: np.ascontiguousarray(self.scene.render(name, height, width, coarse=self._coarse)[:, ::-1])
            for name, (height, width) in self._image_sizes.items()
        }
        return Observation(
            images=images,
            state_S=self.scene.proprio(),
            instruction=self._instruction,
            capture_time_ns=time.monotonic_ns(),
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        command = environment_action(action_A)
        self._move(command)
        self._ticks += 1
        self._gripper = (1.0 - command[6]) / 2.0
        return np.array([*command[:6], self._gripper], np.float32)

    def hold(self) -> np.ndarray:
        still = np.array([0.0] * 6 + [self._gripper], np.float32)
        self._move(environment_action(still))
        return still

    def close(self) -> None:
        """The scene stays with whoever built it."""

    def _move(self, command: np.ndarray) -> None:
        self._enter()
        self._success = self.scene.step(command) or self._success

    def step_aside(self) -> None:
        """Saves this arm's episode: another arm is about to take the scene."""
        self._saved = self.scene.save()

    def _enter(self) -> None:
        """Makes this arm's episode the one that stands in the scene."""
        occupant = self.scene.occupant
        if occupant is self:
            return
        if occupant is not None:
            occupant.step_aside()
        if self._saved is not None:
            self.scene.restore(self._saved)
            self._saved = None
        self.scene.occupant = self


def build_arm(
    *, task_id: str = "libero_object/0", camera: str = "agentview", size_px: int = 128, shift: str = ""
) -> LiberoArm:
    """An arm with a scene of its own.

    task_id: suite and index, e.g. libero_object/0 or robosuite/0.
    camera: the camera to render.
    size_px: side of its images.
    shift: name of a shifted world (sim/shifts.py), e.g. camera or light; empty: the world as it is.
    """
    scene = Scene(find_task(task_id), shift=find_shift(shift))
    return LiberoArm(scene=scene, image_sizes={camera: (size_px, size_px)})
