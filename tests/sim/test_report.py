"""Counts, intervals and the files of a report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from sim.report import EpisodeRecord, Rate, Report, by_task, outcomes_digest, rate_of


def episode(task: int, state: int, outcome: str = "success", ticks: int = 80) -> EpisodeRecord:
    return EpisodeRecord(task=f"libero_object/{task}", initial_state=str(state), outcome=outcome, ticks=ticks)


def report(episodes: list[EpisodeRecord], **changes) -> Report:
    fields = {
        "suite": "libero_object",
        "protocol": "held_out",
        "states_note": "states 40-49",
        "instructions": {"libero_object/0": "pick up the alphabet soup and place it in the basket"},
        "model": "nano",
        "version": 3,
        "base_fingerprint": "ab" * 32,
        "chunk_length": 4,
        "replan_after": 0,
        "image_path": "libero",
        "unnorm_key": "libero",
        "assets": "LIBERO with stand-in visuals",
        "temperature": 0.0,
        "seed": 0,
        "processes": 2,
        "slots": 4,
        "setup_s": 5.0,
        "wall_s": 60.0,
        "planned": len(episodes),
        "episodes": tuple(episodes),
    }
    return Report(**{**fields, **changes})


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson (1927): (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z, p = 1.959963984540054, successes / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


@pytest.mark.parametrize(("successes", "n"), [(5, 10), (10, 10), (0, 10), (67, 100)])
def test_intervals_are_wilsons(successes, n):
    rate = Rate(successes=successes, failures=n - successes, errors=7)
    assert rate.interval == pytest.approx(wilson(successes, n), abs=1e-9)


def test_intervals_of_ten_states_are_as_wide_as_the_reference_says():
    assert [round(100 * bound) for bound in Rate(successes=5, failures=5, errors=0).interval] == [24, 76]
    assert [round(100 * bound) for bound in Rate(successes=10, failures=0, errors=0).interval] == [72, 100]


def test_an_error_is_neither_success_nor_failure():
    rate = rate_of([episode(0, 40), episode(0, 41, "failure"), episode(0, 42, "error"), episode(0, 43, "error")])
    assert (rate.successes, rate.failures, rate.errors, rate.n, rate.rate) == (1, 1, 2, 2, 0.5)


def test_only_errors_give_no_rate_and_no_certainty():
    rate = rate_of([episode(0, 40, "error")])
    assert math.isnan(rate.rate) and rate.interval == (0.0, 1.0)
    assert rate.as_json()["rate"] is None


def test_tasks_and_states_are_in_numerical_order():
    tasks = by_task([episode(10, 9), episode(2, 10), episode(2, 9)])
    assert list(tasks) == ["libero_object/2", "libero_object/10"]
    assert [item.initial_state for item in tasks["libero_object/2"]] == ["9", "10"]


def test_the_digest_knows_outcomes_and_not_their_order():
    first = [episode(0, 40), episode(1, 40, "failure", 280)]
    assert outcomes_digest(first) == outcomes_digest(first[::-1])
    assert outcomes_digest(first) != outcomes_digest([episode(0, 40), episode(1, 40, "failure", 279)])
    assert outcomes_digest(first) != outcomes_digest([episode(0, 40), episode(1, 40, "success", 280)])


def test_the_files_say_what_was_evaluated(tmp_path):
    found = report([episode(0, 40), episode(0, 41, "failure", 280), episode(1, 40, "error", 3)])
    found.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["assets"] == "LIBERO with stand-in visuals" and data["sampling"] == "greedy"
    sampled = replace(found, temperature=0.5, noise_correlation=0.9, seed=2)
    assert sampled.sampling == "sampled at temperature 0.5, noise correlated by 0.9, seed 2"
    assert (data["model"], data["version"], data["base_fingerprint"]) == ("nano", 3, "ab" * 32)
    assert data["overall"]["successes"] == 1 and data["overall"]["n"] == 2 and data["overall"]["errors"] == 1
    assert data["tasks"]["libero_object/0"]["states"] == {"40": "success", "41": "failure"}
    assert data["complete"] and len(data["episodes"]) == 3
    text = (tmp_path / "report.txt").read_text()
    assert "LIBERO with stand-in visuals" in text and "ERROR libero_object/1 state 40" in text
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_an_interrupted_report_says_so():
    assert not report([episode(0, 40)], planned=2).as_json()["complete"]
