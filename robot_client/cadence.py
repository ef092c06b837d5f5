"""The rhythm of a control loop: absolute deadlines, so that lateness never adds up, and a report of the jitter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KEPT = 20_000
"""So many of the latest ticks are remembered one by one, however long a loop runs: 200 s at 100 Hz."""


@dataclass(frozen=True, kw_only=True)
class CadenceReport:
    """How well the loop kept its rate."""

    ticks: int
    rate_hz: float
    """Ticks over elapsed time."""
    late_p50_ms: float
    """How long after its deadline a tick began: median of the latest KEPT,"""
    late_p99_ms: float
    """99 % of them,"""
    late_max_ms: float
    """and the worst of all."""
    missed: int
    """Deadlines that passed while an earlier tick was still running; they are skipped, not caught up."""

    def __str__(self) -> str:
        return (
            f"{self.ticks} ticks at {self.rate_hz:.2f} Hz; a tick begins late by {self.late_p50_ms:.2f} ms (median), "
            f"{self.late_p99_ms:.2f} ms (99 %), {self.late_max_ms:.2f} ms (worst); {self.missed} deadlines missed"
        )


class Cadence:
    """Deadline n lies n periods after the construction.

    A tick that overruns is followed at once by the tick of the latest deadline that has passed; the earlier ones are
    missed.
    """

    def __init__(
        self,
        rate_hz: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._period_s = 1 / rate_hz
        self._clock = clock
        self._sleep = sleep
        self._began_s = self._now_s = clock()
        self._due = self._ticks = self._missed = 0
        self._late_s: deque[float] = deque(maxlen=KEPT)
        self._worst_s = 0.0

    def wait(self) -> None:
        """Sleeps until the next deadline; returns at once when it has passed already."""
        self._due += 1
        elapsed = (self._clock() - self._began_s) / self._period_s
        overrun = max(0, int(elapsed) - self._due)
        self._missed += overrun
        self._due += overrun
        deadline_s = self._began_s + self._due * self._period_s
        self._sleep(max(0.0, deadline_s - self._clock()))
        self._now_s = self._clock()
        self._late_s.append(self._now_s - deadline_s)
        self._ticks, self._worst_s = self._ticks + 1, max(self._worst_s, self._late_s[-1])

    def report(self) -> CadenceReport:
        late_ms = 1000 * np.array(self._late_s or [0.0])
        return CadenceReport(
            ticks=self._ticks,
            rate_hz=self._ticks / max(self._now_s - self._began_s, 1e-9),
            late_p50_ms=float(np.percentile(late_ms, 50)),
            late_p99_ms=float(np.percentile(late_ms, 99)),
            late_max_ms=1000 * self._worst_s,
            missed=self._missed,
        )
