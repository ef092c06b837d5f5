"""Arms by name.  A package offers one by an entry point of the group `vla_rl.arms`; kinematic and replay are here.

An arm is a class whose constructor takes keyword arguments of simple types: they become its flags on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from robot_client.arm import Arm
from robot_client.errors import UnknownArm
from robot_client.plugins import Plugins

T = TypeVar("T")

ARMS = Plugins(group="vla_rl.arms", what="arm", unknown=UnknownArm)


def available() -> list[str]:
    """Names of the installed arms."""
    return ARMS.available()


def load(name: str) -> Callable[..., Arm]:
    """The class of the arm with that name.  Raises UnknownArm, also when what it needs is not installed."""
    return ARMS.load(name)


def parse(make: Callable[..., T], flags: Sequence[str], *, prog: str) -> T:
    """What it makes of its own flags on the command line of prog; a wrong one ends the program with a usage."""
    return tyro.cli(make, args=flags, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
