"""One built task, kept alive and reused: reset to any initial state, step, save and restore, render."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mujoco
import numpy as np

from sim import assets, contacts
from sim.initial_states import fixed_state, fresh_seed
from sim.mujoco_library import free_build_memory
from sim.placement import Placement, numpy_generator
from sim.renderer import SceneRenderer
from sim.shifts import Shift
from sim.stepping import FastStepper, Registers, Stepper, StockStepper
from sim.suites import Task

SETTLE_TICKS = 10
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1.0])
PROTOCOL_SEED = 0
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything a step and its observation depend on: restoring it continues the same episode."""

    physics: np.ndarray
    """mjSTATE_INTEGRATION: time, positions, velocities, warm start, controls"""
    body_pos: np.ndarray
    """(nbody, 3) body positions of the model, m: fixtures are placed there"""
    body_quat: np.ndarray
    """(nbody, 4) body orientations of the model"""
    site_rgba: np.ndarray
    """(nsite, 4) colours of sites: a burner glows by one"""
    control: Registers
    """the controller's memory and the last sampled observation"""


class Occupant(Protocol):
    """Whoever's episode is in the scene now."""

    def step_aside(self) -> None:
        """Save the episode: another one is about to take the scene."""
        ...


class Scene:
    """A task's model, data, controller and lazy renderers.  Not thread-safe; one process may hold several.

    `data` holds what the stock simulator's would after the same actions.  `render` and `proprio` show what its
    observation would: robosuite samples a little before the end of a tick.  `shift` is what is changed in its world.
    """

    def __init__(self, task: Task, *, fast: bool = True, shift: Shift | None = None) -> None:
        self.task = task
        self.shift = shift
        self.occupant: Occupant | None = None
        # The constructor draws a placement that nobody sees, and the size of robosuite's cube.
        with numpy_generator(np.random.RandomState(PROTOCOL_SEED).get_state()):
            self.env = _build_env(task)
        if shift is not None:
            shift.apply(self.env)
        free_build_memory()
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        self._stepper: Stepper = FastStepper(self.env) if fast else StockStepper(self.env)
        if fast:
            self.env.check_contact = contacts.ContactCheck(self.env)
        self._robot = self.env.robots[0]
        self._hand = self.model.body(self._robot.robot_model.eef_name).id
        self._view = mujoco.MjData(self.model)  # observations are drawn here, leaving `data` untouched
        self._placement = Placement(self.env)
        self._renderers: dict[bool, SceneRenderer] = {}

    def reset(self, state_id: str) -> None:
        """The protocol's reset: place fixtures, set the state, reset the controller, settle for ten ticks."""
        self.place(state_id)
        self._show_changes()
        # LIBERO's observables are sampled by force in reset() and again in set_init_state().
        self._stepper.reset(forced_samples=2 if self.task.simulator == "libero" else 1)
        for _ in range(SETTLE_TICKS):
            self.step(SETTLE_ACTION)

    def place(self, state_id: str) -> None:
        """Only the first half of `reset`: fixtures and objects stand where the state has them, nothing has moved."""
        kind, _, number = state_id.rpartition(":")
        kinds = ("seed",) if self.task.simulator == "robosuite" else ("", "fresh", "seed")
        if not number.isdigit() or kind not in kinds:
            examples = [f"{kind}:17".lstrip(":") for kind in kinds]
            raise ValueError(f"initial state of {self.task.id} must be like one of {examples}, got {state_id!r}")
        if kind == "fresh":
            self._placement.draw(fresh_seed(self.task, int(number)))
        elif kind == "seed":
            self._placement.draw(int(number))
        else:
            state = fixed_state(self.task, int(number))
            # The protocol seeds once and resets before each of its episodes: fixtures stand differently in each.
            self._placement.draw(PROTOCOL_SEED, resets=int(number) + 1)
            self.data.time = state[0]
            self.data.qpos[:], self.data.qvel[:] = np.split(state[1:], [self.model.nq])
            mujoco.mj_forward(self.model, self.data)

    def step(self, action: Sequence[float] | np.ndarray) -> bool:
        """Apply one environment action (7,) for one 20 Hz tick; True when the task's success predicate holds.

        Entries 0-5 are position and rotation deltas in [-1, 1]; entry 6 opens the gripper at -1, closes it at +1.
        """
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (7,):
            raise ValueError(f"action must have shape (7,), got {command.shape}")
        self._show_changes()
        self._stepper.step(command)
        return bool(self.env._check_success())

    def save(self) -> State:
        """A snapshot that `restore` continues from."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        return State(
            physics=physics,
            body_pos=self.model.body_pos.copy(),
            body_quat=self.model.body_quat.copy(),
            site_rgba=self.model.site_rgba.copy(),
            control=self._stepper.save(),
        )

    def restore(self, state: State) -> None:
        """Go back to a snapshot of this scene."""
        self.model.body_pos[:] = state.body_pos
        self.model.body_quat[:] = state.body_quat
        self.model.site_rgba[:] = state.site_rgba
        mujoco.mj_setState(self.model, self.data, state.physics, _STATE)
        self._stepper.restore(state.control)
        mujoco.mj_step1(self.model, self.data)  # positions of bodies and contacts, for whoever reads `data`

    def render(self, camera: str, height: int = 256, width: int = 256, *, coarse: bool = False) -> np.ndarray:
        """The camera's image, uint8 (height, width, 3), upright; pixels are those of the stock observation.

        coarse: visual meshes are simplified (sim/meshes.py): a third of the time, nearly the same picture.
        """
        self._look()
        if coarse not in self._renderers:
            self._renderers[coarse] = SceneRenderer(self.model, coarse=coarse)
        return self._renderers[coarse].render(self._view, camera, height, width)

    def proprio(self) -> np.ndarray:
        """(8,) float32: end-effector position (m), axis-angle (rad), the two finger positions (m)."""
        from robosuite.utils import transform_utils

        fingers = self._look().observed_fingers_G
        quat_xyzw = np.roll(self._view.xquat[self._hand], -1)
        rotation = transform_utils.quat2axisangle(quat_xyzw)
        return np.concatenate([self._view.site_xpos[self._robot.eef_site_id], rotation, fingers], dtype=np.float32)

    def close(self) -> None:
        """Free the renderers; the scene cannot be used afterwards."""
        for renderer in self._renderers.values():
            renderer.close()
        self.env.close()

    def _look(self) -> Registers:
        """Bring `_view` to the positions that the observation shows."""
        control = self._stepper.save()
        self._view.qpos[:] = control.observed_qpos_Q
        mujoco.mj_kinematics(self.model, self._view)
        mujoco.mj_comPos(self.model, self._view)
        mujoco.mj_camlight(self.model, self._view)
        return control

    def _show_changes(self) -> None:
        """Let LIBERO light or darken a burner by the present state; its own step does so after the observation."""
        if self.task.simulator == "libero":
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
    return envs.TASK_MAPPING[problem](bddl_file, controller_configs=controller, initialization_noise=None, **settings)
