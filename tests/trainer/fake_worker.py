"""A worker without a simulator: it sees noise, and whether an episode succeeds is its seed's to say, or the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protos import episode_pb2, policy_pb2, rollout_pb2
from tests.server.running import RunningServer
from tests.server.test_served_vla import observation
from tests.trainer.fake_episodes import ticks

DECISIONS, TICKS = 2, 3
"""Of every episode; K = 2, and the task ends, or time runs out, in the middle of the second chunk."""


Succeeds = Callable[[policy_pb2.StartEpisodeReply], bool]


def by_seed(start: policy_pb2.StartEpisodeReply) -> bool:
    return start.seed % 2 == 0


@contextmanager
def working(server: RunningServer, succeeds: Succeeds = by_seed) -> Iterator[None]:
    """Takes leases in a thread until the block ends."""
    over = threading.Event()

    def go() -> None:
        while not over.is_set():
            request = rollout_pb2.LeaseRolloutRequest(worker="fake", can_run=["robosuite/*"])
            leased = server.rollouts.LeaseRollout(request)
            if leased.HasField("rollout"):
                _run(server, leased, succeeds)
            else:
                time.sleep(0.05)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _run(server: RunningServer, leased: rollout_pb2.LeaseRolloutReply, succeeds: Succeeds) -> None:
    policy = server.policy
    start = policy.StartEpisode(policy_pb2.StartEpisodeRequest(lease_id=leased.lease_id))
    seen = [observation((start.seed + number) % 1000) for number in range(DECISIONS + 1)]
    executed = [ticks(0, "pp"), ticks(1, "p")]
    for decision in range(DECISIONS):
        policy.Act(
            policy_pb2.ActRequest(
                episode_id=start.episode_id,
                decision=decision,
                observation=seen[decision],
                executed=executed[decision - 1] if decision else [],
            )
        )
    success = succeeds(start)
    policy.EndEpisode(
        policy_pb2.EndEpisodeRequest(
            episode_id=start.episode_id,
            outcome=episode_pb2.OUTCOME_SUCCESS if success else episode_pb2.OUTCOME_FAILURE,
            terminal=success,
            executed=executed[-1],
            final_observation=seen[-1],
        )
    )
