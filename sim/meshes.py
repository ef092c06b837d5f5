"""Coarser visual meshes, for experience that is to be cheap: in software a frame costs what its vertices cost.

Vertices that share a cell of a grid become one, triangles that collapse are dropped.  The picture stays what it was up
to about one grey level on average, and takes a third of the time.  For practice only: an evaluation shows the stock
pixels.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mujoco
import numpy as np

OBJECT_CELL_M = 0.003
"""Of objects and fixtures: thin walls of bowls tear above 4 mm."""
ROBOT_CELL_M = 0.012
ROBOT_BODIES = ("robot0", "gripper0", "mount0")
FEWEST_TRIANGLES = 8
"""A mesh of fewer cells is smaller than a cell, and left alone."""
CHANGED = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")


@contextmanager
def coarse_meshes(model: mujoco.MjModel, visual_group: int) -> Iterator[None]:
    """Within it the model's meshes of that geom group are coarse; afterwards all are what they were, bit for bit.

    A renderer that is built within it keeps them; physics must not step there.
    """
    before = {name: getattr(model, name).copy() for name in CHANGED}
    try:
        for mesh, cell_m in _cells(model, visual_group).items():
            _coarsen(model, mesh, cell_m)
        yield
    finally:
        for name, array in before.items():
            getattr(model, name)[:] = array


def _cells(model: mujoco.MjModel, visual_group: int) -> dict[int, float]:
    """Grid of each mesh that the group's geoms show, m."""
    shown = (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) & (model.geom_group == visual_group)
    cells: dict[int, float] = {}
    for geom in np.flatnonzero(shown):
        is_robot = model.body(model.geom_bodyid[geom]).name.startswith(ROBOT_BODIES)
        cells[int(model.geom_dataid[geom])] = ROBOT_CELL_M if is_robot else OBJECT_CELL_M
    return cells


def _coarsen(model: mujoco.MjModel, mesh: int, cell_m: float) -> None:
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    vertices_n3 = model.mesh_vert[first : first + count]
    cell_n = np.unique(np.floor(vertices_n3 / cell_m), axis=0, return_inverse=True)[1].ravel()
    rows = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    corner_f3 = cell_n[model.mesh_face[rows]]
    kept_f = (corner_f3 != np.roll(corner_f3, 1, axis=1)).all(1)
    if (left := int(kept_f.sum())) < FEWEST_TRIANGLES:
        return
    centre_c3 = np.stack([np.bincount(cell_n, axis_n) for axis_n in vertices_n3.T], 1) / np.bincount(cell_n)[:, None]
    vertices_n3[:] = centre_c3[cell_n]
    for per_face in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
        if len(per_face) >= rows.stop:  # a model without textures has no coordinates of them
            per_face[rows.start : rows.start + left] = per_face[rows][kept_f]
    model.mesh_facenum[mesh] = left
