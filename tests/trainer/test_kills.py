"""The short version of benchmarks/kills.py: three kills of an online run on robosuite's Lift."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kills import KillsConfig, compare, ended, planned, run_alone, run_killed


@pytest.mark.timeout(1800)  # a dozen processes are started, each in seconds on a quiet machine
def test_a_run_whose_processes_are_killed_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    config = KillsConfig(kills=3, iterations=2, rollouts=2, evaluate_every=2, pause_s=3.0)
    kills = run_killed(config, tmp_path / "killed")
    run_alone(config, tmp_path / "alone")
    assert [kill.victim for kill in kills] == [kill.victim for kill in planned(config)]
    assert {kill.victim for kill in kills} == {"trainer", "server", "one simulator"}
    assert not any(kill.orphans for kill in kills)
    found = compare(ended(tmp_path / "alone"), ended(tmp_path / "killed"))
    assert all(found["laws"].values()), found
