"""Where an arm's tool is at given joint positions, and the joint positions that bring it where it is wanted.

Kinematics and Jacobians are Pinocchio's (the package `pin`).  The inverse is the weighted least-squares problem

    minimise  |p(q) - p*|^2 + m_per_rad^2 |log(R* R(q)^T)|^2   subject to  low <= q <= high

solved by Levenberg and Marquardt's method with the bounds as an active set.  So an arm of fewer than six joints reaches
the position exactly and the rotation as far as it can, and a pose out of reach gives the nearest one in this measure.
Letters: J joints.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pinocchio  # pyright: ignore[reportMissingImports]  # its wheel's .pth is code, which pyright does not run

from robot_client.pose import Pose

ROUNDS = 50
ENOUGH_M2 = 1e-12
"""A round that gains no more is the last."""
ENOUGH_RAD = 1e-6
"""And one that no joint moves farther in."""
LEAST_DAMPING = 1e-9
"""Against J^T J of about 1e-2 (m/rad)^2 for the position and 1e-4 for the rotation."""


class Kinematics:
    """One arm, from a URDF without meshes; not to be shared between threads."""

    def __init__(self, urdf: Path, *, tool: str = "tool", m_per_rad: float = 0.01):
        """tool: the link whose pose is meant.  m_per_rad: how far off in position counts as much as 1 rad of rotation;
        small, for the position goes first: with 0.01, a radian that cannot be turned costs less than 1 mm."""
        if not m_per_rad > 0:
            raise ValueError(f"m_per_rad must be above 0, got {m_per_rad:g}")
        self._model = pinocchio.buildModelFromUrdf(str(urdf))
        self._data = self._model.createData()
        self._tool = self._model.getFrameId(tool, pinocchio.FrameType.BODY)
        self._weights_6 = np.array([1.0] * 3 + [m_per_rad] * 3)
        self.names: tuple[str, ...] = tuple(self._model.names)[1:]
        self.low_J: np.ndarray = np.array(self._model.lowerPositionLimit)
        """rad"""
        self.high_J: np.ndarray = np.array(self._model.upperPositionLimit)

    def narrow(self, reach_J: np.ndarray) -> None:
        """Narrows the limits to what this arm's joints reach, either way of zero."""
        self.low_J, self.high_J = np.maximum(self.low_J, -reach_J), np.minimum(self.high_J, reach_J)

    def pose(self, joints_J: np.ndarray) -> Pose:
        """Of the tool, in the base frame."""
        pinocchio.framesForwardKinematics(self._model, self._data, joints_J)
        return self._pose()

    def joints_for(self, pose: Pose, near_J: np.ndarray, step_rad: float = np.inf) -> np.ndarray:
        """(J,) rad within the limits and within step_rad of near_J, whose tool pose is nearest to the wanted one.

        It is the nearest in the neighbourhood of near_J: the arm does not turn itself inside out for a closer one.  A
        near_J beyond the limits comes back by at most step_rad.
        """
        low_J = np.clip(self.low_J, near_J - step_rad, near_J + step_rad)
        high_J = np.clip(self.high_J, near_J - step_rad, near_J + step_rad)
        joints_J, damping = np.clip(near_J, low_J, high_J), 1e-6
        error_6, jacobian_6J = self._linearised(joints_J, pose)
        for _ in range(ROUNDS):
            pull_J = jacobian_6J.T @ error_6
            free_J = ~((joints_J <= low_J) & (pull_J < 0) | (joints_J >= high_J) & (pull_J > 0))
            free_6F = jacobian_6J[:, free_J]
            trial_J = joints_J.copy()
            trial_J[free_J] += np.linalg.solve(free_6F.T @ free_6F + damping * np.eye(free_6F.shape[1]), pull_J[free_J])
            trial_J = np.clip(trial_J, low_J, high_J)
            trial_error_6, trial_jacobian_6J = self._linearised(trial_J, pose)
            moved_rad = np.abs(trial_J - joints_J).max()
            gain_m2 = error_6 @ error_6 - trial_error_6 @ trial_error_6
            if gain_m2 > 0:
                joints_J, error_6, jacobian_6J = trial_J, trial_error_6, trial_jacobian_6J
                damping = max(damping / 10, LEAST_DAMPING)
            else:
                damping *= 10
            if 0 <= gain_m2 < ENOUGH_M2 or moved_rad < ENOUGH_RAD:
                break
        return joints_J

    def _pose(self) -> Pose:
        placement = self._data.oMf[self._tool]
        return Pose(placement.translation.copy(), placement.rotation.copy())

    def _linearised(self, joints_J: np.ndarray, wanted: Pose) -> tuple[np.ndarray, np.ndarray]:
        """(6,) what is missing, weighted, in m, and (6, J) how the joints change it; along the axes of the base."""
        jacobian_6J = pinocchio.computeFrameJacobian(
            self._model, self._data, joints_J, self._tool, pinocchio.ReferenceFrame.LOCAL_WORLD_ALIGNED
        )
        placement = pinocchio.updateFramePlacement(self._model, self._data, self._tool)
        turn_3 = pinocchio.log3(wanted.rotation @ placement.rotation.T)
        missing_6 = np.concatenate([wanted.position_m - placement.translation, turn_3])
        return self._weights_6 * missing_6, self._weights_6[:, None] * jacobian_6J
