"""A profile: what a lab states about its arm once, in a TOML file, and everyone relies on afterwards.

    arm = "franka"

    [hardware]                      # keyword arguments of the arm's class
    host = "172.16.0.2"

    [scale]                         # what an action of 1 is, a tick
    metres = 0.01
    radians = 0.05

    [home]
    joints_rad = [0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785]

    [workspace]                     # of the end effector, in the frame of the policy's states
    low_m = [0.25, -0.35, 0.02]
    high_m = [0.75, 0.35, 0.6]

The other tables have defaults, which limit speed, reach and step.  No default knows the joints' limits: the profiles in
docs/profiles state them, as [motion] joints_low_rad and joints_high_rad.
"""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from robot_client.errors import BadProfile
from robot_client.pose import Pose
from robot_client.servo import MotionLimits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  # not installed where Python has its own

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What an action of 1 amounts to in one tick; LIBERO's own 0.05 m and 0.5 rad are 1 m/s and 10 rad/s at 20 Hz."""

    metres: float = 0.01
    radians: float = 0.05

    def __post_init__(self) -> None:
        for name in ("metres", "radians"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How the policy's world and tool lie to the robot's: a rotation is a vector, axis times angle."""

    base_m: Triple = (0.0, 0.0, 0.0)
    """The robot's base, in the frame that the policy's states and actions are given in."""
    base_rad: Triple = (0.0, 0.0, 0.0)
    tool_rad: Triple = (0.0, 0.0, 0.0)
    """The policy's end effector, against the robot's tool centre point, which the robot's own settings place."""

    @property
    def base(self) -> Pose:
        return Pose.of(self.base_m, self.base_rad)

    @property
    def tool(self) -> Pose:
        return Pose.of((0.0, 0.0, 0.0), self.tool_rad)


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where every episode begins."""

    joints_rad: tuple[float, ...]
    opening: float = 1.0
    """The policy's gripper: 0 closed, 1 open."""
    speed: float = 0.2
    """Fraction of the robot's full speed."""
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.joints_rad or not np.isfinite(self.joints_rad).all():
            raise ValueError(f"joints_rad must be finite angles, one for each joint, got {self.joints_rad}")
        if not (0 <= self.opening <= 1 and 0 < self.speed <= 1 and self.patience_s > 0):
            raise ValueError(
                "opening must be in [0, 1], speed in (0, 1] and patience_s above 0, "
                f"got {self.opening}, {self.speed} and {self.patience_s}"
            )


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where the end effector may go, in the frame that the policy's states and actions are given in."""

    low_m: Triple
    high_m: Triple

    def __post_init__(self) -> None:
        if not (np.less(self.low_m, self.high_m).all() and np.isfinite([self.low_m, self.high_m]).all()):
            raise ValueError(f"low_m must be below high_m, both finite, got {self.low_m} and {self.high_m}")


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """How the policy's gripper, 0 closed to 1 open, drives the robot's."""

    binary: bool = True
    """Only fully open or fully closed, changed when the policy is past the middle by `hysteresis`."""
    hysteresis: float = 0.1
    finger_m: float = 0.04
    """How far each finger is from the middle when open: the policy's state entries finger_left, finger_right."""
    low: float = 0.0
    """The least and the most opening that the robot's gripper is ever told: binary, its closed and its open."""
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1 and 0 <= self.hysteresis < 0.5 and self.finger_m > 0):
            raise ValueError(
                "0 <= low < high <= 1, hysteresis in [0, 0.5) and finger_m above 0 are needed, "
                f"got {self.low}, {self.high}, {self.hysteresis} and {self.finger_m}"
            )

    @property
    def range(self) -> tuple[float, float]:
        """The policy's gripper is let through so far: all of it where it only says which of the two."""
        return (0.0, 1.0) if self.binary else (self.low, self.high)

    def decided(self, asked: float, *, before: float) -> float:
        """What the policy's gripper amounts to, given what it was before."""
        if not self.binary:
            return asked
        return before if abs(asked - 0.5) <= self.hysteresis else float(asked > 0.5)

    def told(self, gripper: float) -> float:
        """What the robot's is told for the policy's."""
        return self.low + gripper * (self.high - self.low) if self.binary else gripper


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One arm in one lab."""

    arm: str
    hardware: dict[str, Any]
    home: Home
    workspace: Box
    tick_rate_hz: float = 20.0
    expire_ticks: float = 2.0
    """A command that the next one does not follow within so many ticks stops the arm."""
    slow_start_s: float = 2.0
    """The speed limit grows from a tenth to the whole over the first so many seconds of an episode."""
    step: float = 1.0
    """The largest single number of a move that is let through, in units of the action."""
    scale: Scale = field(default_factory=Scale)
    frame: Frame = field(default_factory=Frame)
    gripper: Gripper = field(default_factory=Gripper)
    motion: MotionLimits = field(default_factory=MotionLimits)

    def __post_init__(self) -> None:
        for name in ("tick_rate_hz", "expire_ticks", "step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.slow_start_s < math.inf:
            raise ValueError(f"slow_start_s must be at least 0 and finite, got {self.slow_start_s}")
        low, high = self.gripper.range
        if not low <= self.home.opening <= high:
            raise ValueError(f"home.opening must be within the gripper's {low} to {high}, got {self.home.opening}")


def read_profile(path: Path) -> Profile:
    """Raises BadProfile, which names the file, the entry, what was got and what there is."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadProfile(f"{path}: {error}") from error
    try:
        return _build(Profile, table, "")
    except ValueError as error:
        raise BadProfile(f"{path}: {error}") from error


def _build(kind: type, table: Any, where: str) -> Any:
    """A dataclass from a table; raises ValueError."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}")
    known: dict[str, Field] = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(set(table) - set(known)):
        raise ValueError(f"{where or 'the profile'} has entries {sorted(known)}, got {unknown}")
    required = {name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING}
    if missing := sorted(required - set(table)):
        raise ValueError(f"{where or 'the profile'} must state {missing}")
    kinds = get_type_hints(kind)
    values = {name: _value(kinds[name], value, f"{where}.{name}".lstrip(".")) for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return _build(kind, value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind == dict[str, Any] and isinstance(value, dict):
        return value
    length = 3 if kind == Triple else None
    if kind in (Triple, tuple[float, ...]) and isinstance(value, list) and len(value) == (length or len(value)):
        return tuple(_value(float, entry, where) for entry in value)
    raise ValueError(f"{where} must be {_name(kind)}, got {value!r}")


def _name(kind: Any) -> str:
    names = {float: "a number", bool: "true or false", str: "text", Triple: "three numbers"}
    return names.get(kind, "a list of numbers" if kind == tuple[float, ...] else "a table")
