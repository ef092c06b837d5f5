"""Scripted experts: functions of the present state, in the policy's convention, that solve their tasks."""

from __future__ import annotations

import numpy as np
import pytest

from sim.expert import CLOSED, OPEN, Aim, Expert
from sim.expert_skills import PickPlace
from sim.expert_tasks import RECIPES, experts_of, recipe_for
from sim.scene import Scene
from sim.suites import find_suite, find_task


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


def expert_for(scene: Scene, speed: float = 0.75) -> Expert:
    return Expert(scene, recipe_for(scene.task), speed=speed)


def apply(scene: Scene, action: np.ndarray) -> bool:
    return scene.step([*np.clip(action[:6], -1, 1), -np.sign(2 * action[6] - 1)])


def ticks_until_success(scene: Scene, state_id: str) -> int | None:
    scene.reset(state_id)
    expert = expert_for(scene)
    return next((tick for tick in range(scene.task.max_ticks) if apply(scene, expert.action())), None)


def test_an_action_is_a_function_of_the_state_alone(lift: Scene) -> None:
    lift.reset("seed:0")
    seasoned = expert_for(lift)
    for _ in range(30):
        apply(lift, seasoned.action())
        np.testing.assert_array_equal(seasoned.action(), expert_for(lift).action())


def test_actions_stay_within_their_speed_and_never_turn_the_hand(lift: Scene) -> None:
    lift.reset("seed:1")
    expert = expert_for(lift, speed=0.6)
    for _ in range(40):
        action = expert.action()
        assert np.linalg.norm(action[:3]) <= 0.6 + 1e-9
        assert not action[3:6].any() and action[6] in (OPEN, CLOSED)
        assert 0 <= expert.haste(action) <= 1 + 1e-9
        apply(lift, action)


def test_lift_succeeds_from_several_seeds(lift: Scene) -> None:
    assert all(ticks_until_success(lift, f"seed:{seed}") is not None for seed in range(4))


def test_a_missed_grasp_is_opened_and_tried_again(lift: Scene) -> None:
    lift.reset("seed:2")
    close = np.array([0, 0, 0, 0, 0, 0, CLOSED])
    for _ in range(12):
        apply(lift, close)
    expert = expert_for(lift)
    assert expert.action()[6] == OPEN
    assert any(apply(lift, expert.action()) for _ in range(100))


def test_a_cube_taken_away_is_fetched_again(lift: Scene) -> None:
    lift.reset("seed:3")
    expert = expert_for(lift)
    while not (expert.view.pinches("cube_main") and expert.view.closed > 0.9):
        apply(lift, expert.action())
    cube = lift.model.joint("cube_joint0").qposadr[0]
    lift.data.qpos[cube : cube + 2] += [0.0, 0.12]
    assert any(apply(lift, expert.action()) for _ in range(150))


def test_an_expert_whose_recipe_is_done_opens_and_stays(lift: Scene) -> None:
    class Done:
        def aim(self, view: object) -> Aim | None:
            return None

        def progress(self, view: object) -> float:
            return 1.0

    lift.reset("seed:0")
    np.testing.assert_array_equal(Expert(lift, (Done(),)).action(), [0, 0, 0, 0, 0, 0, OPEN])


def test_the_first_unfinished_skill_acts(lift: Scene) -> None:
    class Done:
        def aim(self, view: object) -> Aim | None:
            return None

        def progress(self, view: object) -> float:
            return 1.0

    lift.reset("seed:0")
    pick = PickPlace(body="cube_main")
    np.testing.assert_array_equal(Expert(lift, (Done(), pick)).action(), Expert(lift, (pick,)).action())


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5])
def test_an_impossible_speed_is_refused(lift: Scene, speed: float) -> None:
    with pytest.raises(ValueError, match="speed"):
        Expert(lift, recipe_for(lift.task), speed=speed)


def test_a_task_without_a_recipe_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ValueError, match="no experts for libero_10"):
        experts_of(find_suite("libero_10"))


@pytest.mark.parametrize("suite", sorted(RECIPES))
def test_every_recipe_is_for_a_task_of_its_suite(suite: str) -> None:
    assert set(RECIPES[suite]) <= {task.name for task in find_suite(suite).tasks}


@pytest.mark.libero
@pytest.mark.parametrize("task_id", ["libero_object/1", "libero_goal/8"])
def test_liberos_tasks_are_solved_from_fixed_states(task_id: str) -> None:
    scene = Scene(find_task(task_id))
    assert all(ticks_until_success(scene, state) is not None for state in ("0", "31"))
