"""The robot's own file of an episode holds what the server's holds."""

from __future__ import annotations

import numpy as np
import pytest

from protos import episode_pb2
from protos.codec import decode_image, decode_tensor
from protos.episode_file import read_episode, read_records
from robot_client.arm import Observation, Outcome
from robot_client.client import PolicyClient
from robot_client.drivers import run, run_lockstep
from robot_client.episode import EpisodeConfig
from robot_client.recorder import Recorder
from robot_client.rollout import EpisodeResult
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import LoseReply
from tests.client.test_real_server import ScriptedModel
from tests.server.running import serving


@pytest.fixture
def stored(tmp_path):
    return tmp_path / "server"


@pytest.fixture
def local(tmp_path):
    return tmp_path / "robot"


@pytest.fixture
def keeping_server(stored):
    with serving(ScriptedModel(), episodes=stored) as server:
        yield server


def record(arms, client, folder, rollouts=None, **config):
    recorder = Recorder(folder, client.spec(), arms[0].spec, image_format=client.image_format)
    return list(
        run_lockstep(
            arms, rollouts or [rollout_of(seed=5)], client, EpisodeConfig(**config), observers=lambda _: [recorder]
        )
    )


def comparable(path) -> list[episode_pb2.EpisodeRecord]:
    """Its records, less the two clocks and the final observation."""
    records = list(read_records(path))
    records[0].start.ClearField("started_unix_ns")
    records[-1].end.ClearField("ended_unix_ns")
    records[-1].end.ClearField("final_observation")
    return records


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("config", [{}, {"replan_after": 2}], ids=["in order", "replanned"])
def test_the_local_file_holds_record_for_record_what_the_servers_file_holds(
    keeping_server, stored, local, image_format, config
):
    with PolicyClient(keeping_server.address, image_format=image_format) as client:
        record([FakeArm()], client, local, **config)
    (ours,), (theirs,) = local.glob("*.episode"), stored.glob("*.episode")
    assert comparable(ours) == comparable(theirs)
    assert ours.name == f"{read_episode(theirs).start.episode_id}.episode"


def test_asked_ahead_it_holds_every_decision_but_one_that_came_after_the_last_tick(keeping_server, stored, local):
    with PolicyClient(keeping_server.address) as client:
        record([FakeArm()], client, local, ahead_ticks=2, latency_ticks=3)
    ours, theirs = (read_episode(*folder.glob("*.episode")) for folder in (local, stored))
    assert ours.ticks == theirs.ticks and len(ours.ticks) == 12
    assert theirs.decisions[: len(ours.decisions)] == ours.decisions
    unseen = {decision.decision for decision in theirs.decisions[len(ours.decisions) :]}
    assert len(unseen) <= 1 and not unseen & {tick.decision for tick in theirs.ticks}


def test_an_error_is_recorded_with_what_was_executed_before_it(keeping_server, stored, local):
    with PolicyClient(keeping_server.address) as client:
        record([FakeArm(fail_at=6)], client, local)
    (ours,), (theirs,) = local.glob("*.error.episode"), stored.glob("*.error.episode")
    assert comparable(ours) == comparable(theirs)
    assert "motor stalled at tick 6" in read_episode(ours).end.message


def test_what_the_arm_saw_last_is_the_final_observation(server, local):
    with PolicyClient(server.address) as client:
        recorder = Recorder(local, client.spec(), spec_of())
    recorder.on_start(rollout_of(), "e-1")
    recorder.on_final_observation(seen(9))
    recorder.on_end(result_of("success", terminal=True))
    end = read_episode(local / "e-1.episode").end
    assert (end.outcome, end.terminal) == (episode_pb2.OUTCOME_SUCCESS, True)
    assert list(end.final_observation.images) == ["agentview"]  # what the policy reads, not all that was seen
    assert (decode_image(end.final_observation.images["agentview"]) == 9).all()
    assert decode_tensor(end.final_observation.state).tolist() == [0, 1, 2]


def test_the_observation_that_was_answered_is_recorded_when_a_lost_reply_made_it_ask_again(server, policy, local):
    policy.script[1] = [LoseReply(), LoseReply()]
    with PolicyClient(server.address, deadline_s=5) as client:
        record([FakeArm()], client, local)
    (path,) = local.iterdir()
    episode = read_episode(path)
    assert [decision.decision for decision in episode.decisions] == [0, 1, 2]
    echoed = [policy.only_episode.answers[d].capture_time_ns for d in range(3)]
    assert [decision.observation.capture_time_ns for decision in episode.decisions] == echoed
    assert list(episode.ticks) == policy.only_episode.ticks


def test_a_real_time_episode_is_recorded_with_its_holds(server, policy, local):
    policy.delay_s = 0.12  # two ticks late
    arm = FakeArm(spec_of(lockstep=False))
    with PolicyClient(server.address, stream=True) as client:
        recorder = Recorder(local, client.spec(), arm.spec)
        (result,) = run(arm, [rollout_of(max_ticks=15)], client, observers=lambda _: [recorder])
    (path,) = local.iterdir()
    ticks = read_episode(path).ticks
    assert sum(tick.source == episode_pb2.SOURCE_HOLD for tick in ticks) == result.holds > 0
    assert len(ticks) == 15


def test_one_recorder_records_one_episode_after_another(server, local):
    with PolicyClient(server.address) as client:
        results = record([FakeArm()], client, local, [rollout_of(seed=n, max_ticks=5) for n in range(3)])
    episodes = [read_episode(local / f"{result.episode_id}.episode") for result in results]
    assert [episode.start.seed for episode in episodes] == [0, 1, 2]
    assert all(len(episode.ticks) == 5 for episode in episodes)


def test_an_episode_that_the_server_never_opened_leaves_no_file(server, local):
    with PolicyClient(server.address) as client:
        record([FakeArm(fail_reset=True)], client, local)
    assert not local.exists()


def test_while_an_episode_is_open_there_is_no_file(server, local):
    names: list[str] = []

    class Looks(Recorder):
        def on_tick(self, state, tick):
            super().on_tick(state, tick)
            names.extend(path.name for path in local.iterdir())

    arm = FakeArm()
    with PolicyClient(server.address) as client:
        looks = Looks(local, client.spec(), arm.spec)
        list(run_lockstep([arm], [rollout_of()], client, observers=lambda _: [looks]))
    assert names == [] and len(list(local.iterdir())) == 1


def test_a_disk_that_takes_no_more_loses_the_recording_and_not_the_episode(server, local, caplog):
    local.write_text("a file, where a folder should be")
    arm = FakeArm()
    with PolicyClient(server.address) as client:
        (result,) = record([arm], client, local)
    assert (result.outcome, result.ticks) == ("failure", 12) and len(arm.applied) == 12
    assert "is not recorded" in caplog.text


def seen(value: int) -> Observation:
    return Observation(
        images={name: np.full((16, 16, 3), value, np.uint8) for name in ("agentview", "wrist")},
        state_S=np.arange(8, dtype=np.float32),
        instruction="pick up the bowl",
        capture_time_ns=value,
    )


def result_of(outcome: Outcome, *, terminal: bool) -> EpisodeResult:
    return EpisodeResult(
        rollout=rollout_of(),
        outcome=outcome,
        terminal=terminal,
        ticks=0,
        decisions=0,
        holds=0,
        clips=0,
        episode_id="e-1",
        version=1,
        seed=5,
        wall_s=0.0,
        answer_s=(),
        message="",
    )
