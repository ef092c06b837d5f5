"""A session as its trainer sees it: what the server says of it, its episodes, its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from protos import rollout_pb2, rollout_pb2_grpc, session_pb2, session_pb2_grpc
from protos.channel import DEFAULT_DEADLINE_S, Credentials, dial
from protos.episode_file import Episode
from rl_trainer.launch import RunServer
from rl_trainer.patience import patiently
from rl_trainer.rollouts import REPEATABLE, read_episodes

AT_ONCE = 64
"""Episodes that are read together: some hundred KB each."""
OFFER_S = 300.0
"""How long comparing a candidate with the live version may take."""

T = TypeVar("T")


class SessionClient:
    """A server's sessions.  Every call outlives a server that is away for patience_s, then raises ServerGone.

    Raises Refusal for what the server refuses, with its sentence.
    """

    def __init__(self, server: RunServer, *, patience_s: float = 300.0):
        self._server, self._patience_s = server, patience_s
        self._channels = [
            dial(server.address, server.credentials),
            dial(server.admin_address, server.admin_credentials),
        ]
        self._rollouts = rollout_pb2_grpc.RolloutsStub(self._channels[0])
        self._sessions = session_pb2_grpc.SessionsStub(self._channels[1])

    def start(self, request: session_pb2.StartSessionRequest) -> session_pb2.Session:
        """Begins it, or finds it begun."""
        return self._admin(lambda: self._sessions.StartSession(request, timeout=DEFAULT_DEADLINE_S))

    def get(self, session_id: str, *, with_episodes: bool = False) -> session_pb2.Session:
        """With its log."""
        request = session_pb2.GetSessionRequest(session_id=session_id, with_episodes=with_episodes)
        return self._admin(lambda: self._sessions.GetSession(request, timeout=DEFAULT_DEADLINE_S))

    def all(self) -> Sequence[session_pb2.Session]:
        """In the order in which they were started."""
        request = session_pb2.ListSessionsRequest()
        return self._admin(lambda: self._sessions.ListSessions(request, timeout=DEFAULT_DEADLINE_S)).sessions

    def offer(self, session_id: str, version: int, fingerprint: str) -> session_pb2.OfferCandidateReply:
        """Puts a published version on trial, or says why not."""
        request = session_pb2.OfferCandidateRequest(
            session_id=session_id, version=version, device_fingerprint=fingerprint
        )
        return self._admin(lambda: self._sessions.OfferCandidate(request, timeout=OFFER_S))

    def control(
        self, session_id: str, control: session_pb2.Control, note: str = "", *, version: int | None = None
    ) -> session_pb2.Session:
        """A person's word; version: the one that a promotion or a roll back is to befall."""
        request = session_pb2.ControlSessionRequest(session_id=session_id, control=control, note=note, version=version)
        return self._admin(lambda: self._sessions.ControlSession(request, timeout=DEFAULT_DEADLINE_S))

    def episodes(self, session_id: str, cursor: int) -> tuple[int, list[tuple[int, Episode]]]:
        """The next after the cursor that did not end as errors, AT_ONCE at most, each with its number; and the number
        up to which there is nothing else."""
        request = rollout_pb2.StreamEpisodesRequest(cursor=cursor, session_id=session_id)
        return self._call(lambda: read_episodes(self._rollouts, request, timeout_s=self._patience_s, most=AT_ONCE))

    def all_episodes(self, session_id: str, cursor: int) -> Iterator[tuple[int, Episode]]:
        """Those after the cursor that did not end as errors, each with its number; few are in memory at a time."""
        while True:
            cursor, found = self.episodes(session_id, cursor)
            yield from found
            if not found:
                return

    def newest(self, session_id: str) -> int:
        """The number of the newest episode at the server."""
        cursor, found = self.episodes(session_id, 0)
        while found:
            cursor, found = self.episodes(session_id, cursor)
        return cursor

    def keep_after(self, reader: str, cursor: int, *, leave: bool = False) -> None:
        """The server deletes nothing after the cursor, until the reader leaves."""
        request = rollout_pb2.CommitCursorRequest(reader=reader, cursor=cursor, leave=leave)
        self._call(lambda: self._rollouts.CommitCursor(request, timeout=DEFAULT_DEADLINE_S))

    def outstanding(self, run: str) -> int:
        """Rollouts of a run that have not ended."""
        request = rollout_pb2.GetQueueRequest(run=run)
        status = self._call(lambda: self._rollouts.GetQueue(request, timeout=DEFAULT_DEADLINE_S))
        return status.waiting + status.leased

    def enqueue(self, rollouts: Sequence[rollout_pb2.Rollout]) -> None:
        request = rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts)
        self._call(lambda: self._rollouts.EnqueueRollouts(request, timeout=DEFAULT_DEADLINE_S))

    def cancel(self, run: str) -> None:
        """Takes back what has not ended of a run's rollouts."""
        request = rollout_pb2.CancelRolloutsRequest(run=run)
        self._call(lambda: self._rollouts.CancelRollouts(request, timeout=DEFAULT_DEADLINE_S))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _call(self, call: Callable[[], T]) -> T:
        return self._patiently(call, self._server.address, self._server.credentials)

    def _admin(self, call: Callable[[], T]) -> T:
        return self._patiently(call, self._server.admin_address, self._server.admin_credentials)

    def _patiently(self, call: Callable[[], T], address: str, credentials: Credentials) -> T:
        return patiently(
            call, address=address, credentials=credentials, patience_s=self._patience_s, passing=REPEATABLE
        )
