"""Privileged progress: it follows an expert's work, and stays low without any."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.progress import TaskProgress
from sim.scene import SETTLE_ACTION, Scene
from sim.suites import find_task

SLACK = 0.06
"""A hand that goes up before it goes sideways is farther away for a while."""


def worked(scene: Scene, state_id: str) -> Iterator[float]:
    """Progress before the expert's first tick and after each, until success."""
    scene.reset(state_id)
    progress, expert = TaskProgress(scene, recipe_for(scene.task)), Expert(scene, recipe_for(scene.task))
    yield progress.now(success=False)
    success = False
    while not success:
        action = expert.action()
        success = scene.step([*np.clip(action[:6], -1, 1), -np.sign(2 * action[6] - 1)])
        yield progress.now(success=success)


def require_growth(progress_T: np.ndarray) -> None:
    """From below 0.3 to 1, never falling by more than the slack below what it was."""
    assert progress_T[0] < 0.3 and progress_T[-1] == 1.0 and progress_T[:-1].max() < 1.0
    assert (np.maximum.accumulate(progress_T) - progress_T).max() < SLACK
    assert len(np.unique(progress_T.round(2))) > 10


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


def test_progress_grows_with_an_experts_work_until_success(lift: Scene) -> None:
    for seed in range(3):
        require_growth(np.array(list(worked(lift, f"seed:{seed}"))))


def test_an_arm_that_stands_still_gets_nowhere(lift: Scene) -> None:
    lift.reset("seed:0")
    progress = TaskProgress(lift, recipe_for(lift.task))
    before = progress.now(success=False)
    for _ in range(20):
        lift.step(SETTLE_ACTION)
        assert progress.now(success=False) == pytest.approx(before, abs=0.01)


def test_an_object_that_is_let_go_of_is_to_be_fetched_again(lift: Scene) -> None:
    *_, held, _ = worked(lift, "seed:1")
    progress = TaskProgress(lift, recipe_for(lift.task))
    for _ in range(15):
        lift.step(SETTLE_ACTION)
    assert progress.now(success=False) < 0.3 < held


@pytest.mark.libero
@pytest.mark.parametrize("task_id", ["libero_object/1", "libero_goal/8", "libero_goal/7"])
def test_liberos_tasks_progress_stage_by_stage(task_id: str) -> None:
    scene = Scene(find_task(task_id))
    require_growth(np.array(list(worked(scene, "0"))))
