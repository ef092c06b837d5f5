"""A run as it goes, on a terminal: success by task, where the time goes, how much of it is left.

Stays at the bottom of the terminal; what is printed meanwhile scrolls by above it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from protos.machine import memory_gb
from rl_trainer.observer import SPENT, TIMED, Phase, Printer, Row
from rl_trainer.rollouts import Finished
from rl_trainer.tally import Tally, by_task

RECENT = 5
"""Iterations that count as recent."""
REFRESH_HZ = 2.0
MEMORY_S = 5.0
"""How often memory is looked at: it takes a walk through all processes."""
BAR = 14
"""Characters."""
OTHER_LINES = 15
"""Of the view, beside one a task."""
WIDE = 120
"""Columns from which on there is room for instructions."""
DOING: dict[Phase, str] = {
    "start": "waiting for the server",
    "collect": "collecting",
    "learn": "learning",
    "publish": "publishing",
    "evaluate": "evaluating",
    "save": "saving",
}


class LiveView(Printer):
    """Shows a run; prints evaluations and notes above, and leaves the iterations' lines out.

    name: of the run.  iterations, minutes, evaluate_every, split: TrainConfig.  clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        iterations: int,
        minutes: float | None,
        evaluate_every: int,
        split: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(split=split)
        self._name, self._iterations, self._minutes, self._every = name, iterations, minutes, evaluate_every
        self._console, self._clock = console or Console(), clock
        self._lock = threading.Lock()  # the view is drawn by a thread of its own
        self._instructions: Mapping[str, str] = {}
        self._rows: list[Row] = []
        self._began_s = self._phase_s = clock()
        self._phase: Phase = "start"
        self._expected, self._in, self._successes = 0, Counter[str](), Counter[str]()
        self._left_s: float | None = None
        self._memory, self._memory_s = 0, float("-inf")
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=REFRESH_HZ)

    def on_start(self, instructions: Mapping[str, str], rows: Sequence[Row], seconds: float) -> None:
        with self._lock:
            self._instructions, self._rows = instructions, list(rows)
            self._phase_s = self._clock()
            self._began_s = self._phase_s - seconds
            self._look_ahead()
        self._live.start()

    def on_phase(self, phase: Phase, rollouts: int = 0) -> None:
        with self._lock:
            self._phase, self._phase_s, self._expected = phase, self._clock(), rollouts
            if rollouts:
                self._in, self._successes = Counter(), Counter()

    def on_rollout(self, finished: Finished) -> None:
        with self._lock:
            self._in[finished.rollout.task] += 1
            self._successes[finished.rollout.task] += finished.success

    def on_iteration(self, row: Row) -> None:
        self._add(row)

    def on_evaluation(self, row: Row, finished: Sequence[Finished]) -> None:
        self._add(row)
        super().on_evaluation(row, finished)

    def close(self) -> None:
        self._live.stop()

    def _add(self, row: Row) -> None:
        with self._lock:
            self._rows.append(row)
            self._look_ahead()

    def _look_ahead(self) -> None:
        left_s = seconds_left(
            self._rows,
            iterations=self._iterations,
            minutes=self._minutes,
            evaluate_every=self._every,
            seconds=self._clock() - self._began_s,
        )
        self._left_s = None if left_s is None else left_s + self._clock()

    def render(self) -> RenderableType:
        """The view as it stands."""
        with self._lock:
            parts = (self._head(), self._tasks(), self._times(), self._foot())
            return Padding(Group(*parts), (1, 1, 0, 1))

    def _head(self) -> RenderableType:
        done = self._latest("step")
        title = Table.grid(expand=True)
        title.add_column()
        title.add_column(justify="right")
        greedy = "greedy not measured"
        for row in self._measured():
            rate, low, high = (100 * row[f"success/{name}"] for name in ("evaluate", "low", "high"))
            greedy = f"greedy {rate:.1f} % [{low:.1f}, {high:.1f}] after {row['step']:.0f}"
        title.add_row(Text(f"{self._name}   iteration {done:.0f} of {self._iterations}", "bold"), greedy)
        doing = Table.grid(padding=(0, 2), expand=True)
        doing.add_column()
        doing.add_column(ratio=1)
        doing.add_column(justify="right")
        arrived, bar = "", Text("")
        if self._expected:
            arrived = f"{self._in.total()} of {self._expected} rollouts  "
            bar = ProgressBar(total=self._expected, completed=self._in.total())
        doing.add_row(DOING[self._phase], bar, f"{arrived}{duration(self._clock() - self._phase_s)}")
        return Group(title, doing, "")

    def _tasks(self) -> RenderableType:
        iterations = [row for row in self._rows if "success/train" in row][-RECENT:]
        recent, greedy = by_task(iterations, "train"), by_task(self._measured(), "evaluate")
        wide = self._console.width >= WIDE
        table = _table("task", "coming in", f"last {RECENT} iterations", "", "", "greedy")
        if wide:
            table.add_column("", overflow="ellipsis", no_wrap=True, style="dim", ratio=1)
        shown = list(self._instructions)[: max(1, self._console.height - OTHER_LINES)]
        for task in shown:
            coming = Tally(self._successes[task], self._in[task])
            cells = _cells(coming, recent.get(task, Tally()), greedy.get(task, Tally()))
            table.add_row(task, *cells, *([self._instructions[task]] if wide else []))
        if hidden := len(self._instructions) - len(shown):
            table.add_row(f"and {hidden} more", style="dim")
        coming = Tally(self._successes.total(), self._in.total())
        table.add_row("all", *_cells(coming, _sum(recent), _sum(greedy)), style="bold")
        return Group(table, "")

    def _times(self) -> RenderableType:
        table = _table("seconds", *TIMED)
        seen = {name: [row[f"seconds/{name}"] for row in self._rows if f"seconds/{name}" in row] for name in TIMED}
        table.add_row("last", *(f"{past[-1]:.1f}" if past else "-" for past in seen.values()))
        means = (_mean(past[-RECENT:]) if past else None for past in seen.values())
        table.add_row(f"mean of {RECENT}", *("-" if mean is None else f"{mean:.1f}" for mean in means))
        return Group(table, "")

    def _foot(self) -> RenderableType:
        now = self._clock()
        if now - self._memory_s > MEMORY_S:
            self._memory, self._memory_s = resident_bytes(), now
        left = "unknown yet" if self._left_s is None else f"about {duration(self._left_s - now)}"
        if self._left_s is not None and self._left_s <= now:
            left = "this iteration"  # one that has begun is finished
        spent = "   ".join(f"{name.replace('_', ' ')} {self._latest(name):,.0f}" for name in SPENT)
        return Group(
            Text(spent),
            Text(
                f"elapsed {duration(now - self._began_s)}   left {left}   "
                f"memory {self._memory / 2**30:.1f} of {memory_gb():.0f} GiB"
            ),
        )

    def _latest(self, name: str) -> float:
        return next((row[name] for row in reversed(self._rows) if name in row), 0)

    def _measured(self) -> list[Row]:
        """The last evaluation's, if there was one."""
        return [row for row in self._rows if "success/evaluate" in row][-1:]


