"""An arm that does what it is told and remembers it; it fails, succeeds or freezes its camera when told to."""

from __future__ import annotations

import time

import numpy as np

from robot_client.arm import ACTION_NAMES, STATE_NAMES, ArmSpec, ArmState, Limits, Observation, Task, Workspace
from robot_client.errors import ArmError

LIMITS = Limits(low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7)


def spec_of(
    *,
    lockstep: bool = True,
    tick_rate_hz: float = 20.0,
    action_names: tuple[str, ...] = ACTION_NAMES,
    image_names: tuple[str, ...] = ("agentview", "wrist"),
    state_names: tuple[str, ...] = STATE_NAMES,
    limits: Limits = LIMITS,
) -> ArmSpec:
    return ArmSpec(
        name="fake",
        action_names=action_names,
        image_names=image_names,
        state_names=state_names,
        tick_rate_hz=tick_rate_hz,
        lockstep=lockstep,
        limits=limits,
    )


class FakeArm:
    def __init__(
        self,
        spec: ArmSpec | None = None,
        *,
        succeed_at: int | None = None,
        fail_at: int | None = None,
        fail_reset: bool = False,
        tick_s: float = 0.0,
    ):
        self.spec = spec or spec_of()
        self.succeed_at = succeed_at
        self.fail_at = fail_at
        self.fail_reset = fail_reset
        self.tick_s = tick_s
        self.camera_works = True
        self.trouble = ""  # until a hold answers it
        self.blind = ""
        self.position_m = np.zeros(3)
        self.log: list[str] = []
        self.applied: list[np.ndarray] = []
        self.looks = 0
        self._task = Task(name="", instruction="")
        self._tick = 0
        self._capture_ns = 0

    def reset(self, task: Task) -> None:
        if self.fail_reset:
            raise ArmError("the brakes are on")
        self._task, self._tick = task, 0
        self.log.append("reset")

    def state(self) -> ArmState:
        done = self.succeed_at is not None and self._tick >= self.succeed_at
        return ArmState(
            tick=self._tick,
            state_S=self._state(),
            outcome="success" if done else None,
            trouble=self.trouble,
            blind=self.blind,
        )

    def observe(self) -> Observation:
        self.looks += 1
        if self.camera_works or not self._capture_ns:
            self._capture_ns = time.monotonic_ns()
        return Observation(
            images={name: np.full((16, 16, 3), 7, np.uint8) for name in self.spec.image_names},
            state_S=self._state(),
            instruction=self._task.instruction,
            capture_time_ns=self._capture_ns,
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        self._step("apply")
        self.applied.append(action_A)
        return action_A

    def hold(self) -> np.ndarray:
        self._step("hold")
        self.trouble = ""
        return np.zeros(len(self.spec.action_names), np.float32)

    def close(self) -> None:
        self.log.append("close")

    def _step(self, what: str) -> None:
        if self._tick == self.fail_at:
            raise ArmError(f"motor stalled at tick {self._tick}")
        time.sleep(self.tick_s)
        self._tick += 1
        self.log.append(what)

    def _state(self) -> np.ndarray:
        state_S = np.arange(len(self.spec.state_names), dtype=np.float32)
        state_S[:3] = self.position_m
        return state_S


def boxed(low_m: float, high_m: float, metres_per_unit: float) -> Limits:
    box = Workspace(low_m=(low_m,) * 3, high_m=(high_m,) * 3, metres_per_unit=metres_per_unit)
    return Limits(low=LIMITS.low, high=LIMITS.high, workspace=box)
