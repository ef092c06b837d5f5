"""Scripted experts: policies on privileged state, good enough to demonstrate and to correct.

An expert's action is a function of the present physical state alone: what to do next is read off the state (is the
object pinched? is the hand above it?), never off a counter.  So it can label any state, a learner's own included.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.
from __future__ import annotations

from typing import NamedTuple, Protocol

import mujoco
import numpy as np

from sim.expert_view import View

REACH_M = 0.05  # what a full action asks of the controller in one tick (OSC_POSE's output_max)
OPEN, CLOSED = 1.0, 0.0


class Aim(NamedTuple):
    """Where the hand should go, and what the fingers should do there."""

    position: np.ndarray
    """(3,) target of the point between the fingertips, m"""
    gripper: float
    """OPEN or CLOSED"""
    speed: float | None = None
    """longest position delta here, in (0, 1]: what pushes against a load needs more; None: the expert's own"""


class Skill(Protocol):
    """One step of a recipe."""

    def aim(self, view: View) -> Aim | None:
        """What to do now; None when the skill's work is done."""
        ...

    def progress(self, view: View) -> float:
        """How much of the skill's work is done, from 0 to 1; a function of the present state, like its aim."""
        ...


class SceneState(Protocol):
    """What an expert needs of a scene."""

    model: mujoco.MjModel
    data: mujoco.MjData


class Expert:
    """Drives a recipe's first unfinished skill with a proportional controller.

    gain is in full actions per REACH_M of distance; speed is the longest position delta, in (0, 1].  A slow expert
    (1.5, 0.75: about 1 cm a tick) is cloned better than a fast one.
    """

    def __init__(self, scene: SceneState, recipe: tuple[Skill, ...], *, gain: float = 1.5, speed: float = 0.75) -> None:
        if not 0 < speed <= 1:
            raise ValueError(f"speed must be in (0, 1], got {speed}")
        self.view = View(scene.model, scene.data)
        self._recipe = recipe
        self._gain, self._speed = gain, speed

    def action(self) -> np.ndarray:
        """(7,) float64: position deltas in [-1, 1], no rotation, and the gripper in [0, 1], 1 open."""
        aim = self._aim()
        delta = self._gain * (aim.position - self.view.eef) / REACH_M
        length, speed = float(np.linalg.norm(delta)), aim.speed or self._speed
        if length > speed:
            delta *= speed / length
        return np.concatenate([delta, np.zeros(3), [aim.gripper]])

    def haste(self, action: np.ndarray) -> float:
        """How fast an action of this expert moves, 0 (fingers at work) to 1 (full speed)."""
        return min(1.0, float(np.linalg.norm(action[:3])) / self._speed)

    def _aim(self) -> Aim:
        for skill in self._recipe:
            aim = skill.aim(self.view)
            if aim is not None:
                return aim
        return Aim(self.view.eef, OPEN)
