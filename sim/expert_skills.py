"""What experts can do: take an object and put it somewhere, turn a knob."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.expert import CLOSED, OPEN, Aim
from sim.expert_view import Extent, View

UP = np.array([0.0, 0.0, 1.0])
THINNEST_M = 0.002  # fingers closer than this hold nothing
FAR_M = 0.4  # from here on a way still to go counts as all of it


@dataclass(frozen=True, kw_only=True)
class Grasp:
    """Where to take an object: fingers close along world y, pointing down."""

    offset_m: tuple[float, float] = (0.0, 0.0)
    """from the object's centre, in x and y"""
    above_bottom_m: float = 0.012
    """lowest height of the fingertips above the object's bottom"""
    below_top_m: float = 0.032
    """deepest reach below the object's top"""

    def point(self, extent: Extent) -> np.ndarray:
        """(3,) where the point between the fingertips should be, m."""
        height = max(extent.low[2] + self.above_bottom_m, extent.high[2] - self.below_top_m)
        return np.array([*(extent.centre[:2] + self.offset_m), height])


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to let go of an object."""

    target: str
    """body or site to put it into or onto; heights are counted from its top"""
    carry_m: float = 0.04
    """height of the object's bottom on the way"""
    release_m: float = 0.01
    """height of the object's bottom when the fingers open"""
    offset_m: tuple[float, float] = (0.0, 0.0)
    """from the target's centre, in x and y"""
    radius_m: float = 0.03
    """how far from there, horizontally, the object counts as delivered"""
    near_m: float = 0.01
    """horizontal distance within which the hand goes straight down"""


@dataclass(frozen=True, kw_only=True)
class PickPlace:
    """Take an object from above and let go of it over a place; without a place, lift it."""

    body: str
    """the object's root body"""
    grasp: Grasp = field(default_factory=Grasp)
    place: Place | None = None

    near_m: float = 0.01
    """horizontal distance within which the hand goes straight down"""
    hover_m: float = 0.05
    """how high above the object's top the fingertips come from"""

    def aim(self, view: View) -> Aim | None:
        """See Skill."""
        extent, eef, pinched = view.extent(self.body), view.eef, view.pinches(self.body)
        if self.place is not None and self._delivered(view, extent):
            clear = not pinched and view.closed < 0.3
            return Aim(eef + 0.1 * UP if clear else eef, OPEN)
        if pinched and view.closed > 0.9:
            return Aim(self._carry(view, extent), CLOSED)
        return self._take(view, extent, pinched)

    def progress(self, view: View) -> float:
        """See Skill: reach (to 0.3), held (0.4), carried to its place (0.8), lowered (0.9), there (1).

        Without a place, what is held lacks only the lift (0.8).
        """
        extent = view.extent(self.body)
        if self.place is not None and self._delivered(view, extent):
            return 1.0
        reach = view.eef - self.grasp.point(extent)
        # Contact is lost for a tick when a rim turns between the fingers.
        between = view.closed > 0.9 and view.gap > THINNEST_M and float(np.linalg.norm(reach)) < 2 * self.near_m
        if not (between or view.pinches(self.body)):
            return 0.3 * _nearness(reach, FAR_M)
        if self.place is None:
            return 0.8
        away = np.array([*extent.centre[:2], extent.low[2]]) - self._goal(view)
        carried = 0.4 + 0.4 * _nearness(away[:2], FAR_M)
        over_it = np.hypot(*away[:2]) < self.place.radius_m
        return carried + 0.1 * over_it * _nearness(away[2:], self.place.carry_m + 0.05)

    def _take(self, view: View, extent: Extent, pinched: bool) -> Aim:
        eef, point = view.eef, self.grasp.point(extent)
        distance, height = np.hypot(*(point - eef)[:2]), abs(eef[2] - point[2])
        missed = view.closed > 0.9 and view.gap < THINNEST_M
        if missed or (view.opening and not pinched and height < 0.03):
            return Aim(eef, OPEN)
        closing = view.closed > 0.05
        if distance < (2.5 if closing else 1.0) * self.near_m and height < (0.025 if closing else 0.01):
            return Aim(eef if closing else point, CLOSED)
        hover = extent.high[2] + self.hover_m - point[2]
        return Aim(_approach(eef, point, hover=hover, near=self.near_m), OPEN)

    def _carry(self, view: View, extent: Extent) -> np.ndarray:
        eef = view.eef
        if self.place is None:
            return eef + 0.05 * UP
        goal = self._goal(view) + eef - [*extent.centre[:2], extent.low[2]]  # the object hangs below the hand
        return _approach(eef, goal, hover=self.place.carry_m - self.place.release_m, near=self.place.near_m)

    def _goal(self, view: View) -> np.ndarray:
        """(3,) where the middle of the object's bottom should be when the fingers open."""
        assert self.place is not None
        target = view.extent(self.place.target)
        return np.array([*(target.centre[:2] + self.place.offset_m), target.high[2] + self.place.release_m])

    def _delivered(self, view: View, extent: Extent) -> bool:
        assert self.place is not None
        goal = self._goal(view)
        away = np.hypot(*(extent.centre - goal)[:2])
        return bool(away < self.place.radius_m and extent.low[2] < goal[2] + 0.015)


