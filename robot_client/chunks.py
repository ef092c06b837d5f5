"""Answers of K actions -> one action per tick, and when the next answer is wanted.

An action's index counts the actions applied since its observation was taken: a chunk that arrives while an older one is
still being executed is entered where the arm has got to.  In order (ahead_ticks = 0) nothing is applied while the arm
waits, so every chunk is entered at its first action.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robot_client.answer import Answer
from robot_client.errors import BadAnswer


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The action that is due now."""

    decision: int
    index: int
    action_A: np.ndarray
    capture_time_ns: int
    """Of the observation it answers."""


class Chunks:
    """The chunk being executed.

    chunk_length: K of the policy.
    ahead_ticks: ask when so many actions remain; 0 asks when the chunk is exhausted.
    replan_after: execute only the first so many actions of each chunk; 0 executes all.
    """

    def __init__(self, *, chunk_length: int, ahead_ticks: int = 0, replan_after: int = 0):
        if not 0 <= replan_after <= chunk_length:
            raise ValueError(f"replan_after must be in [0, {chunk_length}] (the chunk length), got {replan_after}")
        self.horizon = replan_after or chunk_length
        if not 0 <= ahead_ticks < self.horizon:
            raise ValueError(
                f"ahead_ticks must be in [0, {self.horizon - 1}] where {self.horizon} actions of a chunk are executed, "
                f"got {ahead_ticks}"
            )
        self.ahead_ticks = ahead_ticks
        self._answer: Answer | None = None
        self._now = _Moment(ticks=0, applied=0)
        self._entered = self._now
        self._latest, self._latest_since = 0, self._now
        self._looks: dict[int, _Moment] = {}

    @property
    def wants_observation(self) -> bool:
        """True when the next decision is due."""
        return self._remaining <= self.ahead_ticks

    @property
    def since_decision(self) -> tuple[int, int]:
        """The latest decision that was answered, and the number of ticks since it was first asked for.

        Before the first answer: 0, and the ticks since the episode began.  No two holds have the same pair.
        """
        return self._latest, self._now.ticks - self._latest_since.ticks

    def looked(self, capture_time_ns: int) -> None:
        """An observation has been sent that was captured now."""
        self._looks[capture_time_ns] = self._now

    def adopt(self, answer: Answer) -> None:
        """Goes over to a new chunk.  Raises BadAnswer when it answers an observation that was never sent."""
        if answer.capture_time_ns not in self._looks:
            raise BadAnswer(
                f"must echo one of the observations sent, {sorted(self._looks)}, got {answer.capture_time_ns}",
                field="capture_time_ns",
            )
        self._answer, self._entered = answer, self._looks[answer.capture_time_ns]
        if answer.decision > self._latest:
            self._latest, self._latest_since = answer.decision, next(iter(self._looks.values()))
        self._looks.clear()

    def next(self) -> Planned | None:
        """The action that is due; None when the chunk is exhausted, or there is none."""
        if self._answer is None or self._remaining == 0:
            return None
        return Planned(
            decision=self._answer.decision,
            index=self._index,
            action_A=self._answer.actions_KA[self._index],
            capture_time_ns=self._answer.capture_time_ns,
        )

    def applied(self) -> None:
        """The action that was due has been executed."""
        self._now = _Moment(ticks=self._now.ticks + 1, applied=self._now.applied + 1)

    def held(self) -> None:
        """The arm held for a tick: the rest of the chunk is forgotten, for nobody vouches for it any more."""
        self._now = _Moment(ticks=self._now.ticks + 1, applied=self._now.applied)
        self._answer = None

    @property
    def _index(self) -> int:
        return self._now.applied - self._entered.applied

    @property
    def _remaining(self) -> int:
        return 0 if self._answer is None else max(0, self.horizon - self._index)


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """Since the episode began."""

    ticks: int
    """Actions and holds."""
    applied: int
    """Actions."""