def seconds_left(
    rows: Sequence[Row], *, iterations: int, minutes: float | None, evaluate_every: int, seconds: float
) -> float | None:
    """Until the budget is spent, by iterations or by minutes, whichever comes first; None when nothing tells.

    seconds: used so far.
    """
    by_clock = None if minutes is None else max(0.0, 60 * minutes - seconds)
    trained = [row for row in rows if "seconds/collect" in row]
    if not trained:
        return by_clock
    done = int(trained[-1]["step"])
    one = _mean([sum(row[f"seconds/{name}"] for name in TIMED[:3]) for row in trained[-RECENT:]])
    measured = [row for row in rows if "seconds/evaluate" in row]
    left = max(0, iterations - done) * one
    if measured and evaluate_every:
        due = iterations // evaluate_every - int(measured[-1]["step"]) // evaluate_every
        left += max(0, due) * measured[-1]["seconds/evaluate"]
    return left if by_clock is None else min(left, by_clock)


def resident_bytes() -> int:
    """Memory that this process and its children hold; pages that they share are counted for each."""
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
    return total


def duration(seconds: float) -> str:
    """For a reader: "45 s", "12 min", "1 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _table(first: str, *others: str) -> Table:
    """A quiet one: no lines, headings dim, numbers to the right."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(coming: Tally, recent: Tally, greedy: Tally) -> list[RenderableType]:
    """What stands beside a task's name."""
    rate = recent.rate if recent.episodes else 0.0
    share = f"{100 * rate:.0f} %" if recent.episodes else ""
    bar = ProgressBar(total=1, completed=rate, width=BAR, finished_style="bar.complete")
    now, lately, held_out = (str(tally) if tally.episodes else "-" for tally in (coming, recent, greedy))
    return [now, lately, share, bar, held_out]


def _sum(tallies: Mapping[str, Tally]) -> Tally:
    return sum(tallies.values(), Tally())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