@dataclass(frozen=True, kw_only=True)
class TurnKnob:
    """Push one end of a knob's bar round with closed fingers, counter-clockwise seen from above."""

    body: str
    """the knob; its -y axis lies along the bar, its z axis points up"""
    joint: str
    """its hinge"""
    enough_rad: float
    """the skill is done from this angle on"""
    lever_m: float = 0.034
    """from the hinge to where the fingers push, along the bar"""
    height_m: float = 0.028
    """of the fingertips above the body's origin"""
    run_up_m: float = 0.035
    """from the bar to where the fingers come down"""

    def aim(self, view: View) -> Aim | None:
        """See Skill."""
        if view.joint(self.joint) >= self.enough_rad:
            return None
        along, ahead, contact = self._contact(view)
        away = view.eef - contact
        behind = 0.0 < -away @ ahead < self.run_up_m + 0.015
        if behind and abs(away @ along) < 0.015 and away[2] < 0.015:
            return Aim(contact + 0.06 * ahead, CLOSED, speed=1.0)
        return Aim(_approach(view.eef, contact - self.run_up_m * ahead, hover=0.06, near=0.01), CLOSED)

    def progress(self, view: View) -> float:
        """See Skill: the reach (to 0.3), then the turn."""
        turned = float(np.clip(view.joint(self.joint) / self.enough_rad, 0, 1))
        *_, contact = self._contact(view)
        return max(0.3 * _nearness(view.eef - contact, FAR_M), 0.3 + 0.7 * turned if turned > 0.05 else 0.0)

    def _contact(self, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each (3,): along the bar, the way it is pushed, and where the fingers push it, m."""
        origin, axes = view.frame(self.body)
        along, ahead = -axes[:, 1], axes[:, 0]
        return along, ahead, origin + self.lever_m * along + self.height_m * UP


def _approach(eef: np.ndarray, goal: np.ndarray, *, hover: float, near: float) -> np.ndarray:
    """The next waypoint towards goal: over it at `hover` first, then straight down; up before sideways when too low."""
    away = np.hypot(*(goal - eef)[:2])
    waypoint = goal + hover * np.clip((away - near) / 0.01, 0.0, 1.0) * UP
    too_low = waypoint[2] - eef[2]
    sideways = np.clip(1.5 - too_low / 0.04, 0.0, 1.0)
    waypoint[:2] = eef[:2] + sideways * (waypoint[:2] - eef[:2])
    return waypoint


def _nearness(away: np.ndarray, far_m: float) -> float:
    """1 there, 0 from far_m on."""
    return float(np.clip(1 - np.linalg.norm(away) / far_m, 0, 1))
