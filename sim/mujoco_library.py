"""MuJoCo's C library: where it lies, and what its Python binding leaves out."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

import ctypes
from pathlib import Path

import mujoco

ASSET_CACHE_BYTES = 100 * 10**6


def library_path() -> Path:
    """The shared library that the mujoco package itself loads."""
    return next(Path(mujoco.__file__).parent.glob("libmujoco*"))


def free_build_memory() -> None:
    """Free what building a model leaves behind: the last parsed scene (250 MB), and cached assets above 100 MB."""
    ctypes.CDLL(str(library_path())).mj_freeLastXML()
    mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), ASSET_CACHE_BYTES)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
