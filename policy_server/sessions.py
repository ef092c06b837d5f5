"""The sessions of a server, and their logs:

    FOLDER/SESSION.jsonl    the charter in its first line, then a line for each event (policy_server/session.py)

An event is applied once it is safely in the log, so that what a restart finds is what was acknowledged.  An episode
that a kill left stored but not counted is counted by the next server, in its turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart, OutOfOrder, Overloaded, UnknownSession
from policy_server.gate import Trial
from policy_server.refusals import disk
from policy_server.session import Begun, By, Charter, Event, Session, State, Turns, What, moves, trial_of
from protos import episode_pb2
from protos.episode_file import DamagedEpisode, Episode, sync, write_whole

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
MOST_SESSIONS = 64
"""So many may be going on: each has up to two adapters in memory."""
CROWDED_RETRY_MS = 10_000
DEFAULT_EPISODE_S = 1800.0
LOG = "the session log"
Control = Literal["promote", "roll_back", "pause", "resume", "stop"]
CONTROLS: tuple[Control, ...] = get_args(Control)
FROM: dict[str, tuple[State, ...]] = {"pause": ("running",), "resume": ("paused",), "stop": ("running", "paused")}
"""In which states each can be said."""
NO_SESSIONS = "this server has no sessions: start it with --episodes DIR and --admin-port PORT"


class Sessions:
    """Thread-safe.  What changes a session waits for the disk, what only looks at it does not.

    store: where the robots' episodes lie.  draw() gives numbers that are uniform in [0, 1).
    Raises CannotStart when the folder cannot be used.
    """

    def __init__(self, folder: Path, store: EpisodeStore, *, draw: Callable[[], float] = random.random):
        self._folder, self._store, self._draw = folder, store, draw
        self._writing = threading.Lock()  # whoever changes anything has it
        self._lock = threading.Lock()  # and this one just for the change, as whoever looks does
        self._sessions: dict[str, Session] = {}
        self._turns: dict[str, Turns] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [session for path in folder.glob(f"*{SUFFIX}") if (session := _read(path)) is not None]
        except OSError as error:
            raise CannotStart(f"the sessions in {str(folder)!r} cannot be read: {error}") from error
        for session in sorted(found, key=lambda session: session.charter.started_unix_ns):
            self._add(session)
            try:
                self._catch_up(session)
            except OSError as error:
                raise CannotStart(
                    f"the episodes of session {session.charter.session_id!r} cannot be read: {error}"
                ) from error

    @property
    def ids(self) -> list[str]:
        """In the order in which they were started."""
        return list(self._sessions)

    @contextlib.contextmanager
    def read(self, session_id: str) -> Iterator[Session]:
        """The session, which does not change in the block.  Raises UnknownSession."""
        with self._lock:
            yield self._find(session_id)

    def check(self, session_id: str, *, field: str) -> None:
        """Raises UnknownSession."""
        self._find(session_id, field=field)

    def open_episodes(self, session_id: str) -> int:
        """How many of its episodes are open."""
        with self._lock:
            return self._turns[session_id].open

    def served(self) -> set[int]:
        """The versions that the next episodes of sessions may get."""
        with self._lock:
            return {version for session in self._sessions.values() for version in session.served}

    def versions(self) -> set[int]:
        """Those of sessions that a person may want back."""
        with self._lock:
            return {version for session in self._sessions.values() for version in session.versions}

    def start(self, charter: Charter) -> None:
        """Once: again with the same charter, but for the time, it does nothing.

        Raises OutOfOrder when there is another session of that id, Overloaded when there are too many or the disk
        refuses.
        """
        with self._writing:
            there = self._sessions.get(charter.session_id)
            if there is not None:
                if asdict(charter) | {"started_unix_ns": 0} != asdict(there.charter) | {"started_unix_ns": 0}:
                    raise OutOfOrder("there is another session of that id", field="session_id")
                return
            if sum(session.state != "stopped" for session in self._sessions.values()) >= MOST_SESSIONS:
                raise Overloaded(f"{MOST_SESSIONS} sessions are going on, the most", retry_after_ms=CROWDED_RETRY_MS)
            with disk(LOG):
                self._path(charter.session_id).unlink(missing_ok=True)  # of a start that the disk refused
                self._write(charter.session_id, asdict(charter))
                sync(self._folder)
            self._add(Session(charter))
        log.info("session %s is started from version %d", charter.session_id, charter.base)

    def choose(self, session_id: str) -> tuple[Charter, int]:
        """How its next episode is sampled, and its version.  Raises UnknownSession, OutOfOrder when it is over."""
        with self.read(session_id) as session:
            if session.state == "stopped":
                raise OutOfOrder(
                    f"session {session_id!r} is over: its version {session.live} can be asked for", field="session_id"
                )
            return session.charter, session.choose(self._draw())

    def begin(self, start: episode_pb2.EpisodeStart) -> None:
        """An episode is open with what choose() gave."""
        with self.read(start.session_id) as session:
            begun = Begun(
                episode_id=start.episode_id,
                version=start.version,
                candidate=session.candidate,
                began_s=time.monotonic(),
            )
            self._turns[start.session_id].begin(begun)

    def end(self, start: episode_pb2.EpisodeStart, outcome: int, moved: Counter[str]) -> None:
        """It is over, and stored; moved: moves() of its ticks.  Those whose turn has come are counted and judged."""
        self._end(start, trial_of(outcome, moved))

    def leave_out(self, start: episode_pb2.EpisodeStart) -> None:
        """It is over, and says nothing of its version: the server stopped, or could not store it."""
        self._end(start, None)

    def give_up(self, longest_s: float) -> None:
        """Episodes that are under way for longer are counted as errors, and later ones wait for them no more."""
        since_s = time.monotonic() - longest_s
        with self._writing:
            for session_id in self.ids:
                with self._lock:
                    self._turns[session_id].give_up(since_s)
                self._count_due(session_id)

    def _end(self, start: episode_pb2.EpisodeStart, trial: Trial | None) -> None:
        with self._writing:
            with self._lock:
                self._turns[start.session_id].end(start.episode_id, trial)
            self._count_due(start.session_id)

    def _count_due(self, session_id: str) -> None:
        """Counts those whose turn has come, as far as the disk lets it."""
        session, turns = self._sessions[session_id], self._turns[session_id]
        while True:
            with self._lock:
                due = turns.due()
            if due is None or not self._count(session, *due):
                return
            with self._lock:
                turns.take()

    def check_offer(self, session_id: str, version: int) -> int | None:
        """The live version that the offered one is compared with; None when it is on trial already.

        Raises UnknownSession, OutOfOrder; also after a verdict: the gate's errors are those of one trial.
        """
        with self.read(session_id) as session:
            if session.state != "running":
                raise OutOfOrder(f"session {session_id!r} is {session.state}: nothing is offered", field="session_id")
            if session.candidate == version:
                return None
            if session.candidate is not None:
                raise OutOfOrder(f"version {session.candidate} is on trial: wait for its verdict", field="version")
            if version in session.versions:
                raise OutOfOrder(f"version {version} is, or was, live in this session", field="version")
            if any(event.version == version and event.by == "gate" for event in session.log):
                raise OutOfOrder(f"version {version} has had its trial in this session", field="version")
            return session.live

    def offer(self, session_id: str, version: int, *, live: int, accepted: bool, reason: str) -> None:
        """What became of an offer: the version is on trial, or was refused.

        live: what it was compared with.  Raises as check_offer(), OutOfOrder when another is live now, Overloaded.
        """
        with self._writing:
            live_now = self.check_offer(session_id, version)
            if live_now is None:
                return
            if live_now != live:
                raise OutOfOrder(f"it was compared with version {live}, but version {live_now} is live now: try again")
            self._happen(self._sessions[session_id], "offer" if accepted else "refuse", "trainer", version, reason)

    def control(self, session_id: str, control: Control, note: str, *, version: int | None = None) -> None:
        """A person's word, and why.  What is on trial is withdrawn by pause and stop.

        version: the one that a promotion, or a roll back, is to befall; None: whichever it is.
        Raises UnknownSession, OutOfOrder when there is nothing to do it to, or another version, Overloaded.
        """
        with self._writing:
            session = self._find(session_id)
            if control == "promote":
                if session.candidate is None:
                    raise OutOfOrder(f"nothing is on trial in session {session_id!r}", field="control")
                _check_meant(version, session.candidate, "on trial")
                self._happen(session, "promote", "person", session.candidate, note)
            elif control == "roll_back":
                self._go_back(session, note, version)
            else:
                self._set_state(session, control, note)

    def _go_back(self, session: Session, note: str, version: int | None) -> None:
        """Drops the candidate, or goes back to the version before."""
        if session.candidate is not None:
            _check_meant(version, session.candidate, "on trial")
            self._happen(session, "roll back", "person", session.candidate, note)
        elif session.state == "stopped" or not session.past:
            why = "is over" if session.state == "stopped" else "has nothing to go back to"
            raise OutOfOrder(f"session {session.charter.session_id!r} {why}", field="control")
        else:
            _check_meant(version, session.live, "live")
            self._happen(session, "revert", "person", session.past[-1], note)

    def _set_state(self, session: Session, what: Literal["pause", "resume", "stop"], note: str) -> None:
        if session.state not in FROM[what]:
            raise OutOfOrder(f"session {session.charter.session_id!r} is {session.state}", field="control")
        if session.candidate is not None:
            self._happen(session, "withdrawn", "person", session.candidate, note)
        self._happen(session, what, "person", session.live, note)
        if what == "stop":
            # Its trainer reads under its name, and may never come back.
            with contextlib.suppress(Overloaded):  # then what it has yet to read stays
                self._store.leave(session.charter.session_id)

    def _find(self, session_id: str, *, field: str = "session_id") -> Session:
        if session_id not in self._sessions:
            raise UnknownSession(f"there is no session {session_id!r} on this server", field=field)
        return self._sessions[session_id]

    def _add(self, session: Session) -> None:
        with self._lock:
            self._sessions[session.charter.session_id] = session
            self._turns[session.charter.session_id] = Turns()

    def _count(self, session: Session, begun: Begun, trial: Trial) -> bool:
        """Counts an episode, and does what the gate says then; False when the disk refuses."""
        on_trial = session.candidate is not None and begun.candidate == session.candidate
        on_trial &= begun.version in session.served  # it may have been chosen before the candidate was offered
        try:
            self._happen(
                session, "episode", "robot", begun.version, episode_id=begun.episode_id, trial=trial, on_trial=on_trial
            )
        except Overloaded as error:  # it is stored, and counted later, if need be by the next server
            log.error("episode %s is not counted in its session yet: %s", begun.episode_id, error)
            return False
        if on_trial:
            self._judge(session)
        return True

    def _judge(self, session: Session) -> None:
        """Says the verdict that is due, if one is."""
        standing = session.standing
        if standing is None or standing.verdict == "open":
            return
        assert session.candidate is not None
        try:
            self._happen(session, standing.verdict, "gate", session.candidate, standing.reason)
        except Overloaded as error:  # it is given after the next episode, or by the next server
            log.error("a verdict of session %s waits: %s", session.charter.session_id, error)

    def _happen(
        self,
        session: Session,
        what: What,
        by: By,
        version: int,
        reason: str = "",
        *,
        episode_id: str = "",
        trial: Trial | None = None,
        on_trial: bool = False,
    ) -> None:
        """An event, first on disk.  Raises Overloaded when that refuses."""
        event = Event(
            what=what,
            unix_ns=time.time_ns(),
            by=by,
            version=version,
            reason=reason,
            episode_id=episode_id,
            trial=trial,
            on_trial=on_trial,
        )
        with disk(LOG):
            self._write(session.charter.session_id, event.line)
        with self._lock:
            session.apply(event)
        if what != "episode":
            name = session.charter.session_id
            log.info("session %s: %s version %d: %s", name, what, version, reason, extra={"session": name})

    def _path(self, session_id: str) -> Path:
        return self._folder / f"{session_id}{SUFFIX}"

    def _write(self, session_id: str, line: dict) -> None:
        with self._path(session_id).open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                write_whole(file, json.dumps(line).encode() + b"\n")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)  # or the next line would go on with half of this one
                raise

    def _catch_up(self, session: Session) -> None:
        """Counts what was stored and not counted yet, and says the verdict that was due."""
        with self._writing:
            self._judge(session)
            for episode in sorted(self._uncounted(session), key=lambda episode: episode.start.started_unix_ns):
                offered = max((e.unix_ns for e in session.log if e.what == "offer"), default=0)
                since = episode.start.started_unix_ns > offered
                begun = Begun(
                    episode_id=episode.start.episode_id,
                    version=episode.start.version,
                    candidate=session.candidate if since else None,
                )
                self._count(session, begun, trial_of(episode.end.outcome, moves(episode.ticks)))

    def _uncounted(self, session: Session) -> Iterator[Episode]:
        for stored in self._store.after(0):
            if stored.session_id == session.charter.session_id and stored.episode_id not in session.episodes:
                with contextlib.suppress(DamagedEpisode):  # the store says so
                    # Whether the server ended it as an error is not known any more.
                    records = [] if stored.error else list(self._store.records(stored))
                    # An older one is of a session of that name that is forgotten.
                    if records and records[0].start.started_unix_ns >= session.charter.started_unix_ns:
                        yield Episode.of(records, stored.path.name)


def _check_meant(meant: int | None, version: int, role: str) -> None:
    """Raises OutOfOrder where a person means another version than the one it would befall."""
    if meant not in (None, version):
        raise OutOfOrder(f"version {meant} is meant, but version {version} is {role} now", field="version")


def _read(path: Path) -> Session | None:
    """None where not even the charter is whole: no such session was acknowledged, and its log is deleted.

    Raises OSError, CannotStart for what no server has written.
    """
    whole, ended, torn = path.read_bytes().rpartition(b"\n")
    if not ended:
        log.warning("session log %s has no whole line: deleted", path.name)
        path.unlink()
        return None
    if torn:  # a kill came while it was written: it was never acknowledged
        log.warning("the last line of session log %s is not whole: dropped", path.name)
        os.truncate(path, len(whole) + 1)
    session = None
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            said = json.loads(line)
            if session is None:
                session = Session(Charter.of(said))
            else:
                session.apply(Event.of(said))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CannotStart(
                f"line {number} of the session log {str(path)!r} is damaged ({error!r}): mend it, or move the file"
                " elsewhere to go on without that session"
            ) from error
    return session
