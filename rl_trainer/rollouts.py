"""Collecting experience: rollouts go to the server's queue, the episodes that come of them are read from a cursor.

Survives a server that is killed and comes back: what has not come in is asked for again, and a rollout counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from protos import episode_pb2, rollout_pb2
from protos.channel import Credentials
from protos.episode_file import Episode
from rl_trainer.rollout_client import Idleness, RolloutClient

POLL_S = 0.25
"""How soon a finished episode is noticed."""
LOOK_S = 5.0
"""How often the queue is asked what became of the rest."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A rollout and what came of it."""

    rollout: rollout_pb2.Rollout
    episode: Episode | None
    """None: every attempt ended as an error"""
    errors: tuple[str, ...] = ()

    @property
    def success(self) -> bool:
        return self.episode is not None and self.episode.end.outcome == episode_pb2.OUTCOME_SUCCESS


class RolloutQueue:
    """The server's queue at HOST:PORT as one run sees it.

    credentials: what the server is shown.
    cursor: everything up to that sequence number was given out; to be kept in the run's checkpoint.
    patience_s: how long the server may be away before ServerGone is raised.
    """

    def __init__(
        self,
        address: str,
        *,
        run: str,
        credentials: Credentials | None = None,
        cursor: int = 0,
        patience_s: float = 300.0,
    ):
        self.run, self._newest = run, cursor
        self._client = RolloutClient(address, credentials, patience_s=patience_s)
        self._outstanding: dict[str, rollout_pb2.Rollout] = {}
        self._idleness = Idleness(address)
        self._waiting: dict[str, tuple[int, Episode]] = {}
        """by rollout: what was read before it was asked for; a life of the run that was killed asked, and will again"""

    @property
    def cursor(self) -> int:
        return min((sequence - 1 for sequence, _ in self._waiting.values()), default=self._newest)

    def enqueue(self, rollouts: Sequence[rollout_pb2.Rollout]) -> None:
        """Asks for rollouts; their ids begin with the run's name and a slash."""
        self._outstanding |= {rollout.rollout_id: rollout for rollout in rollouts}
        self._client.enqueue(rollouts)

    def finished(self, *, check: Callable[[], None] = lambda: None) -> Iterator[Finished]:
        """Each outstanding rollout once, as it comes in, until none is left.  check() is called while there are."""
        looked_s = 0.0
        self._idleness.forget()
        while self._outstanding:
            check()
            newest, episodes = self._client.read(self._newest, run=self.run)
            self._waiting |= {episode.start.rollout_id: (sequence, episode) for sequence, episode in episodes}
            self._newest = newest
            for rollout_id in [name for name in self._waiting if name in self._outstanding]:
                _, episode = self._waiting.pop(rollout_id)
                yield Finished(rollout=self._outstanding.pop(rollout_id), episode=episode)
            if not episodes and time.monotonic() - looked_s > LOOK_S:
                yield from self._look()
                looked_s = time.monotonic()
            elif not episodes:
                time.sleep(POLL_S)

    def forget_unasked(self) -> None:
        """Drops what was read and is not asked for: by a life of the run that was told otherwise."""
        self._waiting = {name: waiting for name, waiting in self._waiting.items() if name in self._outstanding}

    def commit(self, *, leave: bool = False) -> None:
        """Everything read so far is in a checkpoint: the server may delete it, but nothing newer.

        leave: the run is over, and nothing need be kept for it.
        """
        self._client.keep_after(self.run, self.cursor, leave=leave)

    def forgive(self) -> None:
        """What was set aside in an earlier life of the run may be asked for again: what ailed it may be put right."""
        if self._client.status(self.run).set_aside:
            self.cancel()

    def cancel(self) -> None:
        """The server forgets what has not ended of the run, and what was set aside."""
        self._client.cancel(self.run)

    def close(self) -> None:
        self._client.close()

    def _look(self) -> Iterator[Finished]:
        """Gives what the server has set aside, and asks again for the rest.

        A server that was restarted has forgotten it; one whose disk is full says so, and the run with it.
        """
        status = self._client.status(self.run)
        self._idleness.look(status)
        for aside in status.set_aside:
            rollout = self._outstanding.pop(aside.rollout.rollout_id, None)
            if rollout is not None:
                yield Finished(rollout=rollout, episode=None, errors=tuple(aside.errors))
        if self._outstanding:
            self._client.enqueue(list(self._outstanding.values()))
