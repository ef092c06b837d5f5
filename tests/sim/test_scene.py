# pyright: reportAttributeAccessIssue=false
"""Scenes: equal to LIBERO's own environment, a function of the state alone, restorable."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from sim.fresh_states import draw_checksum
from sim.initial_states import fixed_state, fresh_list
from sim.scene import Scene
from sim.suites import find_task
from tests.sim.stock import StockEnv, expert_actions

CAMERAS = ("agentview", "robot0_eye_in_hand")


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


def test_what_is_built_is_the_tasks_whatever_has_been_drawn_before(lift: Scene) -> None:
    np.random.seed(1)
    drawn = np.random.get_state()[1].copy()
    other = Scene(lift.task)
    for name in ("geom_size", "body_mass", "body_inertia", "body_pos", "mesh_vert"):
        assert np.array_equal(getattr(lift.model, name), getattr(other.model, name)), name
    assert np.array_equal(np.random.get_state()[1], drawn)


def stock_proprio(observation: dict[str, np.ndarray]) -> np.ndarray:
    from robosuite.utils.transform_utils import quat2axisangle

    rotation = quat2axisangle(observation["robot0_eef_quat"].copy())
    return np.concatenate([observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]])


@pytest.mark.libero
@pytest.mark.parametrize("task_id", ["libero_object/0", "libero_goal/1", "libero_spatial/4"])
def test_images_and_state_equal_liberos_own_along_two_episodes(task_id: str) -> None:
    task = find_task(task_id)
    stock, scene = StockEnv(task), Scene(task)
    for state in (0, 1):
        observation = stock.reset(fixed_state(task, state))
        scene.reset(str(state))
        for _ in range(4):
            for camera in CAMERAS:
                assert np.array_equal(scene.render(camera, 128, 128), observation[f"{camera}_image"][::-1])
            np.testing.assert_allclose(scene.proprio(), stock_proprio(observation), atol=1e-6)
            for action in np.tile([0.3, -0.4, -0.8, 0.1, 0, 0.2, 1], (3, 1)):
                observation, done = stock.step(action)
                assert scene.step(action) == done


@pytest.mark.libero
def test_a_burner_lights_in_the_same_image_as_liberos() -> None:
    task = find_task("libero_goal/7")
    stock, scene = StockEnv(task), Scene(task)
    stock.reset(fixed_state(task, 0))
    scene.reset("0")
    knob = scene.model.joint("flat_stove_1_button")
    for data in (scene.data, stock.env.sim.data):  # about to turn past the stove's threshold of 0.5 rad
        data.qpos[knob.qposadr[0]], data.qvel[knob.dofadr[0]] = 0.45, 20.0
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    images = []
    for _ in range(3):
        observation, done = stock.step(still)
        assert scene.step(still) == done
        images.append(scene.render("agentview", 128, 128))
        assert np.array_equal(images[-1], observation["agentview_image"][::-1])
    assert not np.array_equal(images[0], images[1]), "the burner must have lit"


@pytest.mark.libero
@pytest.mark.parametrize("task_id", ["libero_object/3", "libero_spatial/0"])
def test_listed_fresh_states_are_drawn_again_exactly(task_id: str) -> None:
    entry = fresh_list()[task_id]
    assert draw_checksum(Scene(find_task(task_id)), entry["seeds"]) == entry["checksum"]


@pytest.mark.libero
def test_a_reset_is_a_function_of_the_state_alone() -> None:
    scene = Scene(find_task("libero_goal/1"))
    first = {}
    for state in ("3", "0", "fresh:1", "3", "fresh:1", "0"):
        scene.reset(state)
        now = np.concatenate([scene.data.qpos, scene.data.qvel, scene.model.body_pos.ravel(), scene.proprio()])
        assert np.array_equal(first.setdefault(state, now), now)
    assert len({now.tobytes() for now in first.values()}) == 3


def test_a_restored_scene_continues_the_same_episode(lift: Scene) -> None:
    lift.reset("seed:3")
    saved, paths = lift.save(), []
    for other in ("seed:4", "seed:3"):
        for _ in range(10):
            lift.step([0.2, 0.3, -0.9, 0, 0.1, 0.3, 1])
        paths.append((lift.data.qpos.copy(), lift.proprio(), lift.render("agentview", 64, 64)))
        lift.reset(other)
        lift.restore(saved)
    for first, second in zip(*paths, strict=True):
        assert np.array_equal(first, second)


def test_looking_does_not_change_the_episode(lift: Scene) -> None:
    ends = []
    for look in (True, False):
        lift.reset("seed:5")
        for action in expert_actions(lift, 20):
            lift.step(action)
            if look:
                lift.render("agentview", 64, 64)
                lift.proprio()
        ends.append(lift.data.qpos.copy())
    assert np.array_equal(*ends)


def test_success_is_reported_at_the_tick_it_holds(lift: Scene) -> None:
    lift.reset("seed:0")
    verdicts = [lift.step(action) for action in expert_actions(lift, 60)]
    assert not verdicts[0]
    assert any(verdicts)


def test_a_freed_scene_leaves_the_others_pictures_alone(lift: Scene) -> None:
    lift.reset("seed:0")
    before = lift.render("agentview", 64, 64)
    other = Scene(find_task("robosuite/1"))
    other.reset("seed:0")
    other.render("agentview", 64, 64)
    assert np.array_equal(lift.render("agentview", 64, 64), before)
    del other
    gc.collect()
    assert np.array_equal(lift.render("agentview", 64, 64), before)


def test_a_larger_picture_of_the_same_view_needs_no_new_scene(lift: Scene) -> None:
    lift.reset("seed:0")
    small = lift.render("agentview", 64, 64)
    assert lift.render("agentview", 300, 400).shape == (300, 400, 3)
    assert np.array_equal(lift.render("agentview", 64, 64), small)


@pytest.mark.parametrize("state", ["17", "fresh:3", "seed:", "seed:x", "", "soon"])
def test_an_unknown_state_is_refused_with_an_example(lift: Scene, state: str) -> None:
    with pytest.raises(ValueError, match="seed:17"):
        lift.reset(state)


def test_an_unknown_camera_is_refused_with_those_there_are(lift: Scene) -> None:
    with pytest.raises(ValueError, match="agentview"):
        lift.render("agentveiw", 64, 64)


def test_a_misshapen_action_is_refused(lift: Scene) -> None:
    with pytest.raises(ValueError, match=r"\(7,\), got \(6,\)"):
        lift.step(np.zeros(6))
