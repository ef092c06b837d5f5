"""The last gate before apply(): the arm never moves on data that nobody can vouch for.

A hold answers what cannot be vouched for: no action at hand, a wrong width, a number that is not finite or that the
policy cannot have meant, an observation that is too old, a frozen camera.  A clip answers what the policy meant and
this arm must not do: a step beyond its limits, a gripper out of range, a move out of the workspace.  Both say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robot_client.arm import ArmSpec, Workspace
from robot_client.chunks import Planned

ROUNDING = 1e-4
"""An action may lie this far outside the policy's stated range, in its own units."""
POSITION_ACTIONS = ("x", "y", "z")
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
        self._workspace = arm.limits.workspace
        if self._workspace is not None:
            self._axes = _indices(POSITION_ACTIONS, arm.action_names, "actions")
            self._position = _indices(POSITION_STATE, arm.state_names, "state entries")
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

    def admit(self, planned: Planned | None, state_S: np.ndarray, now_ns: int) -> Verdict:
        """The action to apply, or a hold, and why.  state_S is the arm's state now, in the order of its spec."""
        reason = self._reason_to_hold(planned, now_ns)
        if reason or planned is None:
            return Verdict(action_A=None, reason=reason)
        return self._clip(planned.action_A, state_S)

    def _reason_to_hold(self, planned: Planned | None, now_ns: int) -> str:
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
        age_s = (now_ns - planned.capture_time_ns) / 1e9
        if self.max_age_s and age_s > self.max_age_s:
            return f"observation too old: {age_s:.2f} s, limit {self.max_age_s:g} s"
        return ""

    def _clip(self, action_A: np.ndarray, state_S: np.ndarray) -> Verdict:
        clipped_A = np.clip(action_A, self._low_A, self._high_A)
        reasons = self._differences(action_A, clipped_A, "limit")
        if self._workspace is not None:
            inside_A = clipped_A.copy()
            inside_A[self._axes] = _keep_inside(self._workspace, clipped_A[self._axes], state_S[self._position])
            reasons += self._differences(clipped_A, inside_A, "workspace")
            clipped_A = inside_A
        return Verdict(action_A=clipped_A.astype(np.float32), reason="; ".join(reasons))

    def _differences(self, before_A: np.ndarray, after_A: np.ndarray, rule: str) -> list[str]:
        return [
            f"{rule}: {self.names[a]} clipped from {before_A[a]:.4g} to {after_A[a]:.4g}"
            for a in np.flatnonzero(before_A != after_A)
        ]

    def _name_first(self, wrong_A: np.ndarray, action_A: np.ndarray) -> str:
        a = int(np.flatnonzero(wrong_A)[0])
        return f"{self.names[a]} is {action_A[a]:g}"


def _keep_inside(workspace: Workspace, delta_3: np.ndarray, position_3: np.ndarray) -> np.ndarray:
    """The delta, shortened so that it does not leave the box; outside already, it may only lead back."""
    room_low_3 = np.minimum(0, np.array(workspace.low_m) - position_3) / workspace.metres_per_unit
    room_high_3 = np.maximum(0, np.array(workspace.high_m) - position_3) / workspace.metres_per_unit
    return np.clip(delta_3, room_low_3, room_high_3)


def _indices(wanted: Sequence[str], available: Sequence[str], what: str) -> list[int]:
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ValueError(f"a workspace needs the {what} {list(wanted)}, got {list(available)}")
    return [available.index(name) for name in wanted]
