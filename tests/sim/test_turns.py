"""Taking turns: the learner drives its stretches, the expert labels every tick and leads its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from protos import episode_pb2
from protos.episode_file import read_episode
from robot_client.arm import Observation, Task
from robot_client.client import PolicyClient
from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.libero_arm import LiberoArm
from sim.recorder import Plan, Recorder
from sim.scene import Scene
from sim.suites import find_task
from sim.turns import Learner, ShakenExpert, take_turns
from tests.server.running import RunningServer

FIRST = Plan(task="robosuite/0", index=0, initial_state="seed:0")
LIFT = Task(name="robosuite/0", instruction="lift the red cube", initial_state="seed:0")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(find_task("robosuite/0"))


@pytest.fixture(scope="module")
def arm(scene: Scene) -> LiberoArm:
    return LiberoArm(scene=scene, image_sizes={"agentview": (32, 32)})


class Drifter:
    """A policy that does as the expert would, but for a constant push to the side; looks once a stretch."""

    source = episode_pb2.SOURCE_POLICY

    def __init__(self) -> None:
        self.wants_observation = False
        self.outcomes: list[bool] = []

    def start(self, task: Task, rng: np.random.Generator) -> None:
        self.task = task

    def take_over(self) -> None:
        self.wants_observation = True

    def look(self, observation: Observation) -> None:
        self.wants_observation = False

    def action(self, label_A: np.ndarray) -> np.ndarray:
        return label_A + 0.3 * np.eye(7)[1]

    def end(self, success: bool) -> None:
        self.outcomes.append(success)


def test_the_learners_ticks_carry_the_experts_labels_and_the_expert_leads_the_rest(
    scene: Scene, arm: LiberoArm, tmp_path: Path
) -> None:
    expert, learner = Expert(scene, recipe_for(scene.task)), Drifter()
    shaken = ShakenExpert(expert, stride=5, noise=0.0, noise_memory=0.0)
    assert Recorder(arm, expert, [learner, shaken], out=tmp_path, stretch_ticks=(6, 12)).record(FIRST).success
    ticks = read_episode(tmp_path / f"{FIRST.key}.episode").ticks
    runs = [(source, list(run)) for source, run in itertools.groupby(ticks, key=lambda tick: tick.source)]
    assert [source for source, _ in runs[:2]] == [episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_EXPERT]
    assert all(6 <= len(run) <= 12 for _, run in runs[:-1])
    for source, run in runs:
        meant, done = (np.array([list(getattr(tick, name)) for tick in run]) for name in ("expert_action", "action"))
        assert np.allclose(meant, done, atol=1e-6) == (source == episode_pb2.SOURCE_EXPERT)
        assert run[0].index == 0  # every stretch begins with an observation of its own
    assert learner.task == LIFT and learner.outcomes == [True]


def test_a_single_driver_keeps_the_wheel() -> None:
    drifter = Drifter()
    turns = take_turns([drifter], stretch_ticks=(1, 2), rng=np.random.default_rng(0))
    assert all(driver is drifter for driver in itertools.islice(turns, 50))


def test_a_learner_asks_its_server_once_a_chunk_and_executes_it_whole(
    arm: LiberoArm, live_server: RunningServer
) -> None:
    with PolicyClient(live_server.address) as client:
        learner = Learner(client, arm.spec)
        arm.reset(LIFT)
        learner.start(LIFT, np.random.default_rng(0))
        for _ in range(3):
            assert learner.wants_observation
            learner.look(arm.observe())
            for _ in range(client.spec().chunk_length):
                assert not learner.wants_observation
                assert learner.action(np.zeros(7)).shape == (7,)
        learner.end(False)
