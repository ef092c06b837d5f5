"""Where something is and how it is turned.

A change of rotation is a rotation vector (axis times angle, rad), as in OpenVLA's actions and LIBERO's states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pose:
    """A frame in another one.  `a @ b` is b, given in a, seen from where a is given."""

    position_m: np.ndarray
    """float64 (3,)"""
    rotation: np.ndarray
    """float64 (3, 3)"""

    @classmethod
    def of(cls, position_m, rotation_vector_rad=(0.0, 0.0, 0.0)) -> Pose:
        return cls(np.asarray(position_m, np.float64), rotation(np.asarray(rotation_vector_rad, np.float64)))

    def __matmul__(self, other: Pose) -> Pose:
        return Pose(self.position_m + self.rotation @ other.position_m, self.rotation @ other.rotation)

    @property
    def inverse(self) -> Pose:
        return Pose(-self.rotation.T @ self.position_m, self.rotation.T)

    @property
    def rotation_vector_rad(self) -> np.ndarray:
        """(3,), no longer than pi."""
        return rotation_vector(self.rotation)

    def moved(self, change_6: np.ndarray) -> Pose:
        """Shifted by the first three (m), turned about its own origin by the last three (rad), both along the axes of
        the frame that it is given in."""
        return Pose(self.position_m + change_6[:3], rotation(change_6[3:]) @ self.rotation)

    def change_to(self, other: Pose) -> np.ndarray:
        """(6,): what `moved` needs to get to the other pose."""
        return np.concatenate([other.position_m - self.position_m, rotation_vector(other.rotation @ self.rotation.T)])


def rotation(rotation_vector_3: np.ndarray) -> np.ndarray:
    """(3, 3): the rotation about the vector by its length in radians (Rodrigues)."""
    angle = float(np.linalg.norm(rotation_vector_3))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = rotation_vector_3 / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_vector(rotation_33: np.ndarray) -> np.ndarray:
    """(3,): the inverse of rotation(), no longer than pi; through the quaternion, which keeps its axis there."""
    R = rotation_33
    # 4 q q^T of the unit quaternion q = (w, x, y, z); its largest column is q up to length and sign (Shepperd, 1978).
    outer_44 = np.array(
        [
            [1 + R[0, 0] + R[1, 1] + R[2, 2], R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]],
            [R[2, 1] - R[1, 2], 1 + R[0, 0] - R[1, 1] - R[2, 2], R[0, 1] + R[1, 0], R[0, 2] + R[2, 0]],
            [R[0, 2] - R[2, 0], R[0, 1] + R[1, 0], 1 - R[0, 0] + R[1, 1] - R[2, 2], R[1, 2] + R[2, 1]],
            [R[1, 0] - R[0, 1], R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], 1 - R[0, 0] - R[1, 1] + R[2, 2]],
        ]
    )
    quaternion = outer_44[:, np.argmax(np.diag(outer_44))]
    w, axis = quaternion[0], quaternion[1:]
    length = float(np.linalg.norm(axis))
    if length < 1e-12:
        return np.zeros(3)
    return 2 * np.arctan2(length, abs(w)) * np.copysign(1.0, w) / length * axis


def same_turn_near(rotation_vector_3: np.ndarray, near_3: np.ndarray) -> np.ndarray:
    """(3,): of a rotation vector and the one that turns the other way round to the same end, the nearer to near_3."""
    angle = float(np.linalg.norm(rotation_vector_3))
    if angle < 1e-9:
        return rotation_vector_3
    other_3 = rotation_vector_3 * (1 - 2 * np.pi / angle)
    return min(rotation_vector_3, other_3, key=lambda turn_3: float(np.linalg.norm(turn_3 - near_3)))
