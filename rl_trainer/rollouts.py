"""Collecting experience: rollouts go to the server's queue, the episodes that come of them are read from a cursor.

Survives a server that is killed and comes back: what has not come in is asked for again, and a rollout counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from protos import episode_pb2, rollout_pb2, rollout_pb2_grpc
from protos.channel import DEFAULT_DEADLINE_S, Credentials, dial
from protos.episode_file import Episode
from rl_trainer.patience import PASSING, patiently

POLL_S = 0.25
"""How soon a finished episode is noticed."""
LOOK_S = 5.0
"""How often the queue is asked what became of the rest."""
NOBODY_S = 60.0
"""How long work may wait while nobody has any, before that is said."""

REPEATABLE = (*PASSING, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Every call of the queue may be repeated, so that a lost answer is asked for again."""

T = TypeVar("T")


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
        self._address, self._credentials, self._patience_s = address, credentials, patience_s
        self._channel = dial(address, credentials)
        self._stub = rollout_pb2_grpc.RolloutsStub(self._channel)
        self._outstanding: dict[str, rollout_pb2.Rollout] = {}
        self._taken_s = time.monotonic()
        self._waiting: dict[str, tuple[int, Episode]] = {}
        """by rollout: what was read before it was asked for; a life of the run that was killed asked, and will again"""

    @property
    def cursor(self) -> int:
        return min((sequence - 1 for sequence, _ in self._waiting.values()), default=self._newest)

    @property
    def outstanding(self) -> int:
        """Rollouts that have not come in yet."""
        return len(self._outstanding)

    def enqueue(self, rollouts: Sequence[rollout_pb2.Rollout]) -> None:
        """Asks for rollouts; their ids begin with the run's name and a slash."""
        self._outstanding |= {rollout.rollout_id: rollout for rollout in rollouts}
        self._call(lambda: self._enqueue(rollouts))

    def finished(self, *, check: Callable[[], None] = lambda: None) -> Iterator[Finished]:
        """Each outstanding rollout once, as it comes in, until none is left.  check() is called while there are."""
        looked_s, self._taken_s = 0.0, time.monotonic()
        while self._outstanding:
            check()
            newest, episodes = self._call(self._read)
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

    def commit(self, *, leave: bool = False) -> None:
        """Everything read so far is in a checkpoint: the server may delete it, but nothing newer.

        leave: the run is over, and nothing need be kept for it.
        """
        request = rollout_pb2.CommitCursorRequest(reader=self.run, cursor=self.cursor, leave=leave)
        self._call(lambda: self._stub.CommitCursor(request, timeout=DEFAULT_DEADLINE_S))

    def forgive(self) -> None:
        """What was set aside in an earlier life of the run may be asked for again: what ailed it may be put right."""
        if self._status().set_aside:
            self.cancel()

    def cancel(self) -> None:
        """The server forgets what has not ended of the run, and what was set aside."""
        request = rollout_pb2.CancelRolloutsRequest(run=self.run)
        self._call(lambda: self._stub.CancelRollouts(request, timeout=DEFAULT_DEADLINE_S))

    def close(self) -> None:
        self._channel.close()

    def _read(self) -> tuple[int, list[tuple[int, Episode]]]:
        """The newest sequence number, and the counted episodes up to there that were not read yet, with theirs."""
        request = rollout_pb2.StreamEpisodesRequest(cursor=self._newest, run=self.run)
        return read_episodes(self._stub, request, timeout_s=self._patience_s)

    def _look(self) -> Iterator[Finished]:
        """Gives what the server has set aside, and asks again for the rest.

        A server that was restarted has forgotten it; one whose disk is full says so, and the run with it.
        """
        status = self._status()
        self._warn(status)
        for aside in status.set_aside:
            rollout = self._outstanding.pop(aside.rollout.rollout_id, None)
            if rollout is not None:
                yield Finished(rollout=rollout, episode=None, errors=tuple(aside.errors))
        if self._outstanding:
            self._call(lambda: self._enqueue(list(self._outstanding.values())))

    def _status(self) -> rollout_pb2.QueueStatus:
        request = rollout_pb2.GetQueueRequest(run=self.run)
        return self._call(lambda: self._stub.GetQueue(request, timeout=DEFAULT_DEADLINE_S))

    def _warn(self, status: rollout_pb2.QueueStatus) -> None:
        """Says so where nobody takes the work."""
        now_s = time.monotonic()
        if status.leased or not status.waiting:
            self._taken_s = now_s
        elif now_s - self._taken_s > NOBODY_S:
            workers = ", ".join(status.workers) or "none"
            print(
                f"nobody takes the {status.waiting} rollouts that wait at {self._address}; workers heard of: {workers}"
                " (python -m sim worker --server ... --suites ...)",
                flush=True,
            )
            self._taken_s = float("inf")  # once is enough

    def _enqueue(self, rollouts: Sequence[rollout_pb2.Rollout]) -> None:
        request = rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts)
        self._stub.EnqueueRollouts(request, timeout=DEFAULT_DEADLINE_S)

    def _call(self, call: Callable[[], T]) -> T:
        return patiently(
            call,
            address=self._address,
            credentials=self._credentials,
            patience_s=self._patience_s,
            passing=REPEATABLE,
        )


def read_episodes(
    stub: rollout_pb2_grpc.RolloutsStub,
    request: rollout_pb2.StreamEpisodesRequest,
    *,
    timeout_s: float,
    most: int | None = None,
) -> tuple[int, list[tuple[int, Episode]]]:
    """The newest sequence number, and the episodes up to there that did not end as errors, with theirs.

    most: after so many it stops, and gives the number of the last of them.  One that cannot be read is printed.
    """
    newest, read, records = request.cursor, list[tuple[int, Episode]](), list[episode_pb2.EpisodeRecord]()
    stream = stub.StreamEpisodes(request, timeout=timeout_s)
    for part in stream:
        newest = part.sequence
        if part.damaged:
            print(f"not read: {part.damaged}", flush=True)
        if not part.HasField("record"):
            continue
        records.append(part.record)
        if part.record.HasField("end"):
            episode = Episode.of(records, f"episode {part.sequence} of the server")
            if episode.end.outcome != episode_pb2.OUTCOME_ERROR:
                read.append((part.sequence, episode))
            records = []
        if len(read) == most:
            stream.cancel()
            break
    return newest, read
