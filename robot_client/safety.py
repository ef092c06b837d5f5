"""The last gate before apply(): the arm never moves on data that nobody can vouch for.

A hold answers what cannot be vouched for: an arm or a camera in trouble, no action at hand, a wrong width, a number
that is not finite or that the policy cannot have meant, an observation that is too old, a frozen camera.  A clip
answers what the policy meant and this arm must not do: a step beyond its limits, too fast a move, a gripper out of
range, a move out of the workspace.  Both say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robot_client.arm import ArmSpec, ArmState
from robot_client.chunks import Planned

ROUNDING = 1e-4
"""An action may lie this far outside the policy's stated range, in its own units."""
FUTURE_S = 0.05
"""So far a camera's clock may run ahead of the robot's."""
SLOW_START = 0.1
"""Fraction of the speed limit at which an episode begins."""
POSITION_ACTIONS = ("x", "y", "z")
ROTATION_ACTIONS = ("roll", "pitch", "yaw")
POSITION_STATE = ("eef_x", "eef_y", "eef_z")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate lets through."""

    action_A: np.ndarray | None
    """float32 (A,); None means hold."""
    reason: str = ""
    """Why it clipped or held; empty when it did neither."""


class SafetyGate:
    """Judges one action per tick.

    arm: whose limits hold, and the order of its state.
    policy_low_A, policy_high_A: the range of what the policy can answer.
    max_age_s: the oldest observation that may be acted on; 0 switches the rule off.
    frozen_after: so many observations with one capture time are a frozen camera; 0 switches the rule off.
    """

    def __init__(
        self,
        arm: ArmSpec,
        *,
        policy_low_A: np.ndarray,
        policy_high_A: np.ndarray,
        max_age_s: float = 1.0,
        frozen_after: int = 3,
    ):
        self.names = arm.action_names
        self.max_age_s = max_age_s
        self.frozen_after = frozen_after
        self._low_A = np.array(arm.limits.low, np.float32)
        self._high_A = np.array(arm.limits.high, np.float32)
        self._policy_low_A = policy_low_A - ROUNDING
        self._policy_high_A = policy_high_A + ROUNDING
        self._slow_start_ticks = arm.limits.slow_start_ticks
        self._speed_limits = [
            (_indices(names, arm.action_names, "a speed limit", "actions"), longest)
            for names, longest in (
                (POSITION_ACTIONS, arm.limits.longest_move),
                (ROTATION_ACTIONS, arm.limits.longest_turn),
            )
            if longest < np.inf
        ]
        self._workspace = arm.limits.workspace
        if self._workspace is not None:
            self._axes = _indices(POSITION_ACTIONS, arm.action_names, "a workspace", "actions")
            self._position = _indices(POSITION_STATE, arm.state_names, "a workspace", "state entries")
        self._last_capture_ns = -1
        self._identical = 0

    @property
    def frozen(self) -> bool:
        """True while the latest observations all carry one capture time."""
        return bool(self.frozen_after) and self._identical >= self.frozen_after

    def looked(self, capture_time_ns: int) -> None:
        """An observation was taken, whether or not it was sent."""
        self._identical = self._identical + 1 if capture_time_ns == self._last_capture_ns else 1
        self._last_capture_ns = capture_time_ns

    def lateness(self, planned: Planned, now_ns: int) -> str:
        """Why an action is not of now, which is not the policy's doing; empty when it is."""
        age_s = (now_ns - planned.capture_time_ns) / 1e9
        if self.max_age_s and age_s > self.max_age_s:
            return f"observation too old: {age_s:.2f} s, limit {self.max_age_s:g} s"
        if self.max_age_s and age_s < -FUTURE_S:
            return f"observation from the future: {-age_s:.2f} s, limit {FUTURE_S:g} s"
        return ""

    def admit(self, planned: Planned | None, state: ArmState, now_ns: int) -> Verdict:
        """The action to apply, or a hold, and why.  state is the arm's now."""
        reason = self._reason_to_hold(planned, state, now_ns)
        if reason or planned is None:
            return Verdict(action_A=None, reason=reason)
        return self._clip(planned.action_A, state)

    def admit_person(self, action_A: np.ndarray, state: ArmState) -> Verdict:
        """The same limits for a person, who sees for himself what the cameras do not."""
        if state.trouble:
            return Verdict(action_A=None, reason=state.trouble)
        if not np.isfinite(action_A).all():
            return Verdict(action_A=None, reason=f"not finite: {self._name_first(~np.isfinite(action_A), action_A)}")
        return self._clip(action_A, state)

    def _reason_to_hold(self, planned: Planned | None, state: ArmState, now_ns: int) -> str:
        if state.trouble or state.blind:
            return "; ".join(filter(None, (state.trouble, state.blind)))
        if self.frozen:
            return f"camera frozen: {self._identical} observations with one capture time"
        if planned is None:
            return "no action at hand"
        action_A = planned.action_A
        if action_A.shape != (len(self.names),):
            return f"wrong width: got {action_A.shape}, expected ({len(self.names)},)"
        if not np.isfinite(action_A).all():
            return f"not finite: {self._name_first(~np.isfinite(action_A), action_A)}"
        foreign_A = (action_A < self._policy_low_A) | (action_A > self._policy_high_A)
        if foreign_A.any():
            return f"outside the policy's own range: {self._name_first(foreign_A, action_A)}"
        return self.lateness(planned, now_ns)

    def _clip(self, action_A: np.ndarray, state: ArmState) -> Verdict:
        clipped_A, reasons = action_A, []
        for rule, clip in (("limit", self._bounded), ("speed", self._slowed), ("workspace", self._inside)):
            before_A, clipped_A = clipped_A, clip(clipped_A, state)
            reasons += self._differences(before_A, clipped_A, rule)
        return Verdict(action_A=clipped_A.astype(np.float32), reason="; ".join(reasons))

    def _bounded(self, action_A: np.ndarray, state: ArmState) -> np.ndarray:
        return np.clip(action_A, self._low_A, self._high_A)

    def _slowed(self, action_A: np.ndarray, state: ArmState) -> np.ndarray:
        """Moves and turns that are too long for a tick, shortened; their direction stays."""
        slowed_A = action_A.copy()
        started = min(1.0, state.tick / self._slow_start_ticks) if self._slow_start_ticks else 1.0
        for axes, longest in self._speed_limits:
            allowed = longest * (SLOW_START + (1 - SLOW_START) * started)
            length = float(np.linalg.norm(action_A[axes]))
            if length > allowed:
                slowed_A[axes] *= allowed / length
        return slowed_A

    def _inside(self, action_A: np.ndarray, state: ArmState) -> np.ndarray:
        """The move shortened so that it does not leave the box; outside already, it may only lead back."""
        if self._workspace is None:
            return action_A
        box = self._workspace
        at_m = state.state_S[self._position] if state.goal_m is None else state.goal_m
        room_low = np.minimum(0, np.array(box.low_m) - at_m) / box.metres_per_unit
        room_high = np.maximum(0, np.array(box.high_m) - at_m) / box.metres_per_unit
        inside_A = action_A.copy()
        inside_A[self._axes] = np.clip(action_A[self._axes], room_low, room_high)
        return inside_A

    def _differences(self, before_A: np.ndarray, after_A: np.ndarray, rule: str) -> list[str]:
        return [
            f"{rule}: {self.names[a]} clipped from {before_A[a]:.4g} to {after_A[a]:.4g}"
            for a in np.flatnonzero(before_A != after_A)
        ]

    def _name_first(self, wrong_A: np.ndarray, action_A: np.ndarray) -> str:
        a = int(np.flatnonzero(wrong_A)[0])
        return f"{self.names[a]} is {action_A[a]:g}"


def _indices(wanted: Sequence[str], available: Sequence[str], who: str, what: str) -> list[int]:
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ValueError(f"{who} needs the {what} {list(wanted)}, got {list(available)}")
    return [available.index(name) for name in wanted]
