"""Answers of K actions -> one action per tick, and when the next answer is wanted.

An action's index counts the actions applied since its observation was taken: a chunk that arrives while an older one is
still being executed is entered where the arm has got to.  Asked only when the older one is exhausted (ahead_ticks = 0),
nothing is applied while the arm waits, and every chunk is entered at its first action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from robot_client.answer import Answer
from robot_client.errors import BadAnswer

Overlap = Literal["in_order", "latest", "blend"]
"""Where two chunks have an action for the same tick: the older one's, the newer one's, or a mean of all of them."""
BLEND_DECAY = 0.01
"""Weights of a mean: exp(-0.01 i), i = 0 for the oldest (temporal ensembling; Zhao et al., 2023, section IV)."""
WARM_UP = 1
"""So many first answers of an episode are not counted as latency: connections and kernels warm up in them."""
REMEMBERED = 16


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The action that is due now."""

    decision: int
    index: int
    """Of the newest chunk that has a part in it."""
    action_A: np.ndarray
    capture_time_ns: int
    """Of the observation it answers; of the oldest one, where several have a part in it."""
    blended: bool = False
    """A mean of several chunks."""


class Chunks:
    """The chunks being executed.

    chunk_length: K of the policy.
    ahead_ticks: ask when so many actions remain; 0 asks when the chunk is exhausted.  May be changed on the way.
    replan_after: execute only the first so many actions of each chunk; 0 executes all.
    """

    def __init__(self, *, chunk_length: int, ahead_ticks: int = 0, replan_after: int = 0, overlap: Overlap = "latest"):
        if not 0 <= replan_after <= chunk_length:
            raise ValueError(f"replan_after must be in [0, {chunk_length}] (the chunk length), got {replan_after}")
        self.horizon = replan_after or chunk_length
        if not 0 <= ahead_ticks < self.horizon:
            raise ValueError(
                f"ahead_ticks must be in [0, {self.horizon - 1}] where {self.horizon} actions of a chunk are executed, "
                f"got {ahead_ticks}"
            )
        self.ahead_ticks = ahead_ticks
        self._overlap = overlap
        self._entered: list[_Entered] = []
        self._now = _Moment(ticks=0, applied=0, taken=0)
        self._latest, self._latest_since = 0, self._now
        self._looks: dict[int, _Moment] = {}

    @property
    def wants_observation(self) -> bool:
        """True when the next decision is due."""
        remaining = self.horizon - self._index(self._entered[-1]) if self._entered else 0
        return remaining <= self.ahead_ticks

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
        """Takes in a new chunk, to be followed unless somebody else has moved the arm since its observation.

        Raises BadAnswer when it answers an observation that was never sent.
        """
        if answer.capture_time_ns not in self._looks:
            raise BadAnswer(
                f"must echo one of the observations sent, {sorted(self._looks)}, got {answer.capture_time_ns}",
                field="capture_time_ns",
            )
        entered = _Entered(answer=answer, at=self._looks[answer.capture_time_ns])
        if entered.at.taken == self._now.taken:
            self._entered = [entered] if self._overlap == "latest" else [*self._live, entered]
        if answer.decision > self._latest:
            self._latest, self._latest_since = answer.decision, next(iter(self._looks.values()))
        self._looks.clear()

    def next(self) -> Planned | None:
        """The action that is due; None when the chunks are exhausted, or there is none."""
        live = self._live
        if not live:
            return None
        parts = live[:1] if self._overlap == "in_order" else live
        newest = parts[-1]
        return Planned(
            decision=newest.answer.decision,
            index=self._index(newest),
            action_A=self._mean_A(parts),
            capture_time_ns=min(part.answer.capture_time_ns for part in parts),
            blended=len(parts) > 1,
        )

    def applied(self) -> None:
        """The action that was due has been executed."""
        self._now = replace(self._now, ticks=self._now.ticks + 1, applied=self._now.applied + 1)

    def held(self) -> None:
        """The policy did not act for a tick: the chunks are forgotten, for nobody vouches for them any more."""
        self._now = replace(self._now, ticks=self._now.ticks + 1)
        self._entered = []

    def taken_over(self) -> None:
        """Somebody else moved the arm for a tick: the answer to what was seen before it is not followed either."""
        self._now = replace(self._now, ticks=self._now.ticks + 1, taken=self._now.taken + 1)
        self._entered = []

    @property
    def _live(self) -> list[_Entered]:
        """Those with an action for this tick, the oldest first."""
        return [entered for entered in self._entered if self._index(entered) < self.horizon]

    def _index(self, entered: _Entered) -> int:
        return self._now.applied - entered.at.applied

    def _mean_A(self, parts: Sequence[_Entered]) -> np.ndarray:
        if len(parts) == 1:
            return parts[0].answer.actions_KA[self._index(parts[0])]
        weights_P = np.exp(-BLEND_DECAY * np.arange(len(parts)))
        actions_PA = np.stack([part.answer.actions_KA[self._index(part)] for part in parts])
        return (weights_P @ actions_PA / weights_P.sum()).astype(np.float32)


def ticks_ahead(answer_s: Sequence[float], tick_s: float, *, most: int) -> int:
    """How many ticks before its chunk is exhausted a decision must be asked for, to be answered in time.

    answer_s: what answers took so far (s); the slowest of the latest counts, the first of an episode do not.
    """
    latest = answer_s[WARM_UP:][-REMEMBERED:]
    return min(most, math.ceil(max(latest) / tick_s)) if latest else 0


@dataclass(frozen=True, kw_only=True)
class _Entered:
    """A chunk that has been taken in."""

    answer: Answer
    at: _Moment
    """When its observation was taken."""


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """Since the episode began."""

    ticks: int
    """Actions, whoever's, and holds."""
    applied: int
    """The policy's actions."""
    taken: int
    """Somebody else's."""
