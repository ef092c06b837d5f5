"""Deadlines are absolute: lateness is measured from them and never adds up."""

from __future__ import annotations

import pytest

from robot_client.cadence import KEPT, Cadence


class Clock:
    """Time that passes only in sleep() and in work()."""

    def __init__(self):
        self.now_s = 100.0
        self.oversleep_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.oversleep_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def begins_of(cadence: Cadence, clock: Clock, *work_s: float) -> list[float]:
    """When the tick after each piece of work begins, in seconds since the start."""
    begins = []
    for seconds in work_s:
        clock.work(seconds)
        cadence.wait()
        begins.append(round(clock.now_s - 100.0, 6))
    return begins


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cadence(clock):
    return Cadence(10, clock=clock, sleep=clock.sleep)


def test_ticks_begin_at_multiples_of_the_period_whatever_each_takes(cadence, clock):
    assert begins_of(cadence, clock, 0.01, 0.09, 0.0, 0.05) == [0.1, 0.2, 0.3, 0.4]
    report = cadence.report()
    assert (report.ticks, report.missed) == (4, 0)
    assert report.rate_hz == pytest.approx(10) and report.late_max_ms == pytest.approx(0, abs=1e-6)


def test_sleeping_too_long_does_not_add_up(cadence, clock):
    clock.oversleep_s = 0.02
    assert begins_of(cadence, clock, 0.0, 0.0, 0.0) == [0.12, 0.22, 0.32]
    assert cadence.report().late_p50_ms == pytest.approx(20)


def test_a_short_overrun_begins_the_next_tick_late_and_keeps_the_one_after(cadence, clock):
    assert begins_of(cadence, clock, 0.13, 0.0) == [0.13, 0.2]
    report = cadence.report()
    assert report.missed == 0 and report.late_max_ms == pytest.approx(30)


def test_deadlines_that_passed_during_a_long_overrun_are_skipped_and_counted(cadence, clock):
    assert begins_of(cadence, clock, 0.05, 0.35, 0.0, 0.0) == [0.1, 0.45, 0.5, 0.6]
    report = cadence.report()
    assert report.missed == 2  # 0.2 and 0.3; 0.4 is kept, late by 50 ms
    assert report.late_max_ms == pytest.approx(50) and report.ticks == 4


def test_a_loop_that_runs_for_days_remembers_its_latest_ticks_and_the_worst_of_all(cadence, clock):
    clock.oversleep_s = 0.02
    begins_of(cadence, clock, *[0.0] * 10)
    clock.oversleep_s = 0.0
    begins_of(cadence, clock, *[0.0] * KEPT)
    report = cadence.report()
    assert len(cadence._late_s) == KEPT and report.ticks == KEPT + 10
    assert report.late_max_ms == pytest.approx(20) and report.late_p99_ms == pytest.approx(0, abs=1e-3)
    assert report.rate_hz == pytest.approx(10)


def test_a_loop_that_never_ran_reports_nothing_late(cadence):
    assert cadence.report().ticks == 0 and cadence.report().late_max_ms == 0
