"""Simulated arms: the policy's convention outside, many episodes on one scene inside."""

from __future__ import annotations

import numpy as np
import pytest

from robot_client.arm import Task
from robot_client.errors import ArmError
from sim.libero_arm import LiberoArm
from sim.scene import Scene
from sim.suites import find_task
from tests.client.test_arms import TASK, ArmLaws

SIZES = {"agentview": (48, 64)}
OPENING, CLOSING = np.array([0, 0, 0, 0, 0, 0, 1.0]), np.array([0, 0, 0, 0, 0, 0, 0.0])


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(find_task("robosuite/0"))


def lift_from(seed: int) -> Task:
    return Task(name="robosuite/0", instruction="lift the red cube", initial_state=f"seed:{seed}")


def new_arm(scene: Scene, seed: int = 0) -> LiberoArm:
    arm = LiberoArm(scene=scene, image_sizes=SIZES)
    arm.reset(lift_from(seed))
    return arm


class TestLiberoArm(ArmLaws):
    @pytest.fixture
    def arm(self, scene: Scene) -> LiberoArm:
        return LiberoArm(scene=scene, image_sizes=SIZES)

    def test_a_hold_does_not_move_and_says_what_it_amounts_to(self, arm: LiberoArm) -> None:
        """Gravity and the controller settle the arm by a little, as they do between any two ticks."""
        arm.reset(TASK)
        before = arm.state().state_S
        assert arm.hold().tolist() == OPENING.tolist()
        assert np.abs(arm.state().state_S - before).max() < 0.002


def test_interleaved_episodes_equal_separate_ones(scene: Scene) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 12, 7))

    def finish(interleaved: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        arms = [new_arm(scene, seed) for seed in range(3)]
        order = [(arm, tick) for tick in range(12) for arm in range(3)]
        for arm, tick in order if interleaved else sorted(order):
            if tick % 5 == 0:
                arms[arm].observe()
            arms[arm].apply(actions[arm, tick])
        return [(arm.state().state_S, arm.observe().images["agentview"]) for arm in arms]

    for (state, image), (alone_state, alone_image) in zip(finish(True), finish(False), strict=True):
        assert np.array_equal(state, alone_state)
        assert np.array_equal(image, alone_image)


def test_a_gripper_of_one_opens_and_of_zero_closes(scene: Scene) -> None:
    arm = new_arm(scene)
    width = []
    for action in (CLOSING, OPENING):
        for _ in range(10):
            arm.apply(action)
        left, right = arm.state().state_S[6:]
        width.append(left - right)
    assert width[0] < 0.02 < 0.06 < width[1]


def test_apply_returns_what_was_sent_in_the_policys_words(scene: Scene) -> None:
    arm = new_arm(scene)
    sent = arm.apply(np.array([2.0, -3.0, 0.5, 0, 0, 0, 0.9]))
    assert sent.tolist() == [1.0, -1.0, 0.5, 0, 0, 0, 1.0]
    assert sent.dtype == np.float32


def test_the_policy_sees_the_raw_image_turned_by_180_degrees(scene: Scene) -> None:
    image = new_arm(scene).observe().images["agentview"]
    upright = scene.render("agentview", *SIZES["agentview"])
    raw = upright[::-1]  # robosuite delivers its images upside down
    assert np.array_equal(image, raw[::-1, ::-1])
    assert not np.array_equal(image, upright)


def test_success_stays_once_it_has_held(scene: Scene) -> None:
    arm = new_arm(scene)
    cube = scene.model.joint("cube_joint0").qposadr[0]
    scene.data.qpos[cube + 2] += 0.2
    arm.apply(OPENING)
    assert arm.state().outcome == "success"
    for _ in range(10):
        arm.apply(OPENING)
    assert arm.state().outcome == "success"
    arm.reset(lift_from(0))
    assert arm.state().outcome is None


def test_a_hold_counts_no_tick_and_keeps_the_gripper(scene: Scene) -> None:
    arm = new_arm(scene)
    arm.apply(CLOSING)
    before = arm.state()
    assert arm.hold().tolist() == CLOSING.tolist()
    assert arm.state().tick == before.tick == 1
    assert np.abs(arm.state().state_S[:3] - before.state_S[:3]).max() < 0.002


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task(name="robosuite/1", instruction="", initial_state="seed:0"), "robosuite/0"),
        (Task(name="robosuite/0", instruction="", initial_state="17"), "seed:17"),
    ],
)
def test_a_task_that_it_cannot_do_is_an_arm_error(scene: Scene, task: Task, expected: str) -> None:
    with pytest.raises(ArmError, match=expected):
        LiberoArm(scene=scene, image_sizes=SIZES).reset(task)


def test_an_unknown_camera_is_an_arm_error(scene: Scene) -> None:
    with pytest.raises(ArmError, match="agentview"):
        LiberoArm(scene=scene, image_sizes={"wrist": (64, 64)})
