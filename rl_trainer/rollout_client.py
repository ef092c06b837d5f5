"""A server's rollouts and episodes as its clients see them: what may be asked of it, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from protos import episode_pb2, rollout_pb2, rollout_pb2_grpc
from protos.channel import DEFAULT_DEADLINE_S, Credentials, dial
from protos.episode_file import Episode
from rl_trainer.patience import REPEATABLE, patiently

NOBODY_S = 60.0
"""How long work may wait while nobody has any, before that is said."""

T = TypeVar("T")


class RolloutClient:
    """The Rollouts service at HOST:PORT.  Every call outlives a server that is away for patience_s, then raises
    ServerGone.

    Raises Refusal for what the server refuses, with its sentence.
    """

    def __init__(self, address: str, credentials: Credentials | None = None, *, patience_s: float = 300.0):
        self.address, self._credentials, self._patience_s = address, credentials, patience_s
        self._channel = dial(address, credentials)
        self._stub = rollout_pb2_grpc.RolloutsStub(self._channel)

    def enqueue(self, rollouts: Sequence[rollout_pb2.Rollout]) -> None:
        """Those that the server knows stay as they are."""
        request = rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts)
        self._call(lambda: self._stub.EnqueueRollouts(request, timeout=DEFAULT_DEADLINE_S))

    def cancel(self, run: str) -> None:
        """The server forgets what has not ended of the run's rollouts, and what was set aside."""
        request = rollout_pb2.CancelRolloutsRequest(run=run)
        self._call(lambda: self._stub.CancelRollouts(request, timeout=DEFAULT_DEADLINE_S))

    def status(self, run: str) -> rollout_pb2.QueueStatus:
        """What became of the run's rollouts that gave no episode yet."""
        request = rollout_pb2.GetQueueRequest(run=run)
        return self._call(lambda: self._stub.GetQueue(request, timeout=DEFAULT_DEADLINE_S))

    def keep_after(self, reader: str, cursor: int, *, leave: bool = False) -> None:
        """The server deletes nothing after the cursor, until the reader leaves."""
        request = rollout_pb2.CommitCursorRequest(reader=reader, cursor=cursor, leave=leave)
        self._call(lambda: self._stub.CommitCursor(request, timeout=DEFAULT_DEADLINE_S))

    def read(
        self, cursor: int, *, run: str = "", session_id: str = "", most: int | None = None
    ) -> tuple[int, list[tuple[int, Episode]]]:
        """The counted episodes of a run or a session after the cursor that did not end as errors, each with its
        number; and the number up to which there is nothing else.

        most: after so many it stops.  One that cannot be read is printed.
        """
        request = rollout_pb2.StreamEpisodesRequest(cursor=cursor, run=run, session_id=session_id)
        return self._call(lambda: self._read(request, most))

    def close(self) -> None:
        self._channel.close()

    def _read(
        self, request: rollout_pb2.StreamEpisodesRequest, most: int | None
    ) -> tuple[int, list[tuple[int, Episode]]]:
        newest, read, records = request.cursor, list[tuple[int, Episode]](), list[episode_pb2.EpisodeRecord]()
        stream = self._stub.StreamEpisodes(request, timeout=self._patience_s)
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

    def _call(self, call: Callable[[], T]) -> T:
        return patiently(
            call,
            address=self.address,
            credentials=self._credentials,
            patience_s=self._patience_s,
            passing=REPEATABLE,
        )


class Idleness:
    """Says so, once, where nobody takes the work that waits at a server's address."""

    def __init__(self, address: str):
        self._address = address
        self.forget()

    def forget(self) -> None:
        """Waiting begins now."""
        self._taken_s = time.monotonic()

    def look(self, status: rollout_pb2.QueueStatus) -> None:
        now_s = time.monotonic()
        if status.leased or not status.waiting:
            self._taken_s = now_s
        elif now_s - self._taken_s > NOBODY_S:
            workers = ", ".join(status.workers) or "none"
            print(
                f"nobody takes the {status.waiting} rollouts that wait at {self._address}; workers heard of:"
                f" {workers} (python -m sim worker --server ... --suites ...)",
                flush=True,
            )
            self._taken_s = float("inf")  # once is enough
