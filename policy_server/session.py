"""One session: a line of versions, and the trial of the next one.  What happened to it, in order, makes what it is.

An event is applied as it happens, and again when the session's log is read after a restart: nothing else is kept.

    episode           one is over, and is counted
    offer             a version is on trial
    refuse            one was not taken on trial
    promote           the candidate is live
    roll back, undecided, withdrawn      it is dropped; withdrawn: by a pause or the end of the session
    revert            the version that was live before is so again
    pause, resume, stop

The gate (policy_server/gate.py) is asked after every episode.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from policy_server.gate import Comparison, GateRule, Judgement, Tally, Trial, judge, takes_candidate
from protos import episode_pb2
from protos.episode_file import HELPERS

What = Literal[
    "episode", "offer", "refuse", "promote", "roll back", "undecided", "withdrawn", "revert", "pause", "resume", "stop"
]
By = Literal["robot", "trainer", "gate", "person"]
State = Literal["running", "paused", "stopped"]
DROPS: tuple[What, ...] = ("roll back", "undecided", "withdrawn")
STATES: dict[str, State] = {"pause": "paused", "resume": "running", "stop": "stopped"}


@dataclass(frozen=True, kw_only=True)
class Charter:
    """What a session was begun with."""

    session_id: str
    task: str
    base: int
    """the version it begins with"""
    temperature: float
    noise_correlation: float
    rule: GateRule
    started_unix_ns: int

    @classmethod
    def of(cls, said: dict[str, Any]) -> Charter:
        """What asdict() gave.  Raises TypeError, ValueError."""
        rule = said.pop("rule")
        return cls(**said, rule=GateRule(**rule))


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a session's log."""

    what: What
    unix_ns: int
    by: By
    version: int
    """that it befell; after a revert, the live one"""
    reason: str = ""
    episode_id: str = ""
    trial: Trial | None = None
    """what came of the episode"""
    on_trial: bool = False
    """chance chose its version: the live one, or the candidate that is on trial now"""

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"what must be one of {get_args(What)}, got {self.what!r}")
        if self.what == "episode" and self.trial is None:
            raise ValueError("an episode must have a trial")

    @property
    def line(self) -> dict[str, Any]:
        """As it is kept: without what is left at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def of(cls, line: dict[str, Any]) -> Event:
        """What line gave.  Raises TypeError, ValueError."""
        trial = line.pop("trial", None)
        return cls(**line, trial=None if trial is None else Trial(**trial))


class Session:
    """Of a charter and the events since.  Not thread-safe."""

    def __init__(self, charter: Charter):
        self.charter = charter
        self.live = charter.base
        self.candidate: int | None = None
        self.past: list[int] = []
        """live before, oldest first"""
        self.state: State = "running"
        self.log: list[Event] = []
        """without the episodes"""
        self.episodes: dict[str, Event] = {}
        """those that were counted, by their ids, in the order in which they began"""
        self.tallies: defaultdict[int, Tally] = defaultdict(Tally)
        """by version, of all its episodes"""
        self.trial = Comparison.under(charter.rule)
        """since the candidate was offered, of it and of the live version"""

    @property
    def versions(self) -> set[int]:
        """Those that a person may want back; when it is over, what it began with and what it led to."""
        if self.state == "stopped":
            return {self.charter.base, self.live}
        return {self.charter.base, *self.past, self.live, *self.served}

    @property
    def served(self) -> set[int]:
        """Those that the next episode may get; none when it is over."""
        if self.state == "stopped":
            return set()
        return {self.live} if self.candidate is None else {self.live, self.candidate}

    @property
    def standing(self) -> Judgement | None:
        """What the gate makes of the trial under way."""
        if self.candidate is None:
            return None
        return judge(self.charter.rule, self.trial)

    def choose(self, draw: float) -> int:
        """The version of the next episode; draw as in gate.takes_candidate()."""
        if self.candidate is not None and takes_candidate(self.charter.rule, draw):
            return self.candidate
        return self.live

    def apply(self, event: Event) -> None:
        """What it does to the session."""
        if event.what == "episode":
            self._count(event)
            return
        self.log.append(event)
        if event.what == "offer":
            self.candidate, self.trial = event.version, Comparison.under(self.charter.rule)
        elif event.what == "promote":
            self.past.append(self.live)
            self.live, self.candidate = event.version, None
        elif event.what in DROPS:
            self.candidate = None
        elif event.what == "revert":
            self.live = self.past.pop()
        elif event.what != "refuse":
            self.state = STATES[event.what]

    def _count(self, event: Event) -> None:
        assert event.trial is not None
        self.episodes[event.episode_id] = event
        self.tallies[event.version] = self.tallies[event.version].plus(event.trial)
        if event.on_trial:
            self.trial = self.trial.plus(event.trial, of_candidate=event.version == self.candidate)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An episode whose turn to be counted has not come."""

    episode_id: str
    version: int
    candidate: int | None
    """what was on trial when it began"""
    began_s: float = 0.0
    """on a clock that only goes forward"""


class Turns:
    """Episodes are counted in the order in which they began: a failure takes longer than a success."""

    def __init__(self) -> None:
        self._begun: dict[str, Begun] = {}
        self._ended: dict[str, Trial | None] = {}

    @property
    def open(self) -> int:
        """How many are not over."""
        return len(self._begun) - len(self._ended)

    def begin(self, episode: Begun) -> None:
        self._begun[episode.episode_id] = episode

    def end(self, episode_id: str, trial: Trial | None) -> None:
        """It is over, and may be no trial."""
        if episode_id in self._begun:
            self._ended[episode_id] = trial

    def give_up(self, since_s: float) -> None:
        """Those that began earlier and are not over have ended as errors."""
        for episode in self._begun.values():
            if episode.began_s < since_s and episode.episode_id not in self._ended:
                self._ended[episode.episode_id] = Trial(success=False, error=True, ticks=0)

    def due(self) -> tuple[Begun, Trial] | None:
        """The one whose turn to be counted has come, until take(); those that are no trial give up theirs."""
        while self._begun and (first := next(iter(self._begun))) in self._ended:
            if (trial := self._ended[first]) is not None:
                return self._begun[first], trial
            self._take(first)
        return None

    def take(self) -> None:
        """What is due has been counted."""
        self._take(next(iter(self._begun)))

    def _take(self, episode_id: str) -> None:
        del self._begun[episode_id], self._ended[episode_id]


def moves(ticks: Iterable[episode_pb2.Tick]) -> Counter[str]:
    """How many of them the policy moved the arm at, held it at, or was clipped at, and how many were others'."""
    return Counter(_move(tick) for tick in ticks)


def trial_of(outcome: int, moved: Counter[str]) -> Trial:
    """What the gate sees of an episode with these moves()."""
    return Trial(
        success=outcome == episode_pb2.OUTCOME_SUCCESS,
        error=outcome not in (episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE),
        intervened=moved["others"] > 0,
        ticks=moved.total() - moved["others"],
        holds=moved["held"],
        clips=moved["clipped"],
    )


def _move(tick: episode_pb2.Tick) -> str:
    if tick.source in HELPERS:
        return "others"
    if tick.source == episode_pb2.SOURCE_HOLD:
        return "held"
    return "clipped" if tick.reason else "moved"
