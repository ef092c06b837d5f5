"""Off-screen rendering of one model, with the settings of robosuite's own cameras."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

import os
from contextlib import nullcontext

import mujoco
import numpy as np

from sim.meshes import coarse_meshes

SMALLEST_BUFFER = 256
MAX_GEOMS = 1000
COLLISION_GROUP, VISUAL_GROUP = 0, 1


class SceneRenderer:
    """Draws any MjData of one model; pixels equal robosuite's, turned upright, unless the meshes are to be coarse."""

    def __init__(self, model: mujoco.MjModel, *, coarse: bool = False) -> None:
        self._model = model
        self._closed = False
        # Neither changes a pixel: a shadow map that no light uses (67 MB), a buffer larger than the image asked for.
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = SMALLEST_BUFFER
        self._gl = _gl_context_class()(SMALLEST_BUFFER, SMALLEST_BUFFER)
        self._gl.make_current()
        with coarse_meshes(model, VISUAL_GROUP) if coarse else nullcontext():
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options = mujoco.MjvOption()
        self._options.geomgroup[COLLISION_GROUP] = 0
        self._options.geomgroup[VISUAL_GROUP] = 1
        self._perturb = mujoco.MjvPerturb()

    def render(self, data: mujoco.MjData, camera: str, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3), upright.  ValueError names the cameras there are."""
        camera_id = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera_id < 0:
            names = [self._model.camera(i).name for i in range(self._model.ncam)]
            raise ValueError(f"camera must be one of {names}, got {camera!r}")
        self._camera.fixedcamid = camera_id
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._options, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        if height > self._context.offHeight or width > self._context.offWidth:
            size = (max(width, self._context.offWidth), max(height, self._context.offHeight))
            mujoco.mjr_resizeOffscreen(*size, self._context)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        image = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self._context)
        return image[::-1]

    def close(self) -> None:
        """Free the graphics memory."""
        if not self._closed:
            self._closed = True
            self._gl.make_current()  # the context below would otherwise free another scene's objects
            self._context.free()
            self._gl.free()

    __del__ = close


def _gl_context_class():
    """The context class that MUJOCO_GL names, even where mujoco was imported before it was set."""
    if os.environ.get("MUJOCO_GL") == "osmesa":
        from mujoco.osmesa import GLContext
    elif os.environ.get("MUJOCO_GL") == "egl":
        from mujoco.egl import GLContext
    else:
        from mujoco import GLContext
    return GLContext
