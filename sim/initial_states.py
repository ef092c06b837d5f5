"""Initial states of LIBERO tasks: the package's fixed ones, read without torch, and our list of fresh draws."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from sim import assets
from sim.suites import Task

FRESH_LIST = Path(__file__).with_name("fresh_states.json")

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"initial states may hold numpy arrays only, got {module}.{name}")
        return _ALLOWED[module, name]


def fixed_state(task: Task, number: int) -> np.ndarray:
    """One fixed initial state, (1 + nq + nv,); ValueError says how many there are."""
    states = fixed_states(task)
    if number >= len(states):
        raise ValueError(f"fixed initial state of {task.id} must be 0 to {len(states) - 1}, got {number}")
    return states[number]


@lru_cache(maxsize=16)
def fixed_states(task: Task) -> np.ndarray:
    """LIBERO's fixed initial states of a task, (50, 1 + nq + nv): time, positions, velocities."""
    path = assets.libero_root() / "init_files" / task.suite / f"{task.name}.pruned_init"
    with zipfile.ZipFile(path) as archive:  # torch's zip layout: the whole array lies in data.pkl
        member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        states = _ArrayUnpickler(io.BytesIO(archive.read(member))).load()
    states.setflags(write=False)
    return states


@cache
def fresh_list() -> dict[str, dict]:
    """Task id -> {"seeds": the seed of each fresh state, "checksum": of the first draws}; see sim.fresh_states."""
    return json.loads(FRESH_LIST.read_text(encoding="utf-8"))


def fresh_seed(task: Task, number: int) -> int:
    """The seed that LIBERO's own sampler draws a fresh state from; ValueError says how many there are."""
    seeds = fresh_list().get(task.id, {"seeds": []})["seeds"]
    if number >= len(seeds):
        raise ValueError(f"fresh initial state of {task.id} must be one of {len(seeds)} listed, got {number}")
    return seeds[number]
