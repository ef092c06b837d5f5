"""A person at the arm: takes over, lets go, says how the episode ended, stops everything.

    Device      what a person holds or presses (robot_client/pilots has them by name); what is done with it is a Gesture
    Together    several devices as one Pilot: their gestures become a Wish, in units of the policy's action

Shape: A numbers an action.  A 6 is x, y, z and the turns about them: roll, pitch, yaw.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from protos import episode_pb2
from robot_client.arm import ACTION_NAMES, ArmSpec, ArmState, Outcome
from robot_client.errors import PilotError
from robot_client.observer import Observer
from robot_client.rollout import Rollout

logger = logging.getLogger(__name__)

FULL = 0.5
"""What full deflection drives: this fraction of the most that the arm's limits let through."""
LINGER_S = 1.0
"""A device that nobody need hold keeps the policy out for so long after it drove; the arm stands still meanwhile."""
GRIPPER = ACTION_NAMES.index("gripper")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the person wants of this tick."""

    action_A: np.ndarray | None = None
    """float32 (A,) in units of the policy's action, to be executed in its place; None: the policy may act."""
    outcome: Outcome | None = None
    """How the episode ended, as the person says."""
    stopped: str = ""
    """Why nothing may move, until the person lets it; empty when it may."""


class Pilot(Protocol):
    def wish(self) -> Wish:
        """Never blocks.  An outcome is told once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gesture:
    """What a person does with one device.  A press is told once, however short it was."""

    drive_6: np.ndarray | None = None
    """Each in [-1, 1] of full deflection: x forward, y to the left, z up, for one who looks the way the arm does, and
    right-handed turns about them.  Zeros: the arm stands still under the person's hand.  None: the policy may act."""
    grips: bool = False
    """An open gripper is to close, a closed one to open: while the device drives."""
    outcome: Outcome | None = None
    stops: str = ""
    """Why nothing may move; it stays so until a device lets go and none stops."""
    lets_go: bool = False
    """What was stopped may move again."""


class Device(Protocol):
    """Open from its construction to close().  All calls come from the thread that made it."""

    def gesture(self) -> Gesture:
        """What is done now, and what was pressed since the last call; never blocks.

        Raises PilotError when the device is lost or cannot be relied on, in every call until it is back: that stops
        the arm.
        """
        ...

    def close(self) -> None:
        """Never raises; again does nothing."""
        ...


class Together(Observer):
    """Several devices as one Pilot, which owns them until close().

    Stopped when any of them stops or is lost.  Of those that drive, the first does; an outcome counts from any.

    It is an Observer too, for the driver to be given among the others: what was pressed before an episode is not about
    it, and a takeover starts with the gripper as it is.

    Raises PilotError for an arm that a person cannot drive.
    """

    def __init__(self, spec: ArmSpec, devices: Sequence[Device]):
        if spec.action_names != ACTION_NAMES:
            raise PilotError(f"a person drives {list(ACTION_NAMES)}, {spec.name} expects {list(spec.action_names)}")
        limits = spec.limits
        longest_6 = np.repeat([limits.longest_move, limits.longest_turn], 3)
        low_6, high_6 = np.delete(limits.low, GRIPPER), np.delete(limits.high, GRIPPER)
        self._reach_6 = FULL * np.minimum(np.minimum(-low_6, high_6), longest_6)
        self._closed_at, self._open_at = limits.low[GRIPPER], limits.high[GRIPPER]
        self._gripper = self._open_at
        self._devices = devices
        self._stopped = ""

    def wish(self) -> Wish:
        gestures = [_gesture_of(device) for device in self._devices]
        self._latch(gestures)
        outcomes: list[Outcome] = [gesture.outcome for gesture in gestures if gesture.outcome is not None]
        driving = [gesture for gesture in gestures if gesture.drive_6 is not None]
        return Wish(
            action_A=self._action_of(driving[0]) if driving and not self._stopped else None,
            outcome=outcomes[0] if outcomes else None,
            stopped=self._stopped,
        )

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        """A stop stays; the gripper counts as open until the first tick says how it is."""
        self.wish()
        self._gripper = self._open_at

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._gripper = tick.action[GRIPPER]

    def close(self) -> None:
        for device in self._devices:
            device.close()

    def _latch(self, gestures: Sequence[Gesture]) -> None:
        before, stops = self._stopped, "; ".join(gesture.stops for gesture in gestures if gesture.stops)
        if stops:
            self._stopped = stops
        elif any(gesture.lets_go for gesture in gestures):
            self._stopped = ""
        if self._stopped and not before:
            logger.warning("stopped: %s", self._stopped)
        if before and not self._stopped:
            logger.warning("let go: the arm may move again")

    def _action_of(self, gesture: Gesture) -> np.ndarray:
        if gesture.grips:
            is_open = self._gripper > (self._closed_at + self._open_at) / 2
            self._gripper = self._closed_at if is_open else self._open_at
        return np.insert(self._reach_6 * np.asarray(gesture.drive_6), GRIPPER, self._gripper).astype(np.float32)


def _gesture_of(device: Device) -> Gesture:
    try:
        return device.gesture()
    except PilotError as error:
        return Gesture(stops=str(error))


def beyond(deflection: np.ndarray, dead_zone: float) -> np.ndarray:
    """0 up to the dead zone, from its edge on rising evenly to 1 at full deflection, and so on the other side."""
    return np.sign(deflection) * np.clip((np.abs(deflection) - dead_zone) / (1 - dead_zone), 0, 1)
