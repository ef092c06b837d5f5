"""A person takes over, stops and says how it ended; the record says which ticks were whose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from protos import episode_pb2
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.pilot import Wish
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm

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
    assert [(tick.decision, tick.index) for tick in episode.ticks[2:5]] == [(0, 2), (0, 3), (0, 4)]
    assert (episode.ticks[5].decision, episode.ticks[5].index) == (1, 0)


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
