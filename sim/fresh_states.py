"""Makes the committed list of fresh initial states: `python -m sim.fresh_states SUITE ...`.

Each is a draw of LIBERO's own sampler from a stated seed, in the order of the seeds from 10000.  A draw is left out
when the task is solved already after settling, or when an object has by then moved sideways by more than 5 cm or
fallen by more than 20 cm (LIBERO lets objects drop onto the table from some 7 cm).
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

import json
import sys
import zlib

import mujoco
import numpy as np

from sim.initial_states import FRESH_LIST
from sim.scene import SETTLE_ACTION, Scene
from sim.suites import FRESH_PER_TASK, find_suite

FIRST_SEED = 10_000
CHECKED_DRAWS = 5
SIDEWAYS_M = 0.05
FALLEN_M = 0.2


def draw_checksum(scene: Scene, seeds: list[int]) -> int:
    """CRC-32 of the first draws' positions and fixture poses, rounded to 1e-6."""
    checksum = 0
    for seed in seeds[:CHECKED_DRAWS]:
        scene.place(f"seed:{seed}")
        for array in (scene.data.qpos, scene.model.body_pos, scene.model.body_quat):
            checksum = zlib.crc32(np.round(array * 1e6).astype(np.int64).tobytes(), checksum)
    return checksum


def is_usable(scene: Scene, seed: int) -> bool:
    """Whether the draw stands still and leaves the task to be done."""
    free = scene.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE
    columns = scene.model.jnt_qposadr[free][:, None] + np.arange(3)
    scene.place(f"seed:{seed}")
    before = scene.data.qpos[columns]
    scene.reset(f"seed:{seed}")
    moved = scene.data.qpos[columns] - before
    still = np.all(np.linalg.norm(moved[:, :2], axis=1) < SIDEWAYS_M) and np.all(moved[:, 2] > -FALLEN_M)
    return bool(still) and not scene.step(SETTLE_ACTION)


def main(suites: list[str]) -> None:
    """Add the suites' tasks to the list and write it after each task."""
    listed = json.loads(FRESH_LIST.read_text(encoding="utf-8")) if FRESH_LIST.exists() else {}
    for task in (task for suite in suites for task in find_suite(suite).tasks):
        scene, seeds, seed = Scene(task), [], FIRST_SEED
        while len(seeds) < FRESH_PER_TASK:
            if is_usable(scene, seed):
                seeds.append(seed)
            seed += 1
        listed[task.id] = {"seeds": seeds, "checksum": draw_checksum(scene, seeds)}
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in listed.items())
        FRESH_LIST.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{task.id}: {seed - FIRST_SEED} draws for {len(seeds)} states", flush=True)
        scene.close()


if __name__ == "__main__":
    main(sys.argv[1:])
