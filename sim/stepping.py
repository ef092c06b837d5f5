"""Two ways to advance a scene by one control tick: `FastStepper` (compiled) and `StockStepper` (robosuite's own)."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names live in compiled modules without stubs.

from __future__ import annotations

from typing import NamedTuple, Protocol

import mujoco
import numpy as np

ROTATION, GRIPPER = slice(3, 6), 6


class Registers(NamedTuple):
    """What the controller and the observables remember between ticks."""

    goal_pos_3: np.ndarray
    """the controller's goal position, m"""
    goal_ori_33: np.ndarray
    """the controller's goal orientation"""
    rest_J: np.ndarray
    """joint positions that the nullspace is drawn to, rad"""
    gripper_G: np.ndarray
    """running gripper command in [-1, 1]"""
    clock_2: np.ndarray
    """robosuite's observable clock: seconds since the last sample, and whether this period was sampled"""
    observed_qpos_Q: np.ndarray
    """positions that the last sampled image and pose show"""
    observed_fingers_G: np.ndarray
    """finger positions in the last sample, m"""

    def copy(self) -> Registers:
        """A snapshot."""
        return Registers(*(array.copy() for array in self))


class Stepper(Protocol):
    """Advances one environment by control ticks."""

    def reset(self, forced_samples: int) -> None:
        """Take over from a freshly reset environment whose observables were sampled by force so many times."""
        ...

    def step(self, action: np.ndarray) -> None:
        """Advance one tick by an environment action (7,)."""
        ...

    def save(self) -> Registers: ...

    def restore(self, registers: Registers) -> None: ...


class FastStepper:
    """The compiled tick.  Equal to the stock step, up to rounding: tests/sim/test_stepping.py."""

    def __init__(self, env) -> None:
        from sim import osc  # numba and the C library, only where something steps

        self._env = env
        self._tick, self._sample_due = osc.tick, osc.sample_due
        self._just_reset = False
        self._constants = _constants(env, osc)
        self._scale = np.array(env.robots[0].controller.output_max, dtype=np.float64)
        model, data = env.sim.model._model, env.sim.data._data
        # The wrist's force and torque sensors feed nothing, so physics is the same without them.
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._views = osc.Views(
            qpos_Q=data.qpos,
            qvel_V=data.qvel,
            ctrl=data.ctrl,
            bias_V=data.qfrc_bias,
            inertia=data.qM,
            dof_motion_V6=data.cdof,
            subtree_com=data.subtree_com,
            site_xpos=data.site_xpos,
            site_xmat=data.site_xmat,
        )
        self._registers = _fresh_registers(env, forced_samples=0)
        self._compile()

    def _compile(self) -> None:
        """Compile (12 s, once a machine) while the scene is built, whose deadline is long, and not in an episode."""
        from robosuite.utils import transform_utils

        before = self._registers.copy()
        turn = transform_utils.quat2mat(np.array([0.0, 0.0, 0.0, 1.0]))
        no_time = self._constants._replace(substeps=0)
        self._tick(no_time, self._views, self._registers, np.zeros(3), turn, False, 0.0)
        self._sample_due(self._constants, self._registers.clock_2)
        self._env.robots[0].controller.run_controller()
        self.restore(before)

    def reset(self, forced_samples: int) -> None:
        """See Stepper."""
        self.restore(_fresh_registers(self._env, forced_samples))
        self._just_reset = True

    def step(self, action: np.ndarray) -> None:
        """See Stepper."""
        from robosuite.utils import transform_utils

        if self._just_reset:
            self._just_reset = False
            return self._first_step(action)
        delta = np.clip(action[:6], -1.0, 1.0) * self._scale
        turns = bool(np.any(delta[ROTATION] != 0.0))
        turn = transform_utils.quat2mat(transform_utils.axisangle2quat(delta[ROTATION])) if turns else np.eye(3)
        direction = float(np.sign(action[GRIPPER]))
        self._tick(self._constants, self._views, self._registers, delta[:3], turn, turns, direction)
        return None

    def _first_step(self, action: np.ndarray) -> None:
        """robosuite's own step: its controller's first command still uses the pose before the state was set."""
        self._env.step(action)
        clock = self._registers.clock_2
        for _ in range(self._constants.substeps):
            self._sample_due(self._constants, clock)
        gripper = np.array(self._env.robots[0].gripper.current_action, dtype=np.float64)
        self.restore(_fresh_registers(self._env, 0)._replace(clock_2=clock, gripper_G=gripper))

    def save(self) -> Registers:
        """See Stepper."""
        return self._registers.copy()

    def restore(self, registers: Registers) -> None:
        """See Stepper."""
        for own, given in zip(self._registers, registers, strict=True):
            own[:] = given


