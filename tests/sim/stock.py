"""What the simulator is compared with: LIBERO's own environment and robosuite's own step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim import assets
from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.libero_arm import environment_action
from sim.scene import SETTLE_ACTION, Scene
from sim.suites import Task


class StockEnv:
    """LIBERO's OffScreenRenderEnv, driven as the published protocol drives it: seed(0), then a reset per episode."""

    def __init__(self, task: Task, *, size_px: int = 128) -> None:
        envs = assets.load_libero()
        bddl_file = assets.libero_root() / "bddl_files" / task.suite / f"{task.name}.bddl"
        self.env = envs.OffScreenRenderEnv(bddl_file_name=str(bddl_file), camera_heights=size_px, camera_widths=size_px)
        self.env.seed(0)

    def reset(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """The next episode, from a fixed state, settled."""
        self._enter()
        self.env.reset()
        observation = self.env.set_init_state(state)
        for _ in range(10):
            observation, _ = self.step(SETTLE_ACTION)
        return observation

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        """Observation and success."""
        self._enter()
        observation, _, done, _ = self.env.step(action)
        return observation, bool(done)

    def _enter(self) -> None:
        # robosuite draws into, and frees from, whichever context is current: another scene's, after that has drawn.
        self.env.sim._render_context_offscreen.gl_ctx.make_current()


def expert_actions(scene: Scene, ticks: int) -> Iterator[np.ndarray]:
    """Environment actions (7,) of the scripted expert, each computed on the scene's state when it is asked for."""
    expert = Expert(scene, recipe_for(scene.task), gain=2.0, speed=1.0)
    for _ in range(ticks):
        yield environment_action(expert.action())
