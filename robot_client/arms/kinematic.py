"""An arm without dynamics: a gripper that goes exactly where it is told, above a drawn table.

Needs no simulator and no hardware.  Same actions and state as LIBERO's arm, one camera "agentview".
"""

from __future__ import annotations

import time

import numpy as np

from robot_client.arm import ACTION_NAMES, STATE_NAMES, ArmSpec, ArmState, Limits, Observation, Task, Workspace
from robot_client.pose import rotation, rotation_vector

METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
OPEN_M = 0.04
FINGER_STEP_M = 0.01
HOME_M = (-0.2, 0.0, 1.15)
TABLE_Z_M = 0.9
VIEW_M = 0.5
"""Half the width of what the camera shows."""


class KinematicArm:
    """A point-like gripper whose pose integrates the actions."""

    def __init__(self, *, size: int = 224, tick_rate_hz: float = 20.0, lockstep: bool = False):
        """size: of the square image, pixels.  lockstep: its clock stands still while it waits, instead of real time."""
        self._size = size
        self._spec = ArmSpec(
            name="kinematic",
            action_names=ACTION_NAMES,
            image_names=("agentview",),
            state_names=STATE_NAMES,
            tick_rate_hz=tick_rate_hz,
            lockstep=lockstep,
            limits=Limits(
                low=(-1.0,) * 6 + (0.0,),
                high=(1.0,) * 7,
                workspace=Workspace(
                    low_m=(-0.4, -0.4, TABLE_Z_M), high_m=(0.2, 0.4, 1.4), metres_per_unit=METRES_PER_UNIT
                ),
            ),
        )
        self.reset(Task(name="", instruction=""))

    @property
    def spec(self) -> ArmSpec:
        return self._spec

    def reset(self, task: Task) -> None:
        self._instruction = task.instruction
        self._tick = 0
        self._position_m = np.array(HOME_M)
        self._rotation = np.eye(3)
        self._finger_m = OPEN_M
        self._gripper = 1.0

    def state(self) -> ArmState:
        return ArmState(tick=self._tick, state_S=self._state())

    def observe(self) -> Observation:
        return Observation(
            images={"agentview": self._draw()},
            state_S=self._state(),
            instruction=self._instruction,
            capture_time_ns=time.monotonic_ns(),
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        self._tick += 1
        self._position_m = self._position_m + METRES_PER_UNIT * action_A[:3]
        self._rotation = rotation(RADIANS_PER_UNIT * action_A[3:6]) @ self._rotation
        self._gripper = float(action_A[6])
        step_m = np.clip(OPEN_M * self._gripper - self._finger_m, -FINGER_STEP_M, FINGER_STEP_M)
        self._finger_m = float(self._finger_m + step_m)
        return action_A

    def hold(self) -> np.ndarray:
        return np.array([0, 0, 0, 0, 0, 0, self._gripper], np.float32)

    def close(self) -> None:
        pass

    def _state(self) -> np.ndarray:
        fingers_m = [self._finger_m, -self._finger_m]
        return np.concatenate([self._position_m, rotation_vector(self._rotation), fingers_m]).astype(np.float32)

    def _draw(self) -> np.ndarray:
        """uint8 (size, size, 3): seen from the front, y to the right and z up; nearer (larger x) is larger."""
        size = self._size
        image = np.full((size, size, 3), (200, 215, 230), np.uint8)
        horizon = self._row(TABLE_Z_M)
        image[horizon:] = (150, 115, 80)
        image[horizon + size // 8 :: size // 8] = (135, 100, 70)
        x, y, z = self._position_m
        scale = size / (2 * VIEW_M) * (1 + 0.5 * (x - HOME_M[0]))
        row, column = self._row(z), round(size / 2 + y * size / (2 * VIEW_M))
        width, height = round(0.06 * scale), round(0.08 * scale)
        self._box(image, self._row(TABLE_Z_M) + 2, column, 2, width, (110, 80, 55))
        self._box(image, 0, column, max(row - height, 0), width // 2, (90, 90, 100))
        self._box(image, row - height, column, height // 2, width, (60, 60, 70))
        for side in (-1, 1):
            offset = round(side * (self._finger_m + 0.006) * scale)
            self._box(image, row - height // 2, column + offset, height // 2, max(2, width // 8), (220, 60, 50))
        return image

    def _row(self, z_m: float) -> int:
        return round(self._size * (0.75 - (z_m - TABLE_Z_M) / (2 * VIEW_M)))

    @staticmethod
    def _box(image: np.ndarray, top: int, centre: int, height: int, width: int, colour: tuple[int, int, int]) -> None:
        rows, columns = slice(max(top, 0), max(top + height, 0)), slice(max(centre - width, 0), max(centre + width, 0))
        image[rows, columns] = colour
