"""The Arm protocol: what a real arm, a simulated one and a recording have in common.

An arm speaks the policy's convention: images upright as the policy was trained to see them, actions in the units of
PolicySpec.action (for OpenVLA: position delta, rotation delta, gripper in [0, 1] with 1 = open).  It maps them to its
own hardware inside `observe` and `apply`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Outcome = Literal["success", "failure", "error"]


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """What an arm is, readable before it moves."""

    name: str
    action_names: tuple[str, ...]
    """A names, in order."""
    image_names: tuple[str, ...]
    state_names: tuple[str, ...]
    """S names, in order."""
    tick_rate_hz: float
    lockstep: bool
    """True when the arm's clock stands still between ticks (a simulator); False for real time."""
    asset_tree: str = ""
    """What a simulator shows on screen; empty for a real arm."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to do next: a reset target and an instruction."""

    name: str
    """e.g. "libero_object/3"; free text on a real arm."""
    instruction: str
    initial_state: str = ""
    """e.g. "17", "fresh:3", "seed:1017"; empty on a real arm."""
    max_ticks: int = 0
    """Step limit; 0 means none."""


@dataclass(frozen=True, kw_only=True)
class ArmState:
    """Read every tick; cheap, no images."""

    tick: int
    """Actions applied since reset."""
    state_S: np.ndarray
    """float32 (S,), the entries of ArmSpec.state_names."""
    outcome: Outcome | None = None
    """Set once the arm itself knows how the episode ended (a simulator does)."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Taken when a decision is due."""

    images: dict[str, np.ndarray]
    """Camera name -> uint8 (H, W, 3) RGB, upright for the policy."""
    state_S: np.ndarray
    """float32 (S,)."""
    instruction: str
    capture_time_ns: int = field(default=0)
    """The robot's monotonic clock (time.monotonic_ns) when the frames were captured."""


class Arm(Protocol):
    """Seven verbs.  Any of them may raise ArmError (robot_client.errors): the episode then ends as an error."""

    @property
    def spec(self) -> ArmSpec: ...

    def reset(self, task: Task) -> None:
        """Brings the arm (and, in a simulator, the scene) to the start of the task."""
        ...

    def state(self) -> ArmState: ...

    def observe(self) -> Observation: ...

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        """Executes one action for one tick; returns float32 (A,) what was really sent, in the same units."""
        ...

    def hold(self) -> None:
        """Stays where it is for one tick."""
        ...

    def close(self) -> None: ...
