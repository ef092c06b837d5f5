"""Real time: the loop keeps its rate whatever the network does, and holds on data it cannot vouch for.

Detection limits are stated in each test; a hold must come within two ticks after its limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from protos import episode_pb2
from robot_client.client import PolicyClient
from robot_client.drivers import run_real_time
from robot_client.episode import Episode, EpisodeConfig
from robot_client.observer import Observer
from tests.client.black_hole import BlackHole
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import Delay, LoseReply, Refuse, Running, ScriptedPolicy
from tests.client.scripted_policy import spec_of as policy_spec

RATE_HZ = 50.0
TICK_S = 1 / RATE_HZ
HOLD = episode_pb2.SOURCE_HOLD
POLICY = episode_pb2.SOURCE_POLICY


@pytest.fixture
def server():
    running = Running(ScriptedPolicy(policy_spec(tick_rate_hz=RATE_HZ)))
    yield running
    running.stop()


@pytest.fixture
def client(server):
    """As a robot is deployed: over a stream."""
    with PolicyClient(server.address, stream=True, deadline_s=5, give_up_after_s=5) as client:
        yield client


def real_arm(*, tick_rate_hz: float = RATE_HZ, **options) -> FakeArm:
    return FakeArm(spec_of(lockstep=False, tick_rate_hz=tick_rate_hz), **options)


class Ticks(Observer):
    """Every tick with the time at which it was done; calls something at some of them."""

    def __init__(self, calls: dict[int, Callable[[], object]] | None = None):
        self.ticks: list[episode_pb2.Tick] = []
        self.times_s: list[float] = []
        self.answered_s: list[float] = []
        self._calls = calls or {}

    def on_answer(self, answer):
        self.answered_s.append(time.monotonic())

    def on_tick(self, state, tick):
        self._calls.get(len(self.ticks), lambda: None)()
        self.ticks.append(tick)
        self.times_s.append(time.monotonic())

    def first(self, source: int, after: int = 0) -> int:
        return next(n for n in range(after, len(self.ticks)) if self.ticks[n].source == source)


def run_one(arm, client, watch=None, max_ticks=60, **config):
    (result,) = run_real_time(
        arm,
        [rollout_of(max_ticks=max_ticks)],
        client,
        EpisodeConfig(**config),
        observers=lambda rollout: [watch] if watch else [],
    )
    return result


def test_the_arm_holds_until_the_first_answer_and_then_follows_it(client, policy):
    policy.script[0] = [Delay(0.1)]
    watch = Ticks()
    run_one(real_arm(), client, watch, max_ticks=20)
    first_move = watch.first(POLICY)
    assert watch.times_s[first_move] - watch.times_s[0] > 0.1 - TICK_S
    assert all(tick.reason == "no action at hand" for tick in watch.ticks[:first_move])
    assert (watch.ticks[first_move].decision, watch.ticks[first_move].index) == (0, 0)


def test_asked_ahead_the_arm_does_not_stop_between_chunks(client, policy):
    policy.spec.tick_rate_hz = 20
    policy.delay_s = 0.02
    watch = Ticks()
    run_one(real_arm(tick_rate_hz=20), client, watch, max_ticks=30, ahead_ticks=3)
    moving = watch.ticks[watch.first(POLICY) :]
    held = sum(tick.source == HOLD for tick in moving)
    assert len(moving) > 25 and held <= 3  # in order it would be one or more for each of six decisions


def test_the_rate_is_kept_while_every_answer_is_slow(client, policy):
    policy.delay_s = 0.2
    watch = Ticks()
    result = run_one(real_arm(), client, watch, max_ticks=60)
    waiting_s = result.decisions * policy.delay_s
    ticking_s = watch.times_s[-1] - watch.times_s[0]
    assert waiting_s > 0.5 and ticking_s < 59 * TICK_S + 0.5 * waiting_s
    assert result.cadence is not None and result.cadence.ticks == 61  # the last one only looks


def test_an_exhausted_chunk_is_held_from_the_next_tick_on(client, policy):
    policy.script[1] = [Delay(0.3)]
    watch = Ticks()
    run_one(real_arm(), client, watch, max_ticks=25)
    start = watch.first(POLICY)
    assert [tick.source for tick in watch.ticks[start : start + 6]] == [POLICY] * 4 + [HOLD] * 2


def test_a_stale_observation_is_held_within_two_ticks_of_its_limit(server):
    """Limit: 0.15 s.  The chunk would last for 0.8 s."""
    server.policy.spec.chunk_length = 40
    limit_s = 0.15
    server.policy.script[1] = [Delay(0.5)] * 8
    with PolicyClient(server.address, stream=True) as client:
        watch = Ticks()
        run_one(real_arm(), client, watch, max_ticks=30, max_age_s=limit_s)
    start = watch.first(POLICY)
    held = watch.first(HOLD, after=start)
    assert "observation too old" in watch.ticks[held].reason
    assert all(tick.source == HOLD for tick in watch.ticks[held:])
    late = [at_s for at_s in watch.times_s[start:held] if at_s > watch.times_s[start] + limit_s]
    assert held - start >= 3 and len(late) <= 2


def test_an_answer_too_late_to_be_vouched_for_is_never_followed(client, policy):
    policy.script[0] = [Delay(0.3)]
    watch = Ticks()
    run_one(real_arm(), client, watch, max_ticks=40, max_age_s=0.2)
    assert watch.ticks[0].source == HOLD
    start = watch.first(POLICY)
    ages_s = watch.times_s[start] - watch.times_s[0]
    assert ages_s > 0.2  # not the first try's observation, which was 0.3 s old when its answer came


def test_a_frozen_camera_is_held_within_two_ticks_of_its_limit_and_followed_again_when_it_recovers(client, policy):
    """Limit: three observations with one capture time."""
    arm = real_arm()
    watch = Ticks({10: lambda: setattr(arm, "camera_works", False), 35: lambda: setattr(arm, "camera_works", True)})
    looks_at: list[int] = []
    real_observe = arm.observe
    arm.observe = lambda: (looks_at.append(len(watch.ticks)), real_observe())[1]
    run_one(arm, client, watch, max_ticks=80, replan_after=1, max_age_s=10)
    frozen = next(n for n, tick in enumerate(watch.ticks) if "camera frozen" in tick.reason)
    third_identical = [tick for tick in looks_at if tick >= 10][2]
    assert watch.ticks[frozen].source == HOLD and frozen - third_identical <= 2
    assert all("camera frozen" in tick.reason for tick in watch.ticks[frozen:35])
    assert watch.first(POLICY, after=frozen) > 35


def test_a_policy_outside_its_own_range_is_held_and_not_clipped(client, policy):
    for dimension in policy.spec.action:
        dimension.low, dimension.high = 0.5, 0.6
    arm = real_arm()
    watch = Ticks()
    run_one(arm, client, watch, max_ticks=20)
    assert set(arm.log) == {"reset", "hold"}
    assert any("outside the policy's own range: x is" in tick.reason for tick in watch.ticks)


def test_losing_the_server_holds_with_the_reason_and_the_same_episode_is_resumed(client, policy, server):
    watch = Ticks({10: server.stop})
    comeback = threading.Timer(0.5, server.start)
    comeback.start()
    result = run_one(real_arm(), client, watch, max_ticks=150)
    comeback.join()
    assert result.outcome == "failure" and len(policy.episodes) == 1
    gone = watch.first(HOLD, after=11)
    assert gone <= 10 + 4 + 2  # the chunk of four runs out, then it holds
    assert any(server.address in tick.reason for tick in watch.ticks[gone : gone + 10])
    back = watch.first(POLICY, after=gone + 10)
    assert watch.times_s[back] - watch.times_s[gone] < 0.5 + 2.5  # so far the back-off is below a second
    episode = policy.only_episode
    assert [tick.source for tick in episode.ticks] == [tick.source for tick in watch.ticks]
    assert sorted(episode.answers) == list(range(result.decisions))


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_a_black_hole_holds_the_arm_and_behind_it_the_same_episode_goes_on(server, policy, stream):
    """Limit: 0.2 s of age; the chunk of four lasts for 0.08 s."""
    hole = BlackHole(server.address)
    limit_s = 0.2
    with PolicyClient(hole.address, stream=stream, deadline_s=5, give_up_after_s=5) as client:
        watch = Ticks({10: hole.swallow})
        reopening = threading.Timer(1.0, hole.let_through)
        reopening.start()
        result = run_one(real_arm(), client, watch, max_ticks=120, max_age_s=limit_s)
        reopening.join()
    hole.close()
    gone = watch.first(HOLD, after=10 + 4 + 1)
    late = [at_s for at_s in watch.times_s[10:gone] if at_s > watch.times_s[10] + limit_s]
    assert len(late) <= 2
    held = [tick.source == HOLD for tick, at_s in zip(watch.ticks, watch.times_s, strict=True) if during(watch, at_s)]
    assert held and all(held)
    assert any("no answer in 0.2 s" in tick.reason or "DEADLINE_EXCEEDED" in tick.reason for tick in watch.ticks)
    assert result.outcome == "failure" and watch.first(POLICY, after=gone + 30)
    assert list(policy.only_episode.ticks) == watch.ticks


def during(watch: Ticks, at_s: float) -> bool:
    """Between detection and the reopening of the black hole."""
    return watch.times_s[10] + 0.3 < at_s < watch.times_s[10] + 0.7


def test_a_server_that_stays_away_ends_the_episode_as_an_error_with_the_arm_held(server, policy):
    with PolicyClient(server.address, stream=True, deadline_s=1, give_up_after_s=0.5) as client:
        arm = real_arm()
        watch = Ticks({10: server.stop})
        result = run_one(arm, client, watch, max_ticks=0)
    assert result.outcome == "error" and "gave up after 0.5 s" in result.message
    assert arm.log[-1] == "hold" and watch.ticks[-1].source == HOLD
    assert watch.times_s[-1] - watch.times_s[10] < 0.5 + 4 * TICK_S + 2.5


@pytest.mark.parametrize(
    ("befalls", "reason"),
    [
        (lambda arm, server: server.stop(), "UNAVAILABLE"),
        (lambda arm, server: setattr(arm, "blind", "camera front: lost"), "camera front: lost"),
        (lambda arm, server: setattr(arm, "camera_works", False), "camera frozen"),
    ],
    ids=["server lost", "camera lost", "camera frozen"],
)
def test_time_that_runs_out_while_the_arm_is_held_is_no_failure_of_the_policy(client, server, befalls, reason):
    arm = real_arm()
    watch = Ticks({10: lambda: befalls(arm, server)})
    result = run_one(arm, client, watch, max_ticks=60)
    assert (result.outcome, result.ticks) == ("error", 60) and watch.ticks[-1].source == HOLD
    assert result.message == f"time ran out while the arm was held: {watch.ticks[-1].reason}"
    assert reason in result.message


def test_a_server_too_slow_to_be_obeyed_is_no_failure_of_the_policy(client, policy):
    policy.script |= {decision: [Delay(0.3)] * 20 for decision in range(20)}
    for max_ticks in (40, 45, 50):
        result = run_one(real_arm(), client, max_ticks=max_ticks, max_age_s=0.2)
        assert (result.outcome, result.holds) == ("error", max_ticks)
        assert result.message.startswith("time ran out while the arm was held: ")


def test_an_action_that_the_arm_did_not_take_is_a_hold_that_says_why(client, policy):
    arm, watch, refused = real_arm(), Ticks(), []
    take = arm.apply

    def apply(action_A):
        if refused or len(watch.ticks) < 20:
            return take(action_A)
        arm.trouble = "no word from the client"
        refused.append(len(watch.ticks))
        return None

    arm.apply = apply
    result = run_one(arm, client, watch, max_ticks=40)
    ticks = policy.only_episode.ticks
    held = ticks[refused[0]]
    assert (held.source, held.reason) == (HOLD, "no word from the client") and result.ticks == 40
    executed = [(tick.decision, tick.index) for tick in ticks if tick.source == POLICY]
    assert len(set(executed)) == len(executed) == len(arm.applied)


def test_the_last_frame_is_of_the_moment_when_the_episode_was_over(client, policy):
    """The answer to the last decision takes long, and the scene is another by then."""
    policy.script[1] = [Delay(0.5)]
    result = run_one(real_arm(), client, max_ticks=10)
    seen_s = (policy.only_episode.end.final_observation.capture_time_ns - time.monotonic_ns()) / 1e9
    assert result.outcome == "failure" and seen_s < -0.2


def test_blind_there_is_no_last_frame(client, policy):
    arm = real_arm()
    run_one(arm, client, Ticks({18: lambda: setattr(arm, "blind", "camera front: lost")}), max_ticks=20)
    assert not policy.only_episode.end.HasField("final_observation")


def test_more_ticks_than_a_request_may_report_end_the_episode_and_are_reported(client, policy):
    policy.spec.max_request_ticks = 30
    arm = real_arm()
    arm.blind = "camera front: lost"
    result = run_one(arm, client, max_ticks=100)
    assert (result.outcome, result.ticks) == ("error", 30) and "TooLong: 30 ticks without a decision" in result.message
    assert len(policy.only_episode.ticks) == 30


@pytest.mark.parametrize(
    "trouble", [[LoseReply()], [Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after_ms=100)]]
)
def test_a_retry_carries_a_newer_observation_and_the_same_ticks(client, policy, trouble):
    policy.script[1] = list(trouble)
    run_one(real_arm(), client, max_ticks=40)
    episode = policy.only_episode
    first, second = [request for request in episode.requests if request.decision == 1][:2]
    assert second.observation.capture_time_ns > first.observation.capture_time_ns
    assert list(second.executed) == list(first.executed)
    assert [request.decision for request in episode.requests] == sorted(r.decision for r in episode.requests)


def test_every_tick_reaches_the_server_once_however_bad_the_network(client, policy):
    for d in range(1, 30, 2):
        policy.script[d] = [LoseReply(), Refuse(grpc.StatusCode.ABORTED), Delay(0.05)]
    watch = Ticks()
    result = run_one(real_arm(), client, watch, max_ticks=100, ahead_ticks=1)
    assert result.ticks == 100
    keys = [(tick.decision, tick.index, tick.source) for tick in watch.ticks]
    # Those of a decision whose answer was lost come again with the end; a server knows them by their key.
    reached = {(tick.decision, tick.index, tick.source): tick for tick in policy.only_episode.ticks}
    assert [reached[key] for key in keys] == watch.ticks
    assert len(set(keys)) == len(keys) == len(reached)


def test_a_tick_never_waits_for_the_network(client, policy):
    policy.delay_s = 1.0
    episode = Episode(real_arm(), rollout_of(max_ticks=20), client, client.spec(), EpisodeConfig())
    episode.start()
    began = time.monotonic()
    for _ in range(20):
        episode.tick()
    assert time.monotonic() - began < 0.5
    episode.stop("enough")
    episode.end()


def test_an_interrupted_loop_holds_the_arm_and_ends_the_episode(client, policy):
    def interrupt():
        raise KeyboardInterrupt

    arm = real_arm()
    with pytest.raises(KeyboardInterrupt):
        run_one(arm, client, Ticks({5: interrupt}))
    assert arm.log[-1] == "hold"
    assert policy.only_episode.end.outcome == episode_pb2.OUTCOME_ERROR


def test_when_the_episode_is_over_the_arm_is_held_once_more(client, policy):
    arm = real_arm()
    result = run_one(arm, client, max_ticks=20)
    assert arm.log[-1] == "hold" and arm.log.count("hold") == result.holds + 1


def test_an_arm_error_ends_the_episode_as_an_error(client, policy):
    result = run_one(real_arm(fail_at=7), client)
    assert result.outcome == "error" and "motor stalled" in result.message
    assert policy.only_episode.end.outcome == episode_pb2.OUTCOME_ERROR


def test_what_is_applied_is_what_was_answered(client, policy):
    arm = real_arm()
    run_one(arm, client, max_ticks=40, ahead_ticks=0)
    asked = np.array([policy.action_of(n // 4) for n in range(len(arm.applied))])
    np.testing.assert_allclose(np.array(arm.applied), asked, atol=1 / 255)
