"""A session as its trainer sees it: what the server says of it, its episodes, its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from protos import session_pb2, session_pb2_grpc
from protos.channel import DEFAULT_DEADLINE_S, dial
from protos.episode_file import Episode
from rl_trainer.launch import RunServer
from rl_trainer.patience import REPEATABLE, patiently
from rl_trainer.rollout_client import RolloutClient

AT_ONCE = 8
"""Episodes that are read together: some hundred KB each, and some ten MB where robots send large frames as they are."""
OFFER_S = 300.0
"""How long comparing a candidate with the live version may take."""

T = TypeVar("T")


class SessionClient:
    """A server's sessions.  Every call outlives a server that is away for patience_s, then raises ServerGone.

    Raises Refusal for what the server refuses, with its sentence.
    rollouts: the practice that workers do for a session, and the episodes of its robots.
    """

    def __init__(self, server: RunServer, *, patience_s: float = 300.0):
        self._server, self._patience_s = server, patience_s
        self.rollouts = RolloutClient(server.address, server.credentials, patience_s=patience_s)
        self._channel = dial(server.admin_address, server.admin_credentials)
        self._sessions = session_pb2_grpc.SessionsStub(self._channel)

    def start(self, request: session_pb2.StartSessionRequest) -> session_pb2.Session:
        """Begins it, or finds it begun."""
        return self._call(lambda: self._sessions.StartSession(request, timeout=DEFAULT_DEADLINE_S))

    def get(self, session_id: str, *, with_episodes: bool = False) -> session_pb2.Session:
        """With its log."""
        request = session_pb2.GetSessionRequest(session_id=session_id, with_episodes=with_episodes)
        return self._call(lambda: self._sessions.GetSession(request, timeout=DEFAULT_DEADLINE_S))

    def all(self) -> Sequence[session_pb2.Session]:
        """In the order in which they were started."""
        request = session_pb2.ListSessionsRequest()
        return self._call(lambda: self._sessions.ListSessions(request, timeout=DEFAULT_DEADLINE_S)).sessions

    def offer(self, session_id: str, version: int, fingerprint: str) -> session_pb2.OfferCandidateReply:
        """Puts a published version on trial, or says why not."""
        request = session_pb2.OfferCandidateRequest(
            session_id=session_id, version=version, device_fingerprint=fingerprint
        )
        return self._call(lambda: self._sessions.OfferCandidate(request, timeout=OFFER_S))

    def control(
        self, session_id: str, control: session_pb2.Control, note: str = "", *, version: int | None = None
    ) -> session_pb2.Session:
        """A person's word; version: the one that a promotion or a roll back is to befall."""
        request = session_pb2.ControlSessionRequest(session_id=session_id, control=control, note=note, version=version)
        return self._call(lambda: self._sessions.ControlSession(request, timeout=DEFAULT_DEADLINE_S))

    def episodes(self, session_id: str, cursor: int) -> tuple[int, list[tuple[int, Episode]]]:
        """The next after the cursor that did not end as errors, AT_ONCE at most, each with its number; and the number
        up to which there is nothing else."""
        return self.rollouts.read(cursor, session_id=session_id, most=AT_ONCE)

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

    def close(self) -> None:
        self.rollouts.close()
        self._channel.close()

    def _call(self, call: Callable[[], T]) -> T:
        return patiently(
            call,
            address=self._server.admin_address,
            credentials=self._server.admin_credentials,
            patience_s=self._patience_s,
            passing=REPEATABLE,
        )
