"""What a frame costs with the stock meshes and with coarse ones, and how far the pictures differ.

    python -m benchmarks.coarse_frames [--tasks libero_goal/8 libero_object/0 robosuite/0] [--frames 20]

CPU time of this process, two renderers of one scene in turns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import tyro

from sim.scene import Scene
from sim.suites import find_task

CAMERA, SIDE = "agentview", 128
FAR = 10
"""Of 255: a pixel that is further off than this counts."""


@dataclass(frozen=True, kw_only=True)
class CoarseFramesConfig:
    """Measures practice frames against official ones."""

    tasks: tuple[str, ...] = ("libero_goal/8", "libero_object/0", "robosuite/0")
    frames: int = 20
    """of each kind"""


def main(config: CoarseFramesConfig) -> None:
    print("task               official ms  coarse ms  ratio  mean difference  pixels > 10 off")
    for task in config.tasks:
        scene = Scene(find_task(task))
        scene.reset("0" if scene.task.simulator == "libero" else "seed:0")
        pictures, spent_s = dict[bool, np.ndarray](), {False: 0.0, True: 0.0}
        for frame in range(-1, config.frames):  # the first builds the renderers
            for coarse in (False, True):
                started_s = time.process_time()
                pictures[coarse] = scene.render(CAMERA, SIDE, SIDE, coarse=coarse)
                spent_s[coarse] += (frame >= 0) * (time.process_time() - started_s)
        official_ms, coarse_ms = (1e3 * spent_s[coarse] / config.frames for coarse in (False, True))
        off = np.abs(pictures[False].astype(int) - pictures[True])
        far = 100 * (off.max(-1) > FAR).mean()
        print(
            f"{task:<18} {official_ms:11.1f} {coarse_ms:10.1f} {official_ms / coarse_ms:5.1f}x"
            f" {off.mean():16.2f} {far:14.1f} %"
        )
        scene.close()


if __name__ == "__main__":
    main(tyro.cli(CoarseFramesConfig, description=__doc__))
