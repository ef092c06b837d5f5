"""Compiled physics and control for one tick: robosuite's OSC_POSE controller between mj_step1 and mj_step2.

The equations are robosuite's (operational-space control, Khatib 1987), with its matrix inverses and pseudo-inverses
replaced by Cholesky solves.  The C library is called by symbol, so that the compiled code is cached on disk and runs
without the interpreter lock.

`registers` is a sim.stepping.Registers.

Shapes: J = 7 arm joints, V = degrees of freedom, Q = positions, G = 2 gripper actuators.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
from numba import types

from sim.mujoco_library import library_path

ARM_JOINTS = 7
NULLSPACE_KP = 10.0
NULLSPACE_KD = 2.0 * math.sqrt(NULLSPACE_KP)
GRIPPER_SPEED = 0.01
TIME_SINCE_SAMPLE, SAMPLED = 0, 1

llvmlite.binding.load_library_permanently(str(library_path()))
_signature = types.void(types.intp, types.intp)
_mj_step1 = types.ExternalFunction("mj_step1", _signature)
_mj_step2 = types.ExternalFunction("mj_step2", _signature)


class Constants(NamedTuple):
    """What a tick reads of the model and the controller's settings; never changes within a scene."""

    model_address: int
    data_address: int
    substeps: int
    timestep_s: float
    sample_period_s: float
    arm_qpos_J: np.ndarray
    arm_dof_J: np.ndarray
    arm_actuator_J: np.ndarray
    gripper_actuator_G: np.ndarray
    finger_qpos_G: np.ndarray
    site: int
    root_body: int
    dof_parent_V: np.ndarray
    dof_inertia_address_V: np.ndarray
    kp_6: np.ndarray
    kd_6: np.ndarray
    torque_low_J: np.ndarray
    torque_high_J: np.ndarray
    gripper_bias_G: np.ndarray
    gripper_weight_G: np.ndarray


class Views(NamedTuple):
    """MjData's own memory, as arrays."""

    qpos_Q: np.ndarray
    qvel_V: np.ndarray
    ctrl: np.ndarray
    bias_V: np.ndarray
    inertia: np.ndarray
    dof_motion_V6: np.ndarray
    subtree_com: np.ndarray
    site_xpos: np.ndarray
    site_xmat: np.ndarray


@numba.njit(cache=True)
def _cholesky(matrix):
    """Lower Cholesky factor, in place."""
    n = matrix.shape[0]
    for j in range(n):
        for k in range(j):
            matrix[j, j] -= matrix[j, k] * matrix[j, k]
        matrix[j, j] = math.sqrt(matrix[j, j])
        for i in range(j + 1, n):
            for k in range(j):
                matrix[i, j] -= matrix[i, k] * matrix[j, k]
            matrix[i, j] /= matrix[j, j]


