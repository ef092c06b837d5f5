# pyright: reportAttributeAccessIssue=false
"""The compiled tick against robosuite's own step, from states along stock trajectories of the scripted experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mujoco
import numpy as np
import pytest

from sim.contacts import ContactCheck
from sim.scene import Scene
from sim.stepping import FastStepper, Registers, StockStepper
from sim.suites import find_task
from tests.sim.stock import expert_actions

TOLERANCE = 1e-9
NUDGE_RAD = 1e-15
STATES_PER_TASK, STRIDE = 40, 3
TASKS = [
    pytest.param("libero_object/0", marks=pytest.mark.libero),
    pytest.param("libero_goal/1", marks=pytest.mark.libero),
    pytest.param("libero_spatial/2", marks=pytest.mark.libero),
    "robosuite/0",
    "robosuite/2",
]
STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class TwoSteppers:
    """Both ways to step one scene, from the same state."""

    def __init__(self, task_id: str) -> None:
        self.scene = Scene(find_task(task_id), fast=False)
        self.stock, self.fast = StockStepper(self.scene.env), FastStepper(self.scene.env)
        self.contact = ContactCheck(self.scene.env)
        self.sensors_off = self.scene.model.opt.disableflags

    def snapshot(self) -> tuple[np.ndarray, Registers]:
        physics = np.empty(mujoco.mj_stateSize(self.scene.model, STATE))
        mujoco.mj_getState(self.scene.model, self.scene.data, physics, STATE)
        return physics, self.stock.save()

    def go_to(self, snapshot: tuple[np.ndarray, Registers]) -> None:
        mujoco.mj_setState(self.scene.model, self.scene.data, snapshot[0], STATE)
        self.stock.restore(snapshot[1])
        self.fast.restore(snapshot[1])
        mujoco.mj_forward(self.scene.model, self.scene.data)

    def step_stock(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Positions and velocities, and robosuite's or LIBERO's own verdict."""
        self.scene.model.opt.disableflags = 0
        self.stock.step(action)
        return self.motion(), bool(self.scene.env._check_success())

    def step_fast(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """The same by the compiled tick and the array comparison of contacts."""
        self.scene.model.opt.disableflags = self.sensors_off
        self.fast.step(action)
        self.scene.env.check_contact = self.contact
        verdict = bool(self.scene.env._check_success())
        del self.scene.env.check_contact
        return self.motion(), verdict

    def motion(self) -> np.ndarray:
        return np.concatenate([self.scene.data.qpos, self.scene.data.qvel])


def stock_episodes(two: TwoSteppers) -> Iterator[np.ndarray]:
    """The expert's actions, episode after episode, each until it succeeds; the caller steps."""
    prefix = "seed:" if two.scene.task.simulator == "robosuite" else ""
    for episode in itertools.count():
        two.scene.reset(f"{prefix}{episode}")
        for action in expert_actions(two.scene, two.scene.task.max_ticks):
            yield action
            if two.scene.env._check_success():
                break


@pytest.mark.parametrize("task_id", TASKS)
def test_a_tick_and_its_verdict_equal_the_stock_ones(task_id: str) -> None:
    two = TwoSteppers(task_id)
    compared, touching, closing, solved, undefined = 0, 0, 0, 0, 0
    for tick, action in enumerate(stock_episodes(two)):
        before = two.snapshot()
        expected, verdict = two.step_stock(action)
        if tick % STRIDE and not verdict:
            continue
        after, registers = two.snapshot(), two.stock.save()
        touching, closing, solved = touching + (two.scene.data.ncon > 0), closing + (action[6] > 0), solved + verdict

        two.go_to(before)
        got, fast_verdict = two.step_fast(action)
        if np.abs(got - expected).max() > TOLERANCE:
            # A contact on the edge: the stock step must then differ as much from itself, by rounding alone.
            two.go_to(before)
            two.scene.data.qpos[:7] += NUDGE_RAD
            nudged, _ = two.step_stock(action)
            assert np.abs(nudged - expected).max() > TOLERANCE, f"tick {tick}: {np.abs(got - expected).max():.1e}"
            undefined += 1
        else:
            assert fast_verdict == verdict
            assert np.abs(two.fast.save().goal_pos_3 - registers.goal_pos_3).max() <= TOLERANCE
            assert np.abs(two.fast.save().goal_ori_33 - registers.goal_ori_33).max() <= TOLERANCE
            assert np.array_equal(two.fast.save().gripper_G, registers.gripper_G)
        two.go_to(after)
        compared += 1
        if compared >= STATES_PER_TASK and solved:
            break
    assert undefined <= 1
    assert min(touching, closing, solved) > 0, "the trajectories must touch, grasp and succeed to prove anything"


def test_a_zero_rotation_keeps_the_goal_orientation() -> None:
    scene = Scene(find_task("robosuite/0"))
    scene.reset("seed:1")
    before = scene.save().control.goal_ori_33
    scene.step([0.5, 0, 0, 0, 0, 0, -1])
    assert np.array_equal(scene.save().control.goal_ori_33, before)
    scene.step([0, 0, 0, 0, 0, 0.5, -1])
    assert not np.array_equal(scene.save().control.goal_ori_33, before)
