"""Coarse meshes: nearly the picture, never the physics, and never an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from protos import episode_pb2, rollout_pb2
from robot_client.leases import Lease
from sim.leasing import rollout_of
from sim.libero_arm import LiberoArm, SimulatedTask
from sim.meshes import CHANGED, coarse_meshes
from sim.renderer import VISUAL_GROUP
from sim.scene import Scene
from sim.suites import find_task


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


def test_a_model_is_what_it_was_bit_for_bit(lift: Scene) -> None:
    before = {name: getattr(lift.model, name).copy() for name in CHANGED}
    with coarse_meshes(lift.model, VISUAL_GROUP):
        assert lift.model.mesh_facenum.sum() < 0.5 * before["mesh_facenum"].sum()
    for name, array in before.items():
        assert np.array_equal(getattr(lift.model, name), array), name


def test_meshes_that_only_physics_knows_are_left_alone(lift: Scene) -> None:
    shown = {int(lift.model.geom_dataid[geom]) for geom in np.flatnonzero(lift.model.geom_group == VISUAL_GROUP)}
    unseen = [mesh for mesh in range(lift.model.nmesh) if mesh not in shown]
    before = lift.model.mesh_facenum.copy()
    with coarse_meshes(lift.model, VISUAL_GROUP):
        assert unseen and np.array_equal(lift.model.mesh_facenum[unseen], before[unseen])


@pytest.mark.parametrize("task", ["robosuite/0", pytest.param("libero_goal/8", marks=pytest.mark.libero)])
def test_the_picture_is_nearly_the_stock_one_and_the_stock_one_stays(task: str) -> None:
    scene = Scene(find_task(task))
    scene.reset("0" if scene.task.simulator == "libero" else "seed:0")
    stock = scene.render("agentview", 128, 128)
    coarse = scene.render("agentview", 128, 128, coarse=True)
    difference = np.abs(stock.astype(int) - coarse)
    assert 0 < difference.mean() < 1.5
    assert (difference.max(-1) > 10).mean() < 0.05
    assert np.array_equal(scene.render("agentview", 128, 128), stock)


def test_the_episode_says_how_it_was_drawn(lift: Scene) -> None:
    arm = LiberoArm(scene=lift, image_sizes={"agentview": (128, 128)})
    pictures, trees = [], []
    for coarse in (False, True, False):
        task = SimulatedTask(name="robosuite/0", instruction="lift", initial_state="seed:0", coarse=coarse)
        arm.reset(task)
        pictures.append(arm.observe().images["agentview"])
        trees.append(arm.spec.asset_tree)
    assert np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[1])
    assert trees == ["robosuite's own", "robosuite's own, coarse meshes", "robosuite's own"]


@pytest.mark.parametrize("allowed", [True, False])
def test_an_evaluation_is_never_coarse(allowed: bool) -> None:
    def coarse(purpose: episode_pb2.Purpose) -> bool:
        rollout = rollout_pb2.Rollout(task="robosuite/0", initial_state="seed:0", purpose=purpose)
        task = rollout_of(Lease(lease_id="a", rollout=rollout), coarse_practice=allowed).task
        assert isinstance(task, SimulatedTask)
        return task.coarse

    assert not coarse(episode_pb2.PURPOSE_EVALUATE)
    assert coarse(episode_pb2.PURPOSE_TRAIN) == allowed