@numba.njit(cache=True)
def _solve(factor, right):
    """Replace `right` (n,) by the solution of (factor @ factor.T) @ x = right."""
    n = factor.shape[0]
    for i in range(n):
        for k in range(i):
            right[i] -= factor[i, k] * right[k]
        right[i] /= factor[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            right[i] -= factor[k, i] * right[k]
        right[i] /= factor[i, i]


@numba.njit(cache=True)
def _jacobian(constants, views):
    """The grip site's Jacobian by the arm joints, (6, J): linear rows first.  As mj_jacSite computes it."""
    jacobian = np.empty((6, ARM_JOINTS))
    for j in range(ARM_JOINTS):
        motion = views.dof_motion_V6[constants.arm_dof_J[j]]
        x = views.site_xpos[constants.site, 0] - views.subtree_com[constants.root_body, 0]
        y = views.site_xpos[constants.site, 1] - views.subtree_com[constants.root_body, 1]
        z = views.site_xpos[constants.site, 2] - views.subtree_com[constants.root_body, 2]
        jacobian[0, j] = motion[3] + motion[1] * z - motion[2] * y
        jacobian[1, j] = motion[4] + motion[2] * x - motion[0] * z
        jacobian[2, j] = motion[5] + motion[0] * y - motion[1] * x
        jacobian[3, j] = motion[0]
        jacobian[4, j] = motion[1]
        jacobian[5, j] = motion[2]
    return jacobian


@numba.njit(cache=True)
def _arm_inertia(constants, views):
    """The arm's joint-space inertia (J, J), unpacked from MuJoCo's sparse layout (row i: i, its parent, ...)."""
    inertia = np.zeros((ARM_JOINTS, ARM_JOINTS))
    first = constants.arm_dof_J[0]
    for i in range(ARM_JOINTS):
        address = constants.dof_inertia_address_V[first + i]
        j = first + i
        while j >= first:
            inertia[i, j - first] = views.inertia[address]
            inertia[j - first, i] = views.inertia[address]
            address += 1
            j = constants.dof_parent_V[j]
    return inertia


@numba.njit(cache=True)
def _task_inertia_inverse(jacobian, inverse_times_jacobian):
    """J M^-1 J^T for the given rows, where the second argument is M^-1 J^T transposed."""
    n = jacobian.shape[0]
    result = np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            for k in range(ARM_JOINTS):
                result[a, b] += jacobian[a, k] * inverse_times_jacobian[b, k]
    return result


@numba.njit(cache=True)
def _pose_error(constants, views, registers):
    """(6,) position error and orientation error (half the sum of the axes' cross products) to the goal."""
    error = np.zeros(6)
    for i in range(3):
        error[i] = registers.goal_pos_3[i] - views.site_xpos[constants.site, i]
    for k in range(3):
        c0 = views.site_xmat[constants.site, k]
        c1 = views.site_xmat[constants.site, 3 + k]
        c2 = views.site_xmat[constants.site, 6 + k]
        d0, d1, d2 = registers.goal_ori_33[0, k], registers.goal_ori_33[1, k], registers.goal_ori_33[2, k]
        error[3] += 0.5 * (c1 * d2 - c2 * d1)
        error[4] += 0.5 * (c2 * d0 - c0 * d2)
        error[5] += 0.5 * (c0 * d1 - c1 * d0)
    return error


@numba.njit(cache=True)
def _torques(constants, views, registers):
    """OSC torques (J,): J^T [Lp F; Lo T] + bias + N^T M (kp (rest - q) - kd dq), position and rotation uncoupled."""
    jacobian = _jacobian(constants, views)
    inertia = _arm_inertia(constants, views)
    factor = inertia.copy()
    _cholesky(factor)
    inverse_times_jacobian = jacobian.copy()
    for a in range(6):
        _solve(factor, inverse_times_jacobian[a])

    joint_velocity = np.empty(ARM_JOINTS)
    nullspace = np.empty(ARM_JOINTS)
    for j in range(ARM_JOINTS):
        joint_velocity[j] = views.qvel_V[constants.arm_dof_J[j]]
        offset = registers.rest_J[j] - views.qpos_Q[constants.arm_qpos_J[j]]
        nullspace[j] = NULLSPACE_KP * offset - NULLSPACE_KD * joint_velocity[j]

    wrench = _pose_error(constants, views, registers)
    projected = np.zeros(6)  # J x, for the nullspace projector N^T M x = M x - J^T L J x
    for a in range(6):
        velocity = 0.0
        for j in range(ARM_JOINTS):
            velocity += jacobian[a, j] * joint_velocity[j]
            projected[a] += jacobian[a, j] * nullspace[j]
        wrench[a] = constants.kp_6[a] * wrench[a] - constants.kd_6[a] * velocity

    for rows in (slice(0, 3), slice(3, 6)):
        task = _task_inertia_inverse(jacobian[rows], inverse_times_jacobian[rows])
        _cholesky(task)
        _solve(task, wrench[rows])
    task = _task_inertia_inverse(jacobian, inverse_times_jacobian)
    _cholesky(task)
    _solve(task, projected)

    torques = np.empty(ARM_JOINTS)
    for j in range(ARM_JOINTS):
        torque = views.bias_V[constants.arm_dof_J[j]]
        for a in range(6):
            torque += jacobian[a, j] * (wrench[a] - projected[a])
        for k in range(ARM_JOINTS):
            torque += inertia[j, k] * nullspace[k]
        torques[j] = min(max(torque, constants.torque_low_J[j]), constants.torque_high_J[j])
    return torques


@numba.njit(cache=True)
def _set_goal(constants, views, registers, delta_pos_3, turn_33, turns):
    """Goal = current pose + delta.  As in robosuite, a zero rotation keeps the previous goal orientation."""
    for i in range(3):
        registers.goal_pos_3[i] = views.site_xpos[constants.site, i] + delta_pos_3[i]
    if turns:
        for i in range(3):
            for k in range(3):
                total = 0.0
                for m in range(3):
                    total += turn_33[i, m] * views.site_xmat[constants.site, 3 * m + k]
                registers.goal_ori_33[i, k] = total


@numba.njit(cache=True)
def sample_due(constants, clock_2):
    """Advance robosuite's observable clock by one substep; True when it samples now (its float sums included)."""
    clock_2[TIME_SINCE_SAMPLE] += constants.timestep_s
    due = clock_2[SAMPLED] == 0.0 and clock_2[TIME_SINCE_SAMPLE] <= constants.sample_period_s
    if due:
        clock_2[SAMPLED] = 1.0
    if clock_2[TIME_SINCE_SAMPLE] >= constants.sample_period_s:
        due = due or clock_2[SAMPLED] == 0.0
        clock_2[TIME_SINCE_SAMPLE] %= constants.sample_period_s
        clock_2[SAMPLED] = 0.0
    return due


@numba.njit(cache=True, nogil=True)
def tick(constants, views, registers, delta_pos_3, turn_33, turns, gripper_direction):
    """Advance one control tick.  `delta_pos_3` in m, `turn_33` the goal's rotation, direction +1 closes, -1 opens."""
    before = views.qpos_Q.copy()
    for substep in range(constants.substeps):
        before[:] = views.qpos_Q
        _mj_step1(constants.model_address, constants.data_address)
        if substep == 0:
            _set_goal(constants, views, registers, delta_pos_3, turn_33, turns)
        torques = _torques(constants, views, registers)
        for j in range(ARM_JOINTS):
            views.ctrl[constants.arm_actuator_J[j]] = torques[j]
        for g in range(2):
            moved = registers.gripper_G[g] + (-1.0 if g == 0 else 1.0) * GRIPPER_SPEED * gripper_direction
            registers.gripper_G[g] = min(max(moved, -1.0), 1.0)
            command = constants.gripper_bias_G[g] + constants.gripper_weight_G[g] * registers.gripper_G[g]
            views.ctrl[constants.gripper_actuator_G[g]] = command
        _mj_step2(constants.model_address, constants.data_address)
        if sample_due(constants, registers.clock_2):
            registers.observed_qpos_Q[:] = before
            for g in range(2):
                registers.observed_fingers_G[g] = views.qpos_Q[constants.finger_qpos_G[g]]
