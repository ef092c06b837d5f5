"""One built task, kept alive and reused: reset to any initial state, step, save and restore, render."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

from sim import assets
from sim.initial_states import fixed_states
from sim.suites import Task

SETTLE_TICKS = 10
OPEN_GRIPPER = np.array([0, 0, 0, 0, 0, 0, -1.0])
PROTOCOL_SEED = 0
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything a step depends on: restoring it continues the same episode."""

    physics: np.ndarray
    """mjSTATE_INTEGRATION: time, positions, velocities, warm start, controls"""
    body_pos: np.ndarray
    """(nbody, 3) body positions of the model; fixtures are placed there, m"""
    body_quat: np.ndarray
    """(nbody, 4) body orientations of the model"""
    gripper: np.ndarray
    """(2,) the gripper's running command"""
    goal_pos: np.ndarray
    """(3,) the controller's goal position, m"""
    goal_ori: np.ndarray
    """(3, 3) the controller's goal orientation"""


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO and robosuite draw from, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


class Scene:
    """A task's model, data, controller and lazy renderer.  Not thread-safe; one process may hold several."""

    def __init__(self, task: Task, *, fast: bool = True) -> None:
        self.task = task
        self.fast = fast
        self.env = _build_env(task)
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        self._robot = self.env.robots[0]
        self._pristine_pos = self.model.body_pos.copy()
        self._pristine_quat = self.model.body_quat.copy()

    def reset(self, state_id: str) -> None:
        """The protocol's reset: place fixtures, set the state, reset the controller, settle for ten ticks."""
        kind, _, number = state_id.rpartition(":")
        if not number.isdigit() or kind not in ("", "fresh", "seed"):
            raise ValueError(f'initial state must be like "17", "fresh:3" or "seed:1017", got {state_id!r}')
        self._draw(PROTOCOL_SEED if kind == "" else int(number))
        if kind == "":
            state = fixed_states(self.task)[int(number)]
            nq = self.model.nq
            self.data.time = state[0]
            self.data.qpos[:] = state[1 : 1 + nq]
            self.data.qvel[:] = state[1 + nq :]
            mujoco.mj_forward(self.model, self.data)
        self._after_state_change()
        for _ in range(SETTLE_TICKS):
            self.step(OPEN_GRIPPER)

    def step(self, action: Sequence[float] | np.ndarray) -> bool:
        """Apply one action (7,) for one 20 Hz tick; True when the task's own success predicate holds."""
        self.env.step(np.asarray(action, dtype=np.float64))
        return bool(self.env._check_success())

    def save(self) -> State:
        """A snapshot that `restore` continues from."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        controller = self._robot.controller
        return State(
            physics=physics,
            body_pos=self.model.body_pos.copy(),
            body_quat=self.model.body_quat.copy(),
            gripper=np.array(self._robot.gripper.current_action, dtype=np.float64),
            goal_pos=np.array(controller.goal_pos),
            goal_ori=np.array(controller.goal_ori),
        )

    def restore(self, state: State) -> None:
        """Go back to a snapshot of this scene."""
        self.model.body_pos[:] = state.body_pos
        self.model.body_quat[:] = state.body_quat
        mujoco.mj_setState(self.model, self.data, state.physics, _STATE)
        controller = self._robot.controller
        controller.goal_pos, controller.goal_ori = state.goal_pos.copy(), state.goal_ori.copy()
        self._robot.gripper.current_action = state.gripper.copy()
        mujoco.mj_forward(self.model, self.data)
        self._after_state_change()

    def render(self, camera: str, height: int = 256, width: int = 256) -> np.ndarray:
        """The camera's image, uint8 (height, width, 3), upright."""
        return self._renderer.render(self.data, camera, height, width)

    def proprio(self) -> np.ndarray:
        """(8,) float32: end-effector position (m), axis-angle (rad), the two finger positions (m)."""
        from robosuite.utils import transform_utils

        quat = transform_utils.convert_quat(self.env.sim.data.get_body_xquat(self._robot.robot_model.eef_name), "xyzw")
        eef = self.data.site_xpos[self._robot.eef_site_id]
        fingers = self.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([eef, transform_utils.quat2axisangle(quat), fingers]).astype(np.float32)

    def close(self) -> None:
        """Free the renderer; the scene cannot be used afterwards."""
        if "_renderer" in self.__dict__:
            self._renderer.close()
        self.env.close()

    @cached_property
    def _renderer(self):
        from sim.renderer import SceneRenderer

        return SceneRenderer(self.model)

    def _draw(self, seed: int) -> None:
        """Let the environment draw fixture poses and object placements as it does after `seed(seed)`."""
        from robosuite.utils.errors import RandomizationError

        self.model.body_pos[:] = self._pristine_pos
        self.model.body_quat[:] = self._pristine_quat
        self._robot.gripper.current_action = np.zeros(2)
        with numpy_seed(seed):
            while True:
                try:
                    self.env.reset()
                    return
                except RandomizationError:  # the stock wrapper draws again, from where the generator stands
                    continue

    def _after_state_change(self) -> None:
        if hasattr(self.env, "_post_process"):
            self.env._check_success()
            self.env._post_process()


def _build_env(task: Task):
    """The task's robosuite environment without cameras: its model, sampler and success predicate are used."""
    settings = {
        "robots": ["Panda"],
        "gripper_types": "default",
        "use_camera_obs": False,
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "control_freq": 20,
        "ignore_done": True,
        "hard_reset": False,
    }
    if task.simulator == "robosuite":
        robosuite = assets.load_robosuite()
        controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        return robosuite.make(task.name, controller_configs=controller, **settings)
    envs = assets.load_libero()
    controller = assets.load_robosuite().load_controller_config(default_controller="OSC_POSE")
    bddl_file = str(assets.libero_root() / "bddl_files" / task.suite / f"{task.name}.bddl")
    problem = envs.bddl_base_domain.BDDLUtils.get_problem_info(bddl_file)["problem_name"]
    return envs.TASK_MAPPING[problem](
        bddl_file, controller_configs=controller, initialization_noise=None, **settings
    )
