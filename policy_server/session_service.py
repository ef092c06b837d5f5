"""The Sessions service: sessions begin, take candidates on trial, and obey people."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from policy_server import gate
from policy_server.batcher import DecodeAnswer
from policy_server.episode_store import EpisodeStore
from policy_server.errors import BadRequest, NoNumber, OutOfOrder
from policy_server.gate import GateRule
from policy_server.observation import MAX_NAME, Observed, check_sampling, read_observation
from policy_server.refusals import refusing
from policy_server.session import Charter, Event, Session
from policy_server.sessions import CONTROLS, NO_SESSIONS, Control, Sessions
from policy_server.version_store import FIRST_VERSION, VersionStore
from policy_server.versions import Versions
from protos import policy_pb2, session_pb2, session_pb2_grpc
from protos.episode_file import DamagedEpisode, EpisodeReader

ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
REPLAYED = 16
"""Observations that a candidate answers before it goes on trial."""
REPLAYED_EPISODES = 4
"""Of the session's latest episodes."""
CONTROL: dict[int, Control] = {session_pb2.Control.Value(f"CONTROL_{word.upper()}"): word for word in CONTROLS}

Answer = Callable[[int, Any], Awaitable[DecodeAnswer]]
"""A version's greedy answer to a prepared observation, in a pass with whatever robots ask then.  Raises Refused."""


class SessionService(session_pb2_grpc.SessionsServicer):
    """sessions None: this server has none."""

    def __init__(
        self,
        sessions: Sessions | None,
        *,
        spec: policy_pb2.PolicySpec,
        versions: Versions,
        version_store: VersionStore,
        store: EpisodeStore | None,
        prepare: Callable[[Observed], Any],
        answer: Answer,
    ):
        self._given, self._store = sessions, store
        self._spec, self._versions, self._version_store = spec, versions, version_store
        self._prepare, self._answer = prepare, answer
        self._span_A = np.array([d.high - d.low or 1.0 for d in spec.action])

    @refusing
    async def StartSession(self, request: session_pb2.StartSessionRequest, context: Any) -> session_pb2.Session:
        if not ID.fullmatch(request.session_id):
            raise BadRequest(
                f"must be 1 to 100 letters, digits, '-', '_' and '.', got {request.session_id!r}", field="session_id"
            )
        if len(request.task) > MAX_NAME:
            raise BadRequest(f"must be at most {MAX_NAME} characters, got {len(request.task)}", field="task")
        check_sampling(request.temperature, request.noise_correlation)
        self._check_adapter(request.base_version, field="base_version")
        charter = Charter(
            session_id=request.session_id,
            task=request.task,
            base=request.base_version,
            temperature=request.temperature,
            noise_correlation=request.noise_correlation,
            rule=_rule(request.rule),
            started_unix_ns=time.time_ns(),
        )
        await asyncio.to_thread(self._sessions.start, charter)
        return self._message(request.session_id)

    @refusing
    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Any
    ) -> session_pb2.ListSessionsReply:
        return session_pb2.ListSessionsReply(sessions=[self._message(name) for name in self._sessions.ids])

    @refusing
    async def GetSession(self, request: session_pb2.GetSessionRequest, context: Any) -> session_pb2.Session:
        return self._message(request.session_id, with_log=True, with_episodes=request.with_episodes)

    @refusing
    async def OfferCandidate(
        self, request: session_pb2.OfferCandidateRequest, context: Any
    ) -> session_pb2.OfferCandidateReply:
        live = self._sessions.check_offer(request.session_id, request.version)
        if live is None:
            return self._offered(request, True, "it is on trial")
        self._check_adapter(request.version, field="version")
        record = self._version_store.find(request.version)
        if record is not None and request.device_fingerprint != record.device_fingerprint:
            raise BadRequest(
                f"must be {record.device_fingerprint!r}, that of version {request.version}, got"
                f" {request.device_fingerprint!r}",
                field="device_fingerprint",
            )
        accepted, reason = await self._compared(request, live)
        await asyncio.to_thread(
            self._sessions.offer, request.session_id, request.version, live=live, accepted=accepted, reason=reason
        )
        return self._offered(request, accepted, reason)

    @refusing
    async def ControlSession(self, request: session_pb2.ControlSessionRequest, context: Any) -> session_pb2.Session:
        control = CONTROL.get(request.control)
        if control is None:
            raise BadRequest(f"must be one of {[*CONTROLS]}, got code {request.control}", field="control")
        note = request.note[:MAX_NAME]
        version = request.version if request.HasField("version") else None
        await asyncio.to_thread(self._sessions.control, request.session_id, control, note, version=version)
        return self._message(request.session_id)

    @property
    def _sessions(self) -> Sessions:
        if self._given is None:
            raise OutOfOrder(NO_SESSIONS)
        return self._given

    def _check_adapter(self, version: int, *, field: str) -> None:
        """Sessions share the passes of the model, as adapters of one base can."""
        record = self._version_store.find(self._versions.check(version, field=field))
        if version != FIRST_VERSION and record is not None and record.kind != "lora":
            raise BadRequest(f"must be 0 or an adapter, got version {version}, of whole weights", field=field)

    async def _compared(self, request: session_pb2.OfferCandidateRequest, live: int) -> tuple[bool, str]:
        """Whether the candidate answers about as the live version does, and a sentence with the numbers."""
        seen = await asyncio.to_thread(self._seen, request.session_id)
        if not seen:
            raise OutOfOrder("the session has no episode whose observations could be replayed yet", field="session_id")
        for version in (live, request.version):  # or the first answer would build them, and robots wait
            await asyncio.to_thread(self._versions.weights, version)
        try:
            answers = {v: [await self._answer(v, one) for one in seen] for v in (live, request.version)}
        except NoNumber as error:
            return False, str(error)
        live_nKA, candidate_nKA = (np.stack([a.actions_KA for a in answers[v]]) for v in answers)
        apart_A = gate.departure(live_nKA, candidate_nKA, self._span_A)
        most = int(apart_A.argmax())
        with self._sessions.read(request.session_id) as session:
            envelope = session.charter.rule.envelope
        return bool(apart_A[most] <= envelope), (
            f"on {len(seen)} observations its {self._spec.action[most].name} lies {apart_A[most]:.3f} of the range from"
            f" that of version {live}, other numbers less; at most {envelope:g} may be"
        )

    def _seen(self, session_id: str) -> list[Any]:
        """What the robots of the session's latest episodes saw, prepared, evenly spread over them."""
        assert self._store is not None
        decisions = list[tuple[EpisodeReader, int]]()
        for stored in reversed(self._store.latest(REPLAYED_EPISODES, session_id, sound=True)):
            with contextlib.suppress(DamagedEpisode, OSError):  # or deleted meanwhile
                reader = EpisodeReader(stored.path)
                decisions += [(reader, index) for index in range(len(reader))]
        prepared = list[Any]()
        for place in np.linspace(0, len(decisions) - 1, min(REPLAYED, len(decisions))).round().astype(int).tolist():
            reader, index = decisions[place]
            with contextlib.suppress(DamagedEpisode, OSError, BadRequest):
                seen = reader.decision(index).observation
                prepared.append(self._prepare(read_observation(seen, self._spec, field="observation")))
        return prepared

    def _offered(
        self, request: session_pb2.OfferCandidateRequest, accepted: bool, reason: str
    ) -> session_pb2.OfferCandidateReply:
        return session_pb2.OfferCandidateReply(
            accepted=accepted, reason=reason, session=self._message(request.session_id)
        )

    def _message(self, session_id: str, *, with_log: bool = False, with_episodes: bool = False) -> session_pb2.Session:
        with self._sessions.read(session_id) as session:
            message = described(session, with_log=with_log, with_episodes=with_episodes)
        message.open_episodes = self._sessions.open_episodes(session_id)
        return message


