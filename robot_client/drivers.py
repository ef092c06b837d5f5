"""What gives episodes their rhythm: the wall clock for one real arm, or the answers for many simulated ones.

Both take rollouts one by one, as there is room, and yield a result as each episode ends.  SpecMismatch is raised before
anything moves.  When the caller stops early, or a bug is raised, what is under way is ended as an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace

from robot_client.arm import Arm
from robot_client.cadence import Cadence
from robot_client.client import Client
from robot_client.episode import Episode, EpisodeConfig
from robot_client.observer import Observer
from robot_client.pilot import Pilot
from robot_client.rollout import EpisodeResult, Rollout

BEAT_S = 0.5
"""The longest that the lockstep driver waits without calling on_wait."""


def no_observers(rollout: Rollout) -> Sequence[Observer]:
    return ()


def no_pilot(arm: Arm, rollout: Rollout) -> Pilot | None:
    return None


def run(
    arm: Arm,
    rollouts: Iterable[Rollout],
    client: Client,
    config: EpisodeConfig | None = None,
    *,
    observers: Callable[[Rollout], Sequence[Observer]] = no_observers,
    pilot: Pilot | None = None,
) -> Iterator[EpisodeResult]:
    """One arm after its own clock: lockstep for a simulated arm, real time for any other."""
    if arm.spec.lockstep:
        return run_lockstep([arm], rollouts, client, config, observers=observers, pilots=lambda arm, rollout: pilot)
    return run_real_time(arm, rollouts, client, config, observers=observers, pilot=pilot)


def run_real_time(
    arm: Arm,
    rollouts: Iterable[Rollout],
    client: Client,
    config: EpisodeConfig | None = None,
    *,
    observers: Callable[[Rollout], Sequence[Observer]] = no_observers,
    pilot: Pilot | None = None,
) -> Iterator[EpisodeResult]:
    """One arm at its tick rate.  Neither the network nor a late answer delays a tick: the arm holds instead."""
    for rollout in rollouts:
        episode = Episode(arm, rollout, client, client.spec(), config or EpisodeConfig(), observers(rollout), pilot)
        try:
            episode.start()
            cadence = Cadence(arm.spec.tick_rate_hz)
            while not episode.over:
                cadence.wait()
                episode.tick()
        finally:
            episode.stop("the driver was stopped")
            result = episode.end()
        yield replace(result, cadence=cadence.report())


def run_lockstep(
    arms: Sequence[Arm],
    rollouts: Iterable[Rollout],
    client: Client,
    config: EpisodeConfig | None = None,
    *,
    observers: Callable[[Rollout], Sequence[Observer]] = no_observers,
    pilots: Callable[[Arm, Rollout], Pilot | None] = no_pilot,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[EpisodeResult]:
    """Many simulated arms in one thread, an episode on each, their requests in flight together.

    An arm whose answer is in moves until it needs the next one, and asks; the others' answers are computed meanwhile.
    on_wait is called whenever every arm waits for its answer, at least every BEAT_S.
    """
    rollouts, idle, running = iter(rollouts), list(arms), list[Episode]()
    try:
        while True:
            while idle and (rollout := next(rollouts, None)) is not None:
                arm = idle.pop()
                spec, watchers, pilot = client.spec(), observers(rollout), pilots(arm, rollout)
                episode = Episode(arm, rollout, client, spec, config or EpisodeConfig(), watchers, pilot)
                running.append(episode)
                episode.start()
                advance(episode)
            if not running:
                return
            for episode in running:
                if episode.has_news:
                    advance(episode)
            over = [episode for episode in running if episode.over]
            for episode in over:
                running.remove(episode)
                idle.append(episode.arm)
                yield episode.end()
            if not over:
                on_wait()
                wait_for_an_answer(running)
    finally:
        for episode in running:
            episode.stop("the driver was stopped")
            episode.end()


def advance(episode: Episode) -> None:
    """Moves an arm in lockstep until it must wait for an answer, or the episode is over."""
    while not episode.over:
        episode.look()
        if episode.over or episode.must_wait:
            return
        episode.move()


def wait_for_an_answer(episodes: Sequence[Episode]) -> None:
    """Returns when an answer has come, a retry is due, or after BEAT_S."""
    patience_s = min([BEAT_S] + [max(0.0, episode.wake_at_s - time.monotonic()) for episode in episodes])
    pending = [episode.pending for episode in episodes if episode.pending is not None]
    if pending:
        wait(pending, timeout=patience_s, return_when=FIRST_COMPLETED)
    else:
        time.sleep(patience_s)
