"""Shifted worlds: a task as ever, with something changed that its policy never saw.

A shift is applied once, to the compiled model of a scene.  Resets and steps leave it there: of the model they write
only where fixtures stand and which sites glow.  The sizes are a lab's (a bumped camera, an evening lamp, fuller and
smoother packets, other packets beside them); they were chosen before any policy was measured in them, but for the tint
of `objects`, which went from 0.7 to 1, once, since nano did not mind it.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

CAMERA = "agentview"
COLOURS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))
"""Red, green and blue that the distractors turn to, one after the other."""
UNSET_RGBA = (0.5, 0.5, 0.5, 1.0)
"""A geom of this colour shows its material's instead (MuJoCo's default)."""


class Change(Protocol):
    """One thing that is different in a world."""

    def apply(self, env) -> None:
        """Change the model of a built robosuite environment.  ValueError where there is nothing to change."""
        ...


@dataclass(frozen=True, kw_only=True)
class Camera:
    """The policy's camera stands elsewhere."""

    move_m: tuple[float, float, float]
    """along the world's axes"""
    turn_deg: tuple[float, float, float]
    """rotation vector in the camera's frame: about x it tilts up, about y it pans left, about z it rolls"""

    def apply(self, env) -> None:
        """See Change."""
        camera = env.sim.model._model.camera(CAMERA)
        turned = Rotation.from_quat(camera.quat, scalar_first=True) * Rotation.from_rotvec(self.turn_deg, degrees=True)
        camera.quat[:] = turned.as_quat(scalar_first=True)
        camera.pos[:] += self.move_m


@dataclass(frozen=True, kw_only=True)
class Light:
    """All light has another colour, and the lamps hang on another side."""

    colour: tuple[float, float, float]
    """factors of red, green and blue"""
    turn_deg: float
    """of the lamps about the vertical through the world's origin, anticlockwise as seen from above"""

    def apply(self, env) -> None:
        """See Change."""
        model = env.sim.model._model
        turn_33 = Rotation.from_euler("z", self.turn_deg, degrees=True).as_matrix()
        for vectors_n3 in (model.light_pos, model.light_dir):
            vectors_n3[:] = vectors_n3 @ turn_33.T
        head = model.vis.headlight
        lamps = (model.light_ambient, model.light_diffuse, model.light_specular)
        for rgb in (*lamps, head.ambient, head.diffuse, head.specular):
            rgb[:] *= self.colour


@dataclass(frozen=True, kw_only=True)
class Grip:
    """What can be carried is heavier or lighter; it and the finger pads are rougher or smoother."""

    friction: float
    """factor of sliding, torsional and rolling friction"""
    mass: float
    """factor of mass and inertia"""

    def apply(self, env) -> None:
        """See Change."""
        model = env.sim.model._model
        free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        carried_b = np.isin(model.body_rootid, free)
        model.body_mass[carried_b] *= self.mass
        model.body_inertia[carried_b] *= self.mass
        _derive_from_masses(model)
        parts = env.robots[0].gripper.important_geoms
        pads = [model.geom(name).id for name in parts["left_fingerpad"] + parts["right_fingerpad"]]
        touching_g = carried_b[model.geom_bodyid]
        touching_g[pads] = True
        model.geom_friction[touching_g] *= self.friction


def _derive_from_masses(model) -> None:
    """What MuJoCo computes from masses once; the picture's clipping planes, which it computes too, stay."""
    extent, center = model.stat.extent, model.stat.center.copy()
    mujoco.mj_setConst(model, mujoco.MjData(model))
    model.stat.extent, model.stat.center[:] = extent, center


@dataclass(frozen=True, kw_only=True)
class Distractors:
    """The objects that LIBERO's task does not name have other colours, each its own."""

    tint: float
    """0 leaves their colours, 1 leaves of them only what COLOURS lets through"""

    def apply(self, env) -> None:
        """See Change."""
        model = env.sim.model._model
        objects = getattr(env, "objects_dict", {})  # a task of robosuite's own names all there is
        bodies = [thing.root_body for name, thing in objects.items() if name not in env.obj_of_interest]
        if not bodies:
            raise ValueError("distractors must be there to have another colour, this task has none")
        for body, colour in zip(bodies, itertools.cycle(COLOURS), strict=False):
            of_body = model.body_rootid[model.geom_bodyid] == model.body(body).id
            tint_3 = 1.0 - self.tint * (1.0 - np.array(colour))
            model.geom_rgba[of_body, :3] = _shown_rgba(model)[of_body, :3] * tint_3


def _shown_rgba(model) -> np.ndarray:
    """(ngeom, 4) what each geom's texture is multiplied with: its own colour, or its material's."""
    from_material = (model.geom_rgba == UNSET_RGBA).all(1) & (model.geom_matid >= 0)
    return np.where(from_material[:, None], model.mat_rgba[model.geom_matid], model.geom_rgba)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A named list of changes."""

    name: str
    """name on the command line, in asset trees and in reports"""
    changes: tuple[Change, ...]
    """all of them together"""

    def apply(self, env) -> None:
        """See Change."""
        for change in self.changes:
            change.apply(env)


# Fixed for good: a report names a world by these names.  In `all` each change is about half of what it is alone.  What
# succeeds in the dark does not look.
SHIFTS: dict[str, Shift] = {
    shift.name: shift
    for shift in (
        Shift(name="camera", changes=(Camera(move_m=(0.0, 0.03, 0.02), turn_deg=(1.0, -2.0, 1.0)),)),
        Shift(name="light", changes=(Light(colour=(0.6, 0.5, 0.4), turn_deg=90.0),)),
        Shift(name="dark", changes=(Light(colour=(0.0, 0.0, 0.0), turn_deg=0.0),)),
        Shift(name="friction", changes=(Grip(friction=0.5, mass=2.0),)),
        Shift(name="objects", changes=(Distractors(tint=1.0),)),
        Shift(
            name="all",
            changes=(
                Grip(friction=0.7, mass=1.4),
                Camera(move_m=(0.0, 0.015, 0.01), turn_deg=(0.5, -1.0, 0.5)),
                Light(colour=(0.8, 0.7, 0.6), turn_deg=45.0),
                Distractors(tint=0.35),
            ),
        ),
    )
}


def find_shift(name: str) -> Shift | None:
    """The shift of that name, None for the empty one; ValueError names the shifts there are."""
    if name and name not in SHIFTS:
        raise ValueError(f"shift must be one of {sorted(SHIFTS)}, got {name!r}")
    return SHIFTS.get(name)


def in_world(asset_tree: str, shift: Shift | None) -> str:
    """What is on screen, its shift named: "original (assets)+shift:camera"."""
    return f"{asset_tree}+shift:{shift.name}" if shift else asset_tree
