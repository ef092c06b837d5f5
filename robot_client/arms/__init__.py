"""Arms by name.  A package offers one by an entry point of the group `vla_rl.arms`; kinematic and replay are here.

An arm is a class whose constructor takes keyword arguments of simple types: they become its flags on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from robot_client.arm import Arm
from robot_client.errors import UnknownArm

GROUP = "vla_rl.arms"


def available() -> list[str]:
    """Names of the installed arms."""
    return sorted(point.name for point in entry_points(group=GROUP))


def load(name: str) -> Callable[..., Arm]:
    """The class of the arm with that name.  Raises UnknownArm, also when what it needs is not installed."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise UnknownArm(f"arm must be one of {available()}, got {name!r}")
    try:
        return found[0].load()
    except ImportError as error:
        raise UnknownArm(f"arm {name!r} needs a package that is not installed: {error}") from error
