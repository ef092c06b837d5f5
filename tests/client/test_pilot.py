"""A person takes over, stops and says how it ended; the record says which ticks were whose."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from protos import episode_pb2
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.observer import Observer
from robot_client.pilot import Wish
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import Refuse

LEFT = np.array([0, 0.5, 0, 0, 0, 0, 1], np.float32)


class Script:
    """The wish of each tick, by its number."""

    def __init__(self, arm: FakeArm, wish_of: Callable[[int], Wish]):
        self._arm = arm
        self._wish_of = wish_of

    def wish(self) -> Wish:
        return self._wish_of(self._arm.state().tick)


def run_one(client, wish_of: Callable[[int], Wish], max_ticks: int = 12, **config):
    arm = FakeArm()
    options = EpisodeConfig(**config)
    [result] = run(arm, [rollout_of(max_ticks=max_ticks)], client, options, pilot=Script(arm, wish_of))
    return arm, result


def test_a_takeover_is_recorded_tick_by_tick_and_the_policy_is_asked_anew(client, policy):
    arm, result = run_one(client, lambda tick: Wish(action_A=LEFT if 2 <= tick < 5 else None))
    episode = policy.only_episode
    kinds = [tick.source for tick in episode.ticks]
    human, by_policy = episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_POLICY
    assert kinds == [by_policy] * 2 + [human] * 3 + [by_policy] * 7 and result.human == 3
    np.testing.assert_array_equal(np.array(arm.applied[2:5]), [LEFT] * 3)
    assert [(tick.decision, tick.index) for tick in episode.ticks[2:6]] == [(0, 2), (0, 3), (1, 0), (2, 0)]


def test_while_a_person_drives_what_is_seen_is_asked_about_once_a_chunk(client, policy):
    _, result = run_one(client, lambda tick: Wish(action_A=LEFT if tick < 10 else None))
    ticks = [(tick.decision, tick.index) for tick in policy.only_episode.ticks]
    assert ticks == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert (result.human, result.decisions, result.outcome) == (10, 4, "failure")


def test_a_request_that_fails_while_a_person_drives_costs_a_chunks_picture_and_no_more(client, policy):
    policy.script[1] = [Refuse(grpc.StatusCode.UNAVAILABLE)]
    arm = FakeArm(spec_of(lockstep=False))
    pilot = Script(arm, lambda tick: Wish(action_A=LEFT))
    [result] = run(arm, [rollout_of(max_ticks=24)], client, pilot=pilot)
    assert (result.human, result.decisions, result.outcome) == (24, 5, "failure")
    assert sorted(policy.only_episode.answers) == [0, 1, 2, 3, 4]


def test_while_a_person_drives_a_server_that_stays_away_ends_nothing(server, policy):
    policy.script[1] = [Refuse(grpc.StatusCode.UNAVAILABLE)] * 3
    arm = FakeArm(spec_of(lockstep=False))
    pilot = Script(arm, lambda tick: Wish(action_A=LEFT))
    with PolicyClient(server.address, give_up_after_s=0.01) as client:
        [result] = run(arm, [rollout_of(max_ticks=60)], client, pilot=pilot)
    assert (result.human, result.outcome) == (60, "failure") and result.decisions > 2


def test_a_person_is_clipped_like_a_policy(client, policy):
    _, result = run_one(client, lambda tick: Wish(action_A=3 * LEFT))
    assert result.clips == result.human == 12
    assert all(tick.action[1] == 1 and "y clipped from 1.5 to 1" in tick.reason for tick in policy.only_episode.ticks)


@pytest.mark.parametrize(("outcome", "terminal"), [("success", True), ("failure", True), ("error", False)])
def test_a_person_says_how_it_ended(client, policy, outcome, terminal):
    _, result = run_one(client, lambda tick: Wish(outcome=outcome if tick == 6 else None))
    assert (result.outcome, result.terminal, result.ticks) == (outcome, terminal, 6)
    assert policy.only_episode.end.outcome == episode_pb2.Outcome.Value(f"OUTCOME_{outcome.upper()}")


def test_stopped_nothing_moves_and_the_policy_is_not_asked(client, policy):
    arm, result = run_one(client, lambda tick: Wish(stopped="the dog is in" if tick >= 2 else ""))
    assert len(arm.applied) == 2 and result.holds == 10 and len(policy.only_episode.requests) == 1
    assert {tick.reason for tick in policy.only_episode.ticks[2:]} == {"stopped: the dog is in"}


def test_let_go_the_policy_goes_on_with_a_new_observation(client, policy):
    arm, result = run_one(client, lambda tick: Wish(stopped="wait" if 2 <= tick < 5 else ""))
    assert len(arm.applied) == 9 and result.holds == 3 and result.decisions == 3


def test_an_answer_from_before_a_takeover_is_never_followed(client, policy):
    """Asked at tick 4 and answered at tick 6; at tick 5 the person drives."""
    wish_of = {5: Wish(action_A=LEFT)}
    _, result = run_one(client, lambda tick: wish_of.get(tick, Wish()), ahead_ticks=2, latency_ticks=2)
    ticks = policy.only_episode.ticks
    hold, human, by_policy = episode_pb2.SOURCE_HOLD, episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_POLICY
    assert [tick.source for tick in ticks] == [hold] * 2 + [by_policy] * 3 + [human] + [hold] * 2 + [by_policy] * 4
    assert {tick.decision for tick in ticks if tick.source == by_policy} == {0, 2}
    assert sorted(policy.only_episode.answers) == list(range(result.decisions))


def test_the_arms_own_trouble_is_answered_by_a_hold_before_a_person_drives_on(client, policy):
    arm = FakeArm()

    class Hinders(Observer):
        def on_tick(self, state, tick):
            arm.trouble = "held up by something" if state.tick == 4 else ""

    pilot = Script(arm, lambda tick: Wish(action_A=LEFT))
    [result] = run(arm, [rollout_of(max_ticks=8)], client, pilot=pilot, observers=lambda _: [Hinders()])
    ticks = policy.only_episode.ticks
    hold, human = episode_pb2.SOURCE_HOLD, episode_pb2.SOURCE_HUMAN
    assert [tick.source for tick in ticks] == [human] * 5 + [hold] + [human] * 2
    assert ticks[5].reason == "held up by something" and (result.holds, result.human) == (1, 7)


def test_blind_the_policy_is_not_followed_but_a_person_may_drive(client, policy):
    arm = FakeArm()
    arm.blind = "camera front: no frame for 0.4 s"
    pilot = Script(arm, lambda tick: Wish(action_A=LEFT if tick >= 3 else None))
    [result] = run(arm, [rollout_of(max_ticks=8)], client, pilot=pilot)
    ticks = policy.only_episode.ticks
    assert [tick.reason for tick in ticks] == [arm.blind] * 3 + [""] * 5
    assert (result.holds, result.human, result.outcome) == (3, 5, "failure") and not policy.only_episode.requests


def test_time_that_runs_out_while_a_person_has_stopped_the_arm_is_nobodys_failure(client, policy):
    _, result = run_one(client, lambda tick: Wish(stopped="the dog is in" if tick >= 10 else ""))
    assert (result.outcome, result.ticks) == ("error", 12)
    assert result.message == "time ran out while the arm was held: stopped: the dog is in"


def test_a_stop_that_was_let_go_in_time_leaves_a_failure_a_failure(client, policy):
    _, result = run_one(client, lambda tick: Wish(stopped="the dog is in" if 2 <= tick < 10 else ""))
    assert (result.outcome, result.ticks) == ("failure", 12)


def test_while_nothing_is_asked_no_clock_runs(server, policy):
    """Stopped, after a first failure, for longer than a lost server is put up with."""
    policy.script[1] = [Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")] * 2
    arm, stopped_s, give_up_after_s = FakeArm(spec_of(lockstep=False)), [], 0.5

    def wish_of(tick: int) -> Wish:
        if not stopped_s and any(request.decision == 1 for request in policy.only_episode.requests):
            stopped_s.append(time.monotonic())
        is_stopped = bool(stopped_s) and time.monotonic() < stopped_s[0] + 1.5 * give_up_after_s
        return Wish(stopped="wait" if is_stopped else "")

    with PolicyClient(server.address, deadline_s=5, give_up_after_s=give_up_after_s) as client:
        [result] = run(arm, [rollout_of(max_ticks=40)], client, pilot=Script(arm, wish_of))
    assert result.outcome == "failure" and result.decisions > 1
    assert [request.decision for request in policy.only_episode.requests].count(1) == 3
    assert result.answer_s[1] < give_up_after_s
