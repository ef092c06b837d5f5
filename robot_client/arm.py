"""The Arm protocol: what a real arm, a simulated one and a recording have in common.

An arm speaks the policy's convention: images upright as the policy was trained to see them, actions in the units of
PolicySpec.action (for OpenVLA: position delta, rotation delta, gripper in [0, 1] with 1 = open).  It maps them to its
own hardware inside `observe` and `apply`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Outcome = Literal["success", "failure", "error"]

ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""OpenVLA's seven: position delta, rotation delta (axis-angle), gripper (1 = open)."""
STATE_NAMES = ("eef_x", "eef_y", "eef_z", "eef_ax", "eef_ay", "eef_az", "finger_left", "finger_right")
"""LIBERO's eight: end-effector position (m) and axis-angle (rad), finger positions (m)."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A box that the end effector must not leave."""

    low_m: tuple[float, float, float]
    high_m: tuple[float, float, float]
    metres_per_unit: float
    """How far an action of 1 along x, y or z moves the arm in one tick."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the safety gate lets through to this arm; anything beyond is clipped and recorded."""

    low: tuple[float, ...]
    """A lower bounds of an action: the step limit of a delta, the range of a gripper."""
    high: tuple[float, ...]
    workspace: Workspace | None = None
    """Needs the actions x, y, z and the state entries eef_x, eef_y, eef_z."""
    longest_move: float = math.inf
    """The speed limit: of x, y, z together (their norm), in units of the action."""
    longest_turn: float = math.inf
    """Of roll, pitch, yaw together."""
    slow_start_ticks: int = 0
    """Both grow from a tenth to the whole over the first so many actions of an episode."""

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not all(a < b for a, b in zip(self.low, self.high, strict=False)):
            raise ValueError(f"limits must be low < high in every dimension, got low {self.low}, high {self.high}")


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
    limits: Limits
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
    trouble: str = ""
    """Why the arm follows nobody before a hold has answered this: it was held up, or left alone; empty when it does."""
    blind: str = ""
    """Why its cameras cannot be relied on: a policy is not followed, but a person, who sees for himself, may drive."""
    goal_m: np.ndarray | None = None
    """(3,), where the end effector is being led, as eef_x, eef_y, eef_z; None: where it is."""


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

    def apply(self, action_A: np.ndarray) -> np.ndarray | None:
        """Executes one action for one tick; returns float32 (A,) what was really sent, in the same units.

        None when nothing was: state() then says why, and a hold follows.
        """
        ...

    def hold(self) -> np.ndarray:
        """Stays where it is for one tick; returns the action (A,) that amounts to: no motion, the gripper as it was."""
        ...

    def close(self) -> None: ...
