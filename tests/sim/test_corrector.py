"""A scripted person takes over from a policy that wanders, and the episode says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protos import episode_pb2
from protos.episode_file import read_episode
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.rollout import EpisodeResult, Rollout
from sim.corrector import Correction
from sim.libero_arm import LiberoArm, SimulatedTask
from sim.scene import Scene
from sim.suites import find_task
from tests.server.running import RunningServer, serving
from tests.sim.wandering_model import WanderingModel

HUMAN, POLICY = episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_POLICY


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(WanderingModel(), episodes=tmp_path) as server:
        yield server


def played(server: RunningServer, scene: Scene, correction: Correction, **rollout: Any) -> list[EpisodeResult]:
    """Two episodes that share the scene."""
    tasks = [
        SimulatedTask(name="robosuite/0", instruction="lift the cube", initial_state=f"seed:{seed}", max_ticks=150)
        for seed in range(2)
    ]
    rollouts = [Rollout(task=task, temperature=1.0, seed=0, **rollout) for task in tasks]
    with PolicyClient(server.address) as client:
        [image] = client.spec().message.images
        arms = [LiberoArm(scene=scene, image_sizes={image.name: (image.height, image.width)}) for _ in tasks]
        return list(run_lockstep(arms, rollouts, client, pilots=correction.pilot))


def test_each_arm_on_the_scene_is_driven_to_success(server, lift) -> None:
    """From the start: a hand that the policy has turned, this expert does not turn back."""
    results = played(server, lift, Correction(share=1.0, after_ticks=0), purpose="train")
    assert [(result.outcome, result.human) for result in results] == [("success", result.ticks) for result in results]


def test_takes_over_after_its_ticks_and_what_is_seen_meanwhile_is_asked_about(server, lift, tmp_path) -> None:
    played(server, lift, Correction(share=1.0, after_ticks=12), purpose="train")
    for path in tmp_path.glob("*.episode"):
        ticks = read_episode(path).ticks
        assert [tick.source for tick in ticks] == [POLICY] * 12 + [HUMAN] * (len(ticks) - 12)
        asked = {tick.decision for tick in ticks[12:]}
        assert len(asked) >= (len(ticks) - 12) // 8, "once a chunk"


@pytest.mark.parametrize(
    ("correction", "purpose"), [(Correction(), "train"), (Correction(share=1.0, after_ticks=0), "evaluate")]
)
def test_unasked_and_in_evaluations_nobody_takes_over(server, lift, correction, purpose) -> None:
    assert all(result.human == 0 for result in played(server, lift, correction, purpose=purpose))


def test_a_share_of_the_episodes_is_corrected(lift) -> None:
    arm = LiberoArm(scene=lift, image_sizes={})
    goal = SimulatedTask(name="robosuite/0", instruction="lift the cube", initial_state="seed:0", max_ticks=1)
    rollout = Rollout(task=goal, purpose="train")
    corrected = [Correction(share=0.2).pilot(arm, rollout) is not None for _ in range(1000)]
    assert 120 < sum(corrected) < 280, "six standard deviations"


def test_a_task_without_an_expert_is_corrected_by_nobody_which_is_said_once(lift, monkeypatch, caplog) -> None:
    def none(task):
        raise ValueError(f"no expert for {task.id}")

    monkeypatch.setattr("sim.corrector.recipe_for", none)
    arm = LiberoArm(scene=lift, image_sizes={})
    goal = SimulatedTask(name="robosuite/0", instruction="lift the cube", initial_state="seed:0", max_ticks=1)
    pilots = [Correction(share=1.0).pilot(arm, Rollout(task=goal, purpose="train")) for _ in range(3)]
    assert pilots == [None] * 3 and caplog.text.count("no expert for robosuite/0") == 1


@pytest.mark.parametrize("fields", [{"share": 1.1}, {"share": -0.1}, {"after_ticks": -1}])
def test_what_makes_no_sense_is_refused(fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Correction(**fields)
