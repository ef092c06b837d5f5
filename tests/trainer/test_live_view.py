"""The live view says what the run told it; without a terminal the lines are those of old."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from rl_trainer.live_view import LiveView, duration, resident_bytes, seconds_left
from rl_trainer.observer import Printer
from tests.trainer.fake_curve import evaluation, finished, iteration

TASKS = {"suite/0": "lift the cube", "suite/1": "stack the cubes"}
BUDGET = {"iterations": 10, "minutes": None, "evaluate_every": 5}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def view(width: int = 100, height: int = 40, clock: Clock | None = None, **changes) -> LiveView:
    console = Console(file=io.StringIO(), width=width, height=height)
    settings = {**BUDGET, **changes}
    return LiveView("suite in runs/x", split="tune", console=console, clock=clock or Clock(), **settings)


def shown(live: LiveView, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.render())
    return console.file.getvalue()


def words(text: str, begins: str) -> list[str]:
    """Of the only line that begins so."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(begins)]
    return [word for word in line.split() if not set(word) <= set("━╸╺")]


def test_success_is_shown_by_task_as_it_comes_in_lately_and_greedy(capsys: pytest.CaptureFixture) -> None:
    live = view()
    live.on_start(TASKS, [], 0.0)
    live.on_evaluation(evaluation(0, {"suite/0": "sf", "suite/1": "ff"}), [])
    for step in range(1, 8):  # the first two are no longer recent
        live.on_iteration(iteration(step, {"suite/0": "ssf", "suite/1": "f"}))
    live.on_phase("collect", 4)
    for task, letter in [("suite/0", "s"), ("suite/1", "f"), ("suite/1", "e")]:
        live.on_rollout(finished(task, letter))
    live.close()
    text = shown(live)
    assert words(text, "suite/0") == ["suite/0", "1/1", "10/15", "67", "%", "1/2"]
    assert words(text, "suite/1") == ["suite/1", "0/2", "0/5", "0", "%", "0/2"]
    assert words(text, "all") == ["all", "1/3", "10/20", "50", "%", "1/4"]
    assert "3 of 4 rollouts" in text and "iteration 7 of 10" in text
    assert words(text, "last ") == ["last", "90.0", "10.0", "2.0", "50.0"]


def test_a_resumed_view_shows_what_one_that_was_never_interrupted_shows(capsys: pytest.CaptureFixture) -> None:
    rows = [evaluation(0, {"suite/0": "sf"}), *(iteration(step, {"suite/0": "ssf"}) for step in (1, 2))]
    whole, resumed = view(), view()
    whole.on_start(TASKS, [], 360.0)
    whole.on_evaluation(rows[0], [])
    whole.on_iteration(rows[1])
    whole.on_iteration(rows[2])
    resumed.on_start(TASKS, rows, 360.0)
    for live in (whole, resumed):
        live.close()
        live._memory, live._memory_s = 0, float("inf")
    assert shown(whole) == shown(resumed)


def test_of_more_tasks_than_lines_the_rest_is_counted() -> None:
    live = view(height=20)
    live.on_start({f"suite/{i}": "" for i in range(90)}, [], 0.0)
    live.close()
    text = shown(live)
    assert "suite/4" in text and "suite/5" not in text and "and 85 more" in text
    assert len(text.splitlines()) <= 20


def test_instructions_are_shown_where_there_is_room() -> None:
    for width, there in ((100, False), (140, True)):
        live = view(width=width)
        live.on_start(TASKS, [], 0.0)
        live.close()
        assert ("lift the cube" in shown(live, width)) is there


def test_the_time_left_counts_down_between_iterations() -> None:
    clock = Clock()
    live = view(clock=clock)
    live.on_start(TASKS, [iteration(1, {"suite/0": "s"})], 0.0)
    live.close()
    assert "left about 15 min" in shown(live)  # nine iterations of 102 s
    clock.now_s += 300
    assert "left about 10 min" in shown(live) and "elapsed 5 min" in shown(live)
    clock.now_s += 700
    assert "left this iteration" in shown(live)


@pytest.mark.parametrize(
    ("minutes", "seconds", "expected"),
    [
        (None, 0, 8 * 102 + 2 * 50),  # evaluations after 5 and 10 are still to come
        (60, 0, 8 * 102 + 2 * 50),
        (10, 240, 360),  # the clock is first
        (10, 700, 0),
    ],
)
def test_whichever_budget_ends_first_says_what_is_left(minutes: float, seconds: float, expected: float) -> None:
    rows = [
        evaluation(0, {"a/0": "s"}),
        iteration(1, {"a/0": "s"}, collect_s=80),
        iteration(2, {"a/0": "s"}, collect_s=100),
    ]
    settings = {**BUDGET, "minutes": minutes}
    assert seconds_left(rows, seconds=seconds, **settings) == pytest.approx(expected)


def test_before_the_first_iteration_only_the_clock_tells_what_is_left() -> None:
    assert seconds_left([], seconds=30, **BUDGET) is None
    assert seconds_left([], seconds=30, iterations=10, minutes=1, evaluate_every=0) == 30


def test_memory_counts_the_children() -> None:
    before = resident_bytes()
    hold = "x = bytearray(200 << 20); print(len(x), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1) as child:
        assert child.stdout.readline()
        grown = resident_bytes() - before
        child.communicate(b"\n")
    assert grown > 190 << 20


def test_durations_are_for_readers() -> None:
    assert [duration(s) for s in (45, 90, 3900, 36000)] == ["45 s", "2 min", "1 h 05 min", "10 h 00 min"]


def test_the_lines_of_a_log_are_as_they_were(capsys: pytest.CaptureFixture) -> None:
    printer = Printer(split="tune")
    printer.on_note("not learned from: {'error': 1}")
    printer.on_iteration(iteration(3, {"a/0": "ssf", "a/1": "f"}))
    printer.on_evaluation(evaluation(3, {"a/0": "sf", "a/1": "ff"}), [])
    assert capsys.readouterr().out.splitlines() == [
        "not learned from: {'error': 1}",
        "iteration 3  success 2/4  ratio 1.000  kl 0.0100  entropy 0.900  explained 0.50  gap 1.0e-05  version 3  "
        "90 + 10 s",
        "iteration 3  greedy success on tune: 1/4 = 25.0 % [12.5, 62.5]",
    ]
