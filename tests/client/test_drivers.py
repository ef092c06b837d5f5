"""Lockstep: many arms in one thread, their calls in flight together."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from protos import episode_pb2
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.episode import EpisodeConfig
from robot_client.errors import SpecMismatch
from robot_client.observer import Observer
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, boxed, spec_of
from tests.client.scripted_policy import LoseReply, Refuse, ScriptedPolicy, Tamper, actions_of


def run_one(arm: FakeArm, client: PolicyClient, rollout=None, **config):
    (result,) = run_lockstep([arm], [rollout or rollout_of()], client, EpisodeConfig(**config))
    return result


def indices(ticks):
    return [(tick.decision, tick.index) for tick in ticks]


def test_in_order_every_chunk_is_executed_whole_before_the_next_is_asked_for(client, policy):
    arm = FakeArm()
    result = run_one(arm, client)
    assert (result.ticks, result.decisions, result.holds, result.clips) == (12, 3, 0, 0)
    assert indices(policy.only_episode.ticks) == [(d, k) for d in range(3) for k in range(4)]
    assert arm.log == ["reset"] + ["apply"] * 12


def test_time_running_out_is_a_failure_that_is_not_terminal(client, policy):
    result = run_one(FakeArm(), client)
    assert (result.outcome, result.terminal) == ("failure", False)
    end = policy.only_episode.end
    assert (end.outcome, end.terminal) == (episode_pb2.OUTCOME_FAILURE, False)
    assert list(end.final_observation.images) == ["agentview"]


def test_success_reported_by_the_arm_is_terminal_and_stops_mid_chunk(client, policy):
    result = run_one(FakeArm(succeed_at=6), client)
    assert (result.outcome, result.terminal, result.ticks, result.decisions) == ("success", True, 6, 2)
    assert indices(policy.only_episode.ticks) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_replan_after_executes_only_the_first_actions_of_each_chunk(client, policy):
    result = run_one(FakeArm(), client, rollout_of(max_ticks=6), replan_after=2)
    assert result.decisions == 3
    assert indices(policy.only_episode.ticks) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_asked_ahead_with_latency_enters_the_new_chunk_where_the_arm_has_got_to(client, policy):
    result = run_one(FakeArm(), client, rollout_of(max_ticks=10), ahead_ticks=2, latency_ticks=1)
    assert result.holds == 1  # there is nothing to execute during the first latency
    assert indices(policy.only_episode.ticks)[1:] == [
        *[(0, 0), (0, 1), (0, 2)],  # asked when two remain, which is before index 2; followed one tick later
        *[(1, 1), (1, 2)],
        *[(2, 1), (2, 2)],
        *[(3, 1), (3, 2)],
    ]


def test_latency_longer_than_what_was_asked_ahead_holds_for_the_difference(client, policy):
    result = run_one(FakeArm(), client, rollout_of(max_ticks=12), ahead_ticks=1, latency_ticks=3)
    sources = [tick.source for tick in policy.only_episode.ticks]
    hold, move = episode_pb2.SOURCE_HOLD, episode_pb2.SOURCE_POLICY
    # Three of latency before the first answer; then, of each three, one action is left to execute.
    assert sources == [hold] * 3 + [move] * 4 + [hold] * 2 + [move] * 3
    assert result.holds == 5
    assert all(tick.reason for tick in policy.only_episode.ticks if tick.source == hold)


def test_decisions_never_go_back_and_no_action_is_executed_twice(client, policy):
    run_one(FakeArm(), client, rollout_of(max_ticks=30), ahead_ticks=1, latency_ticks=3)
    ticks = policy.only_episode.ticks
    assert len(ticks) == 30
    assert [tick.decision for tick in ticks] == sorted(tick.decision for tick in ticks)
    executed = indices(tick for tick in ticks if tick.source == episode_pb2.SOURCE_POLICY)
    assert executed == sorted(set(executed))


def test_every_executed_tick_is_reported_once_and_as_it_was_sent(client, policy):
    arm = FakeArm()
    run_one(arm, client, rollout_of(max_ticks=11))
    np.testing.assert_array_equal(actions_of(policy.only_episode.ticks), np.array(arm.applied))


def test_only_what_the_policy_reads_is_sent(client, policy):
    run_one(FakeArm(), client, rollout_of(max_ticks=1))
    observation = policy.only_episode.requests[0].observation
    assert list(observation.images) == ["agentview"]
    assert list(observation.state.shape) == [3]


@pytest.mark.parametrize(
    "trouble",
    [
        [LoseReply()],
        [Refuse(grpc.StatusCode.ABORTED, "superseded")],
        [Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after_ms=50)],
        [Refuse(grpc.StatusCode.INTERNAL), LoseReply(), Refuse(grpc.StatusCode.DEADLINE_EXCEEDED)],
    ],
    ids=["lost reply", "superseded", "queue full", "three in a row"],
)
def test_trouble_that_passes_changes_nothing_in_what_is_executed(client, policy, trouble):
    policy.script[1] = list(trouble)
    arm = FakeArm()
    result = run_one(arm, client)
    assert (result.outcome, result.ticks, result.decisions, result.holds) == ("failure", 12, 3, 0)
    assert indices(policy.only_episode.ticks) == [(d, k) for d in range(3) for k in range(4)]
    assert sorted(policy.only_episode.answers) == [0, 1, 2]


def test_a_full_queue_is_asked_again_only_after_its_hint(client, policy):
    policy.script[0] = [Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after_ms=400)]
    result = run_one(FakeArm(), client, rollout_of(max_ticks=1))
    assert result.answer_s[0] > 0.4


def test_a_request_at_fault_ends_the_episode_as_an_error_and_is_not_repeated(client, policy):
    policy.script[1] = [Refuse(grpc.StatusCode.INVALID_ARGUMENT, "got 3 channels, expected 4", "observation.images")]
    result = run_one(FakeArm(), client)
    assert (result.outcome, result.ticks) == ("error", 4)
    assert "observation.images: got 3 channels, expected 4" in result.message
    assert [request.decision for request in policy.only_episode.requests] == [0, 1]
    assert policy.only_episode.end.outcome == episode_pb2.OUTCOME_ERROR
    assert len(policy.only_episode.ticks) == 4


def test_an_answer_whose_tokens_say_something_else_is_never_executed(client, policy):
    def doubled(reply):
        reply.chunk.actions.data = (2 * np.frombuffer(reply.chunk.actions.data, "<f4")).tobytes()

    policy.script[1] = [Tamper(doubled)]
    arm = FakeArm()
    result = run_one(arm, client)
    assert (result.outcome, result.ticks) == ("error", 4)
    assert "not what their tokens stand for" in result.message
    assert arm.log == ["reset"] + ["apply"] * 4


def test_an_arm_error_ends_its_episode_and_the_others_go_on(client, policy):
    arms = [FakeArm(fail_at=2), FakeArm(), FakeArm()]
    results = list(run_lockstep(arms, [rollout_of() for _ in range(6)], client))
    assert len(results) == 6
    errors = [result for result in results if result.outcome == "error"]
    assert errors and all("motor stalled at tick 2" in result.message for result in errors)
    assert all(result.ticks == 12 for result in results if result.outcome == "failure")
    assert len(policy.episodes) == 6
    assert all(episode.end is not None for episode in policy.episodes.values())


def test_an_arm_that_cannot_be_reset_opens_no_episode(client, policy):
    result = run_one(FakeArm(fail_reset=True), client)
    assert (result.outcome, result.episode_id, result.message) == ("error", "", "ArmError: the brakes are on")
    assert not policy.episodes


def test_slots_are_refilled_and_every_rollout_ends_once(client):
    rollouts = [rollout_of(name=f"task/{n}", max_ticks=3 + n % 5, seed=n) for n in range(13)]
    results = list(run_lockstep([FakeArm() for _ in range(4)], iter(rollouts), client))
    assert sorted(result.seed for result in results) == list(range(13))
    assert all(result.ticks == result.rollout.task.max_ticks for result in results)


def test_calls_of_several_arms_are_in_flight_together(client, policy):
    policy.delay_s = 0.05
    list(run_lockstep([FakeArm() for _ in range(4)], [rollout_of() for _ in range(4)], client))
    assert policy.most_in_flight == 4


def test_arms_step_while_others_wait_for_the_network(client, policy):
    policy.delay_s = 0.1
    others_in_flight: list[bool] = []

    class Watcher(Observer):
        def on_tick(self, state, tick):  # an arm that moves has no request of its own under way
            others_in_flight.append(policy.in_flight > 0)

    arms = [FakeArm(tick_s=0.025) for _ in range(2)]  # a chunk of four takes as long as an answer
    list(run_lockstep(arms, [rollout_of(max_ticks=16)] * 2, client, observers=lambda rollout: [Watcher()]))
    assert len(others_in_flight) == 32 and sum(others_in_flight) >= 8  # one at a time it would be none


def test_a_policy_that_does_not_fit_is_refused_before_anything_moves(client, policy):
    arm = FakeArm(spec_of(tick_rate_hz=10.0))
    with pytest.raises(SpecMismatch, match="trained at 20 Hz, fake ticks at 10 Hz"):
        run_one(arm, client)
    assert arm.log == [] and not policy.episodes


@pytest.mark.parametrize("config", [{"replan_after": 5}, {"ahead_ticks": 4}, {"replan_after": 2, "ahead_ticks": 2}])
def test_a_way_to_follow_that_the_chunk_length_does_not_allow_is_refused_before_anything_moves(client, config):
    arm = FakeArm()
    with pytest.raises(SpecMismatch, match="must be in"):
        run_one(arm, client, **config)
    assert arm.log == []


def test_a_clip_is_recorded_with_its_reason_and_what_was_really_sent(client, policy):
    policy.action_of = lambda decision: np.array([0.9, 0, 0, 0, 0, 0, 1.0])
    arm = FakeArm(spec_of(limits=boxed(-0.1, 0.01, metres_per_unit=0.05)))
    result = run_one(arm, client, rollout_of(max_ticks=4))
    ticks = policy.only_episode.ticks
    assert result.clips == 4
    assert all(tick.source == episode_pb2.SOURCE_POLICY for tick in ticks)
    assert all(tick.reason.startswith("workspace: x clipped from 0.9") for tick in ticks)
    np.testing.assert_allclose([tick.action[0] for tick in ticks], 0.2, atol=1e-6)


def test_an_unknown_episode_after_a_restart_ends_as_an_error(client, policy, server):
    class Restarts(Observer):
        def on_tick(self, state, tick):
            if state.tick == 3:
                server.stop()
                policy.episodes.clear()
                server.start()

    (result,) = run_lockstep([FakeArm()], [rollout_of()], client, observers=lambda rollout: [Restarts()])
    assert result.outcome == "error" and "unknown episode" in result.message


def test_a_server_back_in_time_goes_on_with_the_same_episode(client, policy, server):
    class Restarts(Observer):
        def on_tick(self, state, tick):
            if state.tick == 3:
                server.stop()
                server.start()

    (result,) = run_lockstep([FakeArm()], [rollout_of()], client, observers=lambda rollout: [Restarts()])
    assert (result.outcome, result.ticks, result.decisions) == ("failure", 12, 3)
    assert len(policy.episodes) == 1


def test_no_answer_within_the_limit_is_an_error_that_says_so(server, policy):
    policy.script[1] = [Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")] * 100
    with PolicyClient(server.address, deadline_s=1, give_up_after_s=0.3) as client:
        result = run_one(FakeArm(), client)
    assert result.outcome == "error" and "gave up after 0.3 s: queue full" in result.message


def test_an_unacknowledged_end_counts_as_an_error(server, policy):
    policy.end_script = [Refuse(grpc.StatusCode.UNAVAILABLE, "disk full")] * 100
    with PolicyClient(server.address, deadline_s=1, give_up_after_s=0.3) as client:
        result = run_one(FakeArm(), client)
    assert result.outcome == "error" and "disk full" in result.message


def test_stopping_early_ends_what_is_under_way_as_an_error(client, policy: ScriptedPolicy):
    results = run_lockstep([FakeArm(), FakeArm()], [rollout_of(max_ticks=1), rollout_of(max_ticks=400)], client)
    assert next(results).outcome == "failure"
    results.close()
    outcomes = sorted(episode.end.outcome for episode in policy.episodes.values())
    assert outcomes == [episode_pb2.OUTCOME_FAILURE, episode_pb2.OUTCOME_ERROR]


def test_observers_see_start_observations_answers_ticks_and_end(client):
    seen: list[str] = []

    class Watcher(Observer):
        def on_start(self, rollout, episode_id):
            seen.append("start")

        def on_observation(self, observation):
            assert set(observation.images) == {"agentview", "wrist"}
            seen.append("observation")

        def on_answer(self, answer):
            seen.append("answer")

        def on_tick(self, state, tick):
            seen.append("tick")

        def on_end(self, result):
            seen.append(result.outcome)

    list(run_lockstep([FakeArm()], [rollout_of(max_ticks=5)], client, observers=lambda rollout: [Watcher()]))
    assert seen == ["start", "observation", "answer", *["tick"] * 4, "observation", "answer", "tick", "failure"]
