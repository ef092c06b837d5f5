"""What a scripted expert may know: poses, extents and contacts, read from the simulator's state."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.
from __future__ import annotations

from typing import NamedTuple

import mujoco
import numpy as np

FINGER_LAG_M = 0.005
_BOX_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_FINGERS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
_ACTUATOR = "gripper0_gripper_finger_joint1"
_FINGER_GEOMS = ("gripper0_finger1_", "gripper0_finger2_")


class Extent(NamedTuple):
    """An axis-aligned box in the world, m."""

    low: np.ndarray
    high: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return (self.low + self.high) / 2


class View:
    """The present state of a Panda's scene, in world coordinates; nothing is remembered between calls."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._data = model, data
        self._eef = model.site("gripper0_grip_site").id
        self._actuator = model.actuator(_ACTUATOR).id
        names = [model.geom(geom).name for geom in range(model.ngeom)]
        self._finger_masks = [np.array([name.startswith(prefix) for name in names]) for prefix in _FINGER_GEOMS]
        self._corners: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def eef(self) -> np.ndarray:
        """(3,) the point between the fingertips, m."""
        return self._data.site_xpos[self._eef].copy()

    @property
    def closed(self) -> float:
        """How far the gripper has been told to close: 0 open, 1 closed; the command takes 8 ticks from end to end."""
        open_m = self._model.actuator_ctrlrange[self._actuator, 1]
        return float(1.0 - self._data.ctrl[self._actuator] / open_m)

    @property
    def gap(self) -> float:
        """Distance between the fingertips, m."""
        return float(sum(abs(self._data.joint(name).qpos[0]) for name in _FINGERS))

    @property
    def opening(self) -> bool:
        """Whether the fingers are narrower than told, and so on their way apart; they follow the command with a lag."""
        told = (1.0 - self.closed) * 2 * self._model.actuator_ctrlrange[self._actuator, 1]
        return bool(self.gap < told - FINGER_LAG_M)

    def extent(self, name: str) -> Extent:
        """The box round a body's collision geoms, or round a site.  KeyError when the model has neither."""
        if name not in self._corners and mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_BODY, name) < 0:
            site = self._data.site(name)
            half = np.abs(site.xmat.reshape(3, 3)) @ self._model.site(name).size
            return Extent(site.xpos - half, site.xpos + half)
        geoms, corners = self._body_corners(name)
        rotations = self._data.geom_xmat[geoms].reshape(-1, 3, 3)
        points = self._data.geom_xpos[geoms, None] + np.einsum("gij,gkj->gki", rotations, corners)
        return Extent(points.min(axis=(0, 1)), points.max(axis=(0, 1)))

    def frame(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A body's origin (3,), m, and its axes as the columns of (3, 3)."""
        body = self._data.body(name)
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()

    def joint(self, name: str) -> float:
        """Position of a hinge or slide joint, rad or m."""
        return float(self._data.joint(name).qpos[0])

    def pinches(self, name: str) -> bool:
        """Whether both fingers touch the body."""
        geoms, _ = self._body_corners(name)
        mask = np.zeros(self._model.ngeom, dtype=bool)
        mask[geoms] = True
        pairs = self._data.contact.geom
        touched = mask[pairs][:, ::-1]
        return all(bool((finger[pairs] & touched).any()) for finger in self._finger_masks)

    def _body_corners(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(G,) the body's collision geoms, its children's included, and (G, 8, 3) their boxes' corners."""
        if name not in self._corners:
            model = self._model
            inside = np.arange(model.nbody) == model.body(name).id
            for body in range(1, model.nbody):  # parents come before their children
                inside[body] |= inside[model.body_parentid[body]]
            geoms = np.flatnonzero(inside[model.geom_bodyid] & (model.geom_contype > 0))
            centre, half = model.geom_aabb[geoms, None, :3], model.geom_aabb[geoms, None, 3:]
            self._corners[name] = geoms, centre + half * _BOX_CORNERS
        return self._corners[name]