def described(session: Session, *, with_log: bool = False, with_episodes: bool = False) -> session_pb2.Session:
    """A session as it travels, but for its open episodes."""
    charter, standing = session.charter, session.standing
    return session_pb2.Session(
        session_id=charter.session_id,
        task=charter.task,
        base_version=charter.base,
        temperature=charter.temperature,
        noise_correlation=charter.noise_correlation,
        rule=session_pb2.GateRule(**asdict(charter.rule)),
        state=f"SESSION_STATE_{session.state.upper()}",
        live_version=session.live,
        candidate_version=session.candidate,
        past_versions=session.past,
        live=_tally(session.trial.live),
        candidate=_tally(session.trial.candidate),
        standing=standing.reason if standing is not None else "",
        versions=[
            session_pb2.VersionTally(version=version, tally=_tally(tally))
            for version, tally in sorted(session.tallies.items())
        ],
        started_unix_ns=charter.started_unix_ns,
        log=[
            session_pb2.SessionEvent(
                unix_ns=event.unix_ns, what=event.what, version=event.version, by=event.by, reason=event.reason
            )
            for event in session.log
            if with_log
        ],
        episodes=[_episode(event) for event in session.episodes.values() if with_episodes],
    )


def _episode(event: Event) -> session_pb2.SessionEpisode:
    trial = event.trial
    assert trial is not None
    return session_pb2.SessionEpisode(
        episode_id=event.episode_id,
        version=event.version,
        success=trial.success,
        intervened=trial.intervened,
        ticks=trial.ticks,
        holds=trial.holds,
        clips=trial.clips,
        unix_ns=event.unix_ns,
        error=trial.error,
    )


def _tally(tally: gate.Tally) -> session_pb2.Tally:
    return session_pb2.Tally(
        episodes=tally.episodes,
        successes=tally.successes,
        interventions=tally.interventions,
        ticks=tally.ticks,
        holds=tally.holds,
        clips=tally.clips,
        errors=tally.errors,
    )


def _rule(asked: session_pb2.GateRule) -> GateRule:
    """What is asked for, and the server's own choice for the rest.  Raises BadRequest."""
    try:
        return GateRule(**{field.name: value for field, value in asked.ListFields()})
    except ValueError as error:
        raise BadRequest(str(error), field="rule") from error