class StockStepper:
    """robosuite's own step, for comparison.  Its observation shows the state after the tick."""

    def __init__(self, env) -> None:
        self._env = env

    def reset(self, forced_samples: int) -> None:
        """See Stepper."""

    def step(self, action: np.ndarray) -> None:
        """See Stepper."""
        self._env.step(action)

    def save(self) -> Registers:
        """See Stepper."""
        gripper = np.array(self._env.robots[0].gripper.current_action, dtype=np.float64)
        return _fresh_registers(self._env, forced_samples=0)._replace(gripper_G=gripper)

    def restore(self, registers: Registers) -> None:
        """See Stepper."""
        robot = self._env.robots[0]
        robot.controller.goal_pos = registers.goal_pos_3.copy()
        robot.controller.goal_ori = registers.goal_ori_33.copy()
        robot.controller.initial_joint = registers.rest_J.copy()
        robot.controller.new_update = True
        robot.gripper.current_action = registers.gripper_G.copy()


def _fresh_registers(env, forced_samples: int) -> Registers:
    """Registers of a freshly reset environment; the observables' clock ran once for each forced sample."""
    robot, qpos = env.robots[0], env.sim.data.qpos
    return Registers(
        goal_pos_3=np.array(robot.controller.goal_pos, dtype=np.float64),
        goal_ori_33=np.array(robot.controller.goal_ori, dtype=np.float64),
        rest_J=np.array(robot.controller.initial_joint, dtype=np.float64),
        gripper_G=np.zeros(2),
        clock_2=np.array([forced_samples * env.model_timestep, float(forced_samples > 0)]),
        observed_qpos_Q=np.array(qpos),
        observed_fingers_G=np.array(qpos[robot._ref_gripper_joint_pos_indexes]),
    )


def _constants(env, osc):
    """The compiled tick's constants for a built environment; refuses a controller it was not written for."""
    robot, model = env.robots[0], env.sim.model._model
    controller = robot.controller
    if controller.name != "OSC_POSE" or controller.impedance_mode != "fixed" or not controller.uncoupling:
        raise ValueError(f"controller must be OSC_POSE, fixed impedance, uncoupled, got {controller.name}")
    gripper_actuators = np.array(robot._ref_joint_gripper_actuator_indexes, dtype=np.int64)
    low, high = model.actuator_ctrlrange[gripper_actuators].T
    torque_low, torque_high = robot.torque_limits
    site = robot.eef_site_id
    return osc.Constants(
        model_address=model._address,
        data_address=env.sim.data._data._address,
        substeps=int(env.control_timestep / env.model_timestep),
        timestep_s=env.model_timestep,
        sample_period_s=1.0 / env.control_freq,
        arm_qpos_J=np.array(robot._ref_joint_pos_indexes, dtype=np.int64),
        arm_dof_J=np.array(robot._ref_joint_vel_indexes, dtype=np.int64),
        arm_actuator_J=np.array(robot._ref_joint_actuator_indexes, dtype=np.int64),
        gripper_actuator_G=gripper_actuators,
        finger_qpos_G=np.array(robot._ref_gripper_joint_pos_indexes, dtype=np.int64),
        site=int(site),
        root_body=int(model.body_rootid[model.site_bodyid[site]]),
        dof_parent_V=model.dof_parentid.astype(np.int64),
        dof_inertia_address_V=model.dof_Madr.astype(np.int64),
        kp_6=np.array(controller.kp, dtype=np.float64),
        kd_6=np.array(controller.kd, dtype=np.float64),
        torque_low_J=np.array(torque_low, dtype=np.float64),
        torque_high_J=np.array(torque_high, dtype=np.float64),
        gripper_bias_G=0.5 * (high + low),
        gripper_weight_G=0.5 * (high - low),
    )
