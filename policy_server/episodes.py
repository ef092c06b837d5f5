"""Open episodes: which decision is due, what was answered, what was executed.  Lives on the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from policy_server.batcher import Ticket
from policy_server.episode_store import EpisodeStore
from policy_server.errors import EpisodeLost, OutOfOrder, Overloaded, Refused, Superseded, UnknownVersion
from policy_server.refusals import RETRY_SOON_MS
from policy_server.rollout_queue import Lease, RolloutQueue
from policy_server.session import moves
from policy_server.sessions import Sessions
from protos import episode_pb2, policy_pb2
from protos.episode_file import EpisodeWriter
from protos.rollout_pb2 import Rollout

log = logging.getLogger(__name__)

REMEMBERED = 10_000
"""How many request ids and closed episodes are remembered for retries."""
RATE_OVER = 32
"""A rate is that of so many answers."""
AT_WORK_S = 1.0
"""An episode that was silent for longer is not waited for when a batch is gathered."""
DEFAULT_CLIENT_EPISODES = 256
MAX_EPISODE_BYTES = 4 * 2**30
"""After so many in its file an episode takes no more decisions: one that nobody ends would fill the disk."""

EndedBy = Literal["client", "server", "silence"]
"""At whose word an episode ends; silence: at the server's, since nothing was heard of its client for too long."""
MakeStart = Callable[[str, policy_pb2.StartEpisodeRequest, Rollout | None], episode_pb2.EpisodeStart]
"""The first record of an episode of that id.  Raises Refused."""


@dataclass(frozen=True, eq=False)
class Flight:
    """A decision under way."""

    ticket: Ticket
    task: asyncio.Task[policy_pb2.ActReply]


