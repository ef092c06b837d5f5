"""A person at the arm: takes over, lets go, says how the episode ended, stops everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from robot_client.arm import Outcome


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the person wants of this tick."""

    action_A: np.ndarray | None = None
    """float32 (A,) in units of the policy's action, to be executed in its place; None: the policy may act."""
    outcome: Outcome | None = None
    """How the episode ended, as the person says."""
    stopped: bool = False
    """Nothing may move, until the person lets it."""


class Pilot(Protocol):
    def wish(self) -> Wish:
        """Never blocks.  An outcome is told once."""
        ...
