"""A LIBERO or robosuite task behind the Arm protocol of robot_client.

Several arms may share one scene: each keeps its own episode and puts it back before it moves or looks, so that many
episodes run over one model.  The simulator's clock stands still between calls.

Images reach the policy as OpenVLA's reference protocol sends them: the raw image, which robosuite delivers upside down,
turned by 180 degrees.  That is the upright image mirrored left to right; the published policies were trained so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import tyro

from robot_client.arm import ACTION_NAMES, STATE_NAMES, ArmSpec, ArmState, Limits, Observation, Outcome, Task
from robot_client.errors import ArmError
from sim import assets
from sim.scene import Scene, State
from sim.suites import find_task

TICK_RATE_HZ = 20.0
DEFAULT_IMAGES = {"agentview": (256, 256)}


def policy_image(upright: np.ndarray) -> np.ndarray:
    """The scene's upright image (H, W, 3) as the policy expects it: mirrored left to right."""
    return np.ascontiguousarray(upright[:, ::-1])


def environment_action(action_A: np.ndarray) -> np.ndarray:
    """The policy's action (7,) in robosuite's convention: deltas within [-1, 1], gripper g -> -sign(2 g - 1)."""
    deltas = np.clip(np.asarray(action_A[:6], dtype=np.float64), -1.0, 1.0)
    return np.append(deltas, -np.sign(2.0 * float(action_A[6]) - 1.0))


def policy_action(command: np.ndarray) -> np.ndarray:
    """The policy's words, float32 (7,), for an environment command: the inverse of `environment_action`."""
    return np.append(command[:6], (1.0 - command[6]) / 2.0).astype(np.float32)


class LiberoArm:
    """One episode at a time of a simulated task."""

    def __init__(
        self,
        *,
        scene: Annotated[Scene | None, tyro.conf.Suppress] = None,
        image_sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Args:
        scene: shared with other arms; None: the arm builds its own for the task that it is reset to.
        image_sizes: camera -> height and width in pixels of what `observe` gives.
        """
        self._shared = scene
        self._scene = scene
        self._image_sizes = dict(image_sizes or DEFAULT_IMAGES)
        self._away: State | None = None  # this arm's episode while another arm has the scene
        self._task = Task(name="", instruction="")
        self._tick = 0
        self._outcome: Outcome | None = None
        self._gripper = -1.0

    @property
    def spec(self) -> ArmSpec:
        """What this arm is; no workspace box, since the tasks' tables stand at different heights."""
        return ArmSpec(
            name="libero",
            action_names=ACTION_NAMES,
            image_names=tuple(self._image_sizes),
            state_names=STATE_NAMES,
            tick_rate_hz=TICK_RATE_HZ,
            lockstep=True,
            limits=Limits(low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7),
            asset_tree=assets.asset_tree(),
        )

    def reset(self, task: Task) -> None:
        """Start the task from its initial state; ArmError says what is wrong with either."""
        try:
            scene = self._scene_for(task.name)
            if scene.occupant is not None and scene.occupant is not self:
                scene.occupant.step_aside()
            scene.occupant = self
            scene.reset(task.initial_state)
        except (ValueError, assets.SimulatorUnavailable) as error:
            raise ArmError(str(error)) from error
        self._task, self._tick, self._outcome, self._gripper, self._away = task, 0, None, -1.0, None

    def state(self) -> ArmState:
        """See Arm.  The outcome is "success" from the tick at which the task's predicate held."""
        return ArmState(tick=self._tick, state_S=self._enter().proprio(), outcome=self._outcome)

    def observe(self) -> Observation:
        """See Arm."""
        scene = self._enter()
        return Observation(
            images={
                camera: policy_image(scene.render(camera, height, width))
                for camera, (height, width) in self._image_sizes.items()
            },
            state_S=scene.proprio(),
            instruction=self._task.instruction,
            capture_time_ns=time.monotonic_ns(),
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        """See Arm."""
        command = environment_action(action_A)
        self._move(command)
        self._tick += 1
        return policy_action(command)

    def hold(self) -> np.ndarray:
        """See Arm."""
        command = np.append(np.zeros(6), self._gripper)
        self._move(command)
        return policy_action(command)

    def close(self) -> None:
        """Free the scene if the arm built it."""
        if self._scene is not None and self._shared is None:
            self._scene.close()
            self._scene = None

    def step_aside(self) -> None:
        """Keep this arm's episode while another arm uses the scene."""
        assert self._scene is not None
        self._away = self._scene.save()

    def _move(self, command: np.ndarray) -> None:
        self._gripper = command[6]
        if self._enter().step(command):
            self._outcome = "success"

    def _enter(self) -> Scene:
        """The scene, with this arm's episode in it."""
        if self._scene is None or (self._away is None and self._scene.occupant is not self):
            raise ArmError("reset must come first: this arm has no episode")
        if self._scene.occupant is not self:
            assert self._away is not None and self._scene.occupant is not None
            self._scene.occupant.step_aside()
            self._scene.occupant = self
            self._scene.restore(self._away)
            self._away = None
        return self._scene

    def _scene_for(self, task_id: str) -> Scene:
        if self._shared is not None and self._shared.task.id != task_id:
            raise ArmError(f"this arm's scene is {self._shared.task.id}, it cannot be reset to {task_id!r}")
        if self._scene is None or self._scene.task.id != task_id:
            self.close()
            self._scene = Scene(find_task(task_id))
        return self._scene