class Episode:
    """One open episode.

    Decisions come in order: a request may repeat the last answered decision (it gets the stored answer), name one not
    answered yet, or the next one.  A decision's executed ticks are recorded with its answer.
    """

    def __init__(
        self,
        start: episode_pb2.EpisodeStart,
        writer: EpisodeWriter | None,
        lease: Lease | None,
        *,
        client: str = "",
        watched: str = "",
    ):
        self.start = start
        self.client = client
        self.writer = writer
        self.lease = lease
        self.flights: dict[int, Flight] = {}
        self.ends: set[asyncio.Task[None]] = set()
        """Requests to end it that are looked at."""
        self.closing: asyncio.Task[None] | None = None
        self.touched_s = time.monotonic()
        self.latest: episode_pb2.Observation | None = None
        """What was answered last, with one of its images, where somebody watches."""
        self._watched = watched
        self.moved = Counter[str]()
        """moves() of its ticks"""
        self._answers_s: deque[float] = deque(maxlen=RATE_OVER)
        self._newest = -1
        self._answered: policy_pb2.ActReply | None = None
        self._ticks: set[tuple[int, int, int]] = set()  # of the last report

    @property
    def robot(self) -> tuple[str, str]:
        """Its arm and the address that it calls from."""
        return self.start.arm, self.client.partition(":")[2]

    @property
    def decisions(self) -> int:
        """How many were answered."""
        return self._answered.decision + 1 if self._answered is not None else 0

    @property
    def rate_hz(self) -> float:
        """Answers a second, over the last few."""
        if len(self._answers_s) < 2:
            return 0.0
        return (len(self._answers_s) - 1) / (time.monotonic() - self._answers_s[0])

    @property
    def is_full(self) -> bool:
        """Whether it takes no more decisions."""
        return self.writer is not None and self.writer.bytes > MAX_EPISODE_BYTES

    @property
    def age_s(self) -> float:
        """Since it was last heard of."""
        return time.monotonic() - self.touched_s

    def arrive(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply | None:
        """The stored answer of a retry, else None.  Raises OutOfOrder, Superseded."""
        self.touched_s = time.monotonic()
        if self._answered is not None and request.decision == self._answered.decision:
            return self._answered
        due = self._answered.decision + 1 if self._answered is not None else 0
        if not due <= request.decision <= self._newest + 1:
            expected = f"{due}" if due > self._newest else f"{due} to {self._newest + 1}"
            raise OutOfOrder(f"expected decision {expected}, got {request.decision}", field="decision")
        if self.is_full:
            raise OutOfOrder(
                f"the episode is full, its file holds {MAX_EPISODE_BYTES >> 30} GiB: end it, and begin another",
                field="episode_id",
            )
        if self.flights and request.decision < self._newest:
            raise Superseded(f"superseded by decision {self._newest}", field="decision")
        self._newest = max(self._newest, request.decision)
        return None

    def answered(self, request: policy_pb2.ActRequest, reply: policy_pb2.ActReply) -> None:
        """Records an answer, with what was executed before it, and keeps it for a retry.  Raises OSError."""
        self.executed(request.executed)
        if self.writer is not None:
            self.writer.decision(
                episode_pb2.Decision(decision=request.decision, observation=request.observation, chunk=reply.chunk)
            )
        self.touched_s = time.monotonic()
        self._answers_s.append(self.touched_s)
        if self._watched:
            seen = request.observation
            images = {self._watched: seen.images[self._watched]}
            self.latest = episode_pb2.Observation(images=images, instruction=seen.instruction)
        self._answered = reply

    def executed(self, ticks: Iterable[episode_pb2.Tick]) -> None:
        """Records ticks.  Raises OSError."""
        # A client whose answer was lost reports its ticks again, with the next decision or the end, but no older ones.
        told = [((tick.decision, tick.index, tick.source), tick) for tick in ticks]
        new = [tick for key, tick in told if key not in self._ticks]
        self._ticks = {key for key, _ in told} or self._ticks
        self.moved += moves(new)
        if self.writer is not None:
            self.writer.executed(new)


class Episodes:
    """The open episodes, and enough about the closed ones to answer a retry.

    An episode under a lease tells the queue how it ended, and one of a session the session, once that is stored.
    per_client: how many one client may have open.
    watched: the image of open episodes that is held for whoever watches; none where nobody can.
    """

    def __init__(
        self,
        store: EpisodeStore | None,
        rollouts: RolloutQueue,
        sessions: Sessions | None = None,
        *,
        per_client: int = DEFAULT_CLIENT_EPISODES,
        watched: str = "",
    ):
        self.ended: Counter[int] = Counter()
        """How many have ended, by outcome."""
        self._store = store
        self._rollouts = rollouts
        self._sessions = sessions
        self._per_client, self._watched = per_client, watched
        self._open: dict[str, Episode] = {}
        self._closed: OrderedDict[str, int | Callable[[], Refused]] = OrderedDict()
        """The sequence number, 0 when it is not stored; how its client is refused when that did not end it."""
        self._replies: OrderedDict[str, policy_pb2.StartEpisodeReply] = OrderedDict()

    @property
    def stores(self) -> bool:
        return self._store is not None

    def at_work(self) -> int:
        """How many episodes were heard of lately.  May be called from any thread."""
        since_s = time.monotonic() - AT_WORK_S
        return sum(episode.touched_s >= since_s for episode in list(self._open.values()))

    def start(
        self, request: policy_pb2.StartEpisodeRequest, make: MakeStart, *, client: str = ""
    ) -> policy_pb2.StartEpisodeReply:
        """Opens an episode, once per request id.

        Raises OutOfOrder for a lease that is not held, Overloaded when it could not be stored or the client has too
        many open, and what make raises.
        """
        if request.request_id and request.request_id in self._replies:
            return self._replies[request.request_id]
        if sum(episode.client == client for episode in self._open.values()) >= self._per_client:
            raise Overloaded(
                f"this client has {self._per_client} episodes open, and may no more", retry_after_ms=RETRY_SOON_MS
            )
        lease = self._lease(request.lease_id)
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        try:
            start = make(name, request, lease.rollout if lease is not None else None)
        except UnknownVersion as refused:
            if lease is not None:  # its weights are gone for the next worker too
                self._rollouts.fail(lease, str(refused))
            raise
        writer = self._store.open(start) if self._store is not None else None
        if self._sessions is not None and start.session_id:
            self._sessions.begin(start)
        self._open[start.episode_id] = Episode(start, writer, lease, client=client, watched=self._watched)
        reply = policy_pb2.StartEpisodeReply(episode_id=start.episode_id, version=start.version, seed=start.seed)
        if request.request_id:
            _remember(self._replies, request.request_id, reply)
        return reply

    def unstart(self, request_id: str) -> None:
        """The episode of that request is none that can be played: a repeated start opens another."""
        self._replies.pop(request_id, None)

    def is_open(self, episode_id: str) -> bool:
        """Whether its decisions are taken."""
        episode = self._open.get(episode_id)
        return episode is not None and episode.closing is None

    def find(self, episode_id: str) -> Episode:
        """An open episode.  Raises OutOfOrder for a closed and for an unknown one, EpisodeLost."""
        if self.is_open(episode_id):
            return self._open[episode_id]
        if episode_id not in self._open:
            self.ended_as(episode_id)  # raises, unless its client ended it
        raise OutOfOrder(f"episode {episode_id!r} is closed", field="episode_id")

    def closing(self, episode_id: str) -> asyncio.Task[None] | None:
        """The closing under way of an episode."""
        episode = self._open.get(episode_id)
        return episode.closing if episode is not None else None

    def ended_as(self, episode_id: str, outcome: int = episode_pb2.OUTCOME_ERROR) -> int:
        """What an end with this outcome is told of an episode that is closed: its number, 0 when it is not stored.

        Raises OutOfOrder for one that the server closed and for an unknown one, EpisodeLost.
        """
        closed = self._closed.get(episode_id)
        if callable(closed):
            raise closed()
        if closed is not None:
            return closed
        stored = self._store.find(episode_id) if self._store is not None else None
        if stored is None:
            raise OutOfOrder(f"there is no episode {episode_id!r} on this server", field="episode_id")
        if stored.error and outcome != episode_pb2.OUTCOME_ERROR:  # who closed it is not known any more
            raise OutOfOrder(f"episode {episode_id!r} is stored as an error", field="episode_id")
        return stored.sequence

    def idle(self, limit_s: float) -> list[Episode]:
        """The open episodes that were silent for longer than limit_s."""
        since_s = time.monotonic() - limit_s
        return [e for e in self.open if not (e.closing or e.flights or e.ends) and e.touched_s < since_s]

    @property
    def open(self) -> list[Episode]:
        """All that are not closed yet."""
        return list(self._open.values())

    async def close(
        self,
        episode: Episode,
        end: episode_pb2.EpisodeEnd,
        ticks: Iterable[episode_pb2.Tick],
        *,
        by: EndedBy = "client",
    ) -> None:
        """Ends an episode.  Raises EpisodeLost when it cannot be stored."""
        episode_id = episode.start.episode_id
        if episode_id not in self._open:  # a decision that was under way has lost it
            self.ended_as(episode_id)
        # What the server ended tells a session nothing, unless its version may have brought a robot to silence.
        silenced = by == "silence" and episode.decisions > 0 and episode.lease is None
        tells = self._claim_rollout(episode, end) and (by == "client" or silenced)
        sequence = 0
        try:
            episode.executed(ticks)
            if self._store is not None and episode.writer is not None:
                sequence = await asyncio.to_thread(self._finish, self._store, episode, end, tells)
        except Exception as error:  # whatever it was, the file is not whole
            raise await self.lose(episode, error) from error
        self.ended[end.outcome] += 1
        if episode.lease is not None and end.outcome == episode_pb2.OUTCOME_ERROR:
            self._rollouts.fail(episode.lease, end.message)
        elif episode.lease is not None:
            self._rollouts.complete(episode.lease)
        refusal = f"the server has closed episode {episode_id!r} as an error: {end.message}"
        self._forget(
            episode, functools.partial(OutOfOrder, refusal, field="episode_id") if by != "client" else sequence
        )
        log.info("episode ended", extra=_record(episode, end) | {"sequence": sequence})

    async def lose(self, episode: Episode, error: Exception) -> EpisodeLost:
        """Closes an episode whose file takes no more records: it will never be whole."""
        foreseen = isinstance(error, OSError)
        why = error.strerror if foreseen else "the server failed, and its log says why"
        log.error(
            "episode %s is lost: its file takes no more records: %s",
            episode.start.episode_id,
            why,
            exc_info=None if foreseen else error,
        )
        writer, episode.writer = episode.writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # it is in the way of nobody, and the next server sets it aside
                writer.discard()
        self.ended[episode_pb2.OUTCOME_ERROR] += 1
        lost = functools.partial(EpisodeLost, f"the episode could not be stored and is lost: {why}", field="episode_id")
        if episode.lease is not None:
            self._rollouts.fail(episode.lease, str(lost()))
        self._forget(episode, lost)
        if self._sessions is not None and episode.start.session_id:
            await asyncio.to_thread(self._sessions.leave_out, episode.start)
        return lost()

    def _finish(self, store: EpisodeStore, episode: Episode, end: episode_pb2.EpisodeEnd, tells: bool) -> int:
        """Stores an episode, then counts it in its session if it tells something of its version; gives its number.

        Raises OSError.
        """
        assert episode.writer is not None
        sequence = store.finish(episode.writer, end)
        if self._sessions is not None and episode.start.session_id:
            if tells:
                self._sessions.end(episode.start, end.outcome, episode.moved)
            else:
                self._sessions.leave_out(episode.start)
        return sequence

    def _lease(self, lease_id: str) -> Lease | None:
        lease = self._rollouts.find(lease_id)
        if lease_id and lease is None:
            raise OutOfOrder(f"lease {lease_id!r} is not held: it was lost, or never given", field="lease_id")
        return lease

    def _claim_rollout(self, episode: Episode, end: episode_pb2.EpisodeEnd) -> bool:
        """False, and it ends as an error, for an episode that ended well when its rollout had ended without it."""
        if episode.lease is None or end.outcome == episode_pb2.OUTCOME_ERROR or self._rollouts.claim(episode.lease):
            return True
        rollout_id = episode.lease.rollout.rollout_id
        end.outcome = episode_pb2.OUTCOME_ERROR
        end.message = f"not counted: rollout {rollout_id!r} was completed by another episode, set aside or cancelled"
        return False

    def _forget(self, episode: Episode, closed: int | Callable[[], Refused]) -> None:
        self._open.pop(episode.start.episode_id, None)
        _remember(self._closed, episode.start.episode_id, closed)


def word(enum: Any, code: int) -> str:
    """A value of an enum in a word, "success" for OUTCOME_SUCCESS; "unknown" for what this version does not know."""
    return enum.Name(code).partition("_")[2].lower() if code in enum.values() else "unknown"


def _record(episode: Episode, end: episode_pb2.EpisodeEnd) -> dict[str, object]:
    """What the log keeps of an episode."""
    start, (arm, client) = episode.start, episode.robot
    return {
        "episode": start.episode_id,
        "arm": arm,
        "client": client,
        "task": start.task,
        "version": start.version,
        "outcome": word(episode_pb2.Outcome, end.outcome),
        "decisions": episode.decisions,
        "seconds": round((end.ended_unix_ns - start.started_unix_ns) / 1e9, 3),
        "why": end.message,
    }


def _remember(memory: OrderedDict, key: str, value: object) -> None:
    memory[key] = value
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
