"""Robot client and policy server keep the same contract: both are real, only the model is scripted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from policy_server.batcher import DecodeAnswer, DecodeRequest
from protos import episode_pb2
from protos.codec import decode_image, decode_tensor
from protos.episode_file import read_episode
from robot_client.arms.replay import ReplayArm
from robot_client.client import PolicyClient
from robot_client.drivers import run, run_lockstep
from robot_client.episode import EpisodeConfig
from robot_client.errors import BadRequest, Superseded
from robot_client.observer import Observer
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import action_of_tokens, small_move, tokens_of
from tests.client.scripted_policy import spec_of as policy_spec
from tests.client.test_client import LOOK
from tests.server.running import serving


class ScriptedModel:
    """Decision d moves by small_move(d)."""

    spec = policy_spec()
    first, lanes = None, 1

    def __init__(self):
        self.arrived = threading.Event()

    def prepare(self, observed):
        self.arrived.set()

    def watch(self, gone) -> None:
        pass

    def warm_up(self):
        pass

    def decode(self, requests: list[DecodeRequest], weights: list[None], lane: int) -> list[DecodeAnswer]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: DecodeRequest) -> DecodeAnswer:
        ids_A, K = tokens_of(small_move(request.decision)), self.spec.chunk_length
        return DecodeAnswer(
            actions_KA=np.tile(action_of_tokens(ids_A), (K, 1)).astype(np.float32),
            token_ids_N=np.tile(ids_A, K).astype(np.int32),
            token_logprobs_N=np.full(K * len(ids_A), -0.5, np.float32),
            vision_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )


@pytest.fixture
def episodes(tmp_path):
    return tmp_path


@pytest.fixture
def model():
    return ScriptedModel()


@pytest.fixture
def server(episodes, model):
    with serving(model, episodes=episodes) as server:
        yield server


class Ticks(Observer):
    def __init__(self):
        self.ticks: list[episode_pb2.Tick] = []

    def on_tick(self, state, tick):
        self.ticks.append(tick)


@pytest.mark.parametrize(
    "config",
    [EpisodeConfig(), EpisodeConfig(replan_after=2), EpisodeConfig(ahead_ticks=2, latency_ticks=3)],
    ids=["in order", "replanned", "asked ahead, late"],
)
def test_the_episode_file_holds_every_tick_as_it_was_executed(client, episodes, config):
    watch = Ticks()
    arms = [FakeArm(spec_of(lockstep=True))]
    (result,) = run_lockstep(arms, [rollout_of(seed=5)], client, config, observers=lambda _: [watch])
    (path,) = episodes.glob("*.episode")
    episode = read_episode(path)
    assert list(episode.ticks) == watch.ticks and len(watch.ticks) == result.ticks == 12
    assert [decision.decision for decision in episode.decisions] == list(range(result.decisions))
    assert (episode.start.episode_id, episode.start.seed) == (result.episode_id, 5)
    assert episode.end.outcome == episode_pb2.OUTCOME_FAILURE and not episode.end.terminal


def test_a_real_time_episode_is_stored_with_its_holds(server, episodes):
    watch = Ticks()
    arm = FakeArm(spec_of(lockstep=False))
    with PolicyClient(server.address, stream=True) as client:
        (result,) = run(arm, [rollout_of(max_ticks=15)], client, observers=lambda _: [watch])
    (path,) = episodes.glob("*.episode")
    episode = read_episode(path)
    assert list(episode.ticks) == watch.ticks and len(watch.ticks) == 15
    assert result.holds == sum(tick.source == episode_pb2.SOURCE_HOLD for tick in episode.ticks) > 0


def test_many_arms_over_one_client_are_batched_and_stored_apart(server, client, episodes):
    rollouts = [rollout_of(seed=n) for n in range(8)]
    results = list(run_lockstep([FakeArm() for _ in range(4)], rollouts, client))
    assert {result.outcome for result in results} == {"failure"}
    stored = [read_episode(path) for path in sorted(episodes.glob("*.episode"))]
    assert sorted(episode.start.seed for episode in stored) == list(range(8))
    assert all(len(episode.ticks) == 12 and len(episode.decisions) == 3 for episode in stored)


def test_the_observation_is_stored_as_the_arm_saw_it(client, episodes):
    list(run_lockstep([FakeArm()], [rollout_of(max_ticks=1)], client))
    (path,) = episodes.glob("*.episode")
    observation = read_episode(path).decisions[0].observation
    assert observation.instruction == "pick up the bowl"
    assert (decode_image(observation.images["agentview"]) == 7).all()
    assert decode_tensor(observation.state).tolist() == [0, 0, 0]


def test_a_repeated_decision_gets_the_stored_answer(client):
    opened = client.start_episode(rollout_of(), spec_of()).episode_id
    first, again = client.act(opened, 0, LOOK), client.act(opened, 0, LOOK)
    np.testing.assert_array_equal(first.token_ids_N, again.token_ids_N)


def test_refusals_of_the_server_are_typed_and_name_the_field(client):
    with pytest.raises(BadRequest, match=r"episode_id: .*nowhere"):
        client.act("nowhere", 0, LOOK)
    opened = client.start_episode(rollout_of(), spec_of()).episode_id
    with pytest.raises(BadRequest, match="decision: "):
        client.act(opened, 7, LOOK)


def test_a_newer_observation_supersedes_an_older_one_or_comes_too_late_to(client, model):
    opened = client.start_episode(rollout_of(), spec_of()).episode_id
    older = client.ask(opened, 0, LOOK)
    assert model.arrived.wait(5)  # two unary calls may overtake each other
    newer = client.ask(opened, 1, LOOK)
    assert newer.result(5).decision == 1
    error = older.exception(5)
    assert error is None or isinstance(error, Superseded | BadRequest)


def test_a_stored_episode_replays_to_the_same_actions(client, episodes):
    list(run_lockstep([FakeArm()], [rollout_of()], client))
    (path,) = episodes.glob("*.episode")
    replay = ReplayArm(path=path)
    (result,) = run(replay, [rollout_of(max_ticks=0)], client)
    assert (result.outcome, result.ticks) == ("success", 12)
    deviation = replay.deviation()
    assert deviation.ticks == 12 and deviation.max_A.max() == 0
