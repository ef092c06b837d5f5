"""A run's report: `OUT/report/index.html`, one file that needs nothing else, made from the run's folder alone.

Success against environment steps, what each evaluation found and what had been spent by then, success by task, films of
before and after (films.py), where the time went, the curriculum, and what the learner measured.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rl_trainer.films import film_evaluation, film_name
from rl_trainer.metrics import read_curve
from rl_trainer.observer import SPENT, TIMED, Observer, Row
from rl_trainer.plots import BLUE, DARK, Axes, Draw, as_svg, lines, picture, stacked
from rl_trainer.report_page import embedded, hours, table, write_page
from rl_trainer.tally import Tally, by_task, total

SMOOTH = 5
"""Iterations whose training episodes are taken together."""
LEGEND = 12
"""Tasks that a legend still tells apart."""
GAP_LIMIT = 1e-4
"""Between the server's log-probabilities and the learner's, in float32."""


class Reporter(Observer):
    """Keeps the report of the run in `out` up to date.  camera: the one that films show."""

    def __init__(self, out: Path, *, camera: str):
        self._out, self._camera = out, camera
        self._instructions: Mapping[str, str] = {}

    def on_start(self, instructions: Mapping[str, str], rows: Sequence[Row], seconds: float) -> None:
        self._instructions = instructions

    def on_evaluation(self, row: Row, finished: Sequence) -> None:
        film_evaluation(self._out / "report", int(row["step"]), finished, camera=self._camera)

    def on_save(self) -> None:
        write_report(self._out, self._instructions)


def write_report(out: Path, instructions: Mapping[str, str] | None = None) -> Path:
    """Makes the report of the run in `out` from its curve and its films; gives the page's path.

    instructions: task id -> what the policy is told.
    """
    rows = read_curve(out / "curve.jsonl")
    record = out / "train.json"
    config = json.loads(record.read_text()) if record.exists() else {}
    title, folder = f"{config.get('suite', '')} in {out.name}", out / "report"
    return write_page(folder / "index.html", title, _sections(rows, config, folder, instructions or {}))


def _sections(rows: Sequence[Row], config: Mapping, folder: Path, instructions: Mapping[str, str]) -> Iterable[str]:
    """The page, from top to bottom."""
    trained, measured = [row for row in rows if "success/train" in row], _evaluations(rows)
    yield f'<p class="quiet">{_where(rows, config)}</p>'
    if rows:
        figure = picture({"": success(rows)}, size_in=(10.0, 3.4))
        yield "<h2>Success against environment steps</h2>" + as_svg(figure)
    if measured:
        yield f"<h2>Evaluations</h2><p>Greedy, on split {html.escape(str(config.get('evaluate_split', '')))}.</p>"
    yield _spent_table(measured, trained)
    if tasks := _tasks_table(rows, instructions):
        yield "<h2>By task</h2>" + tasks
    films = [folder / film_name(task) for task in by_task(measured, "evaluate")]
    if films := [film for film in films if film.exists()]:
        yield "<h2>Before and after</h2><p>One evaluated initial state of each task.</p>"
        yield f'<div class="films">{"".join(map(embedded, films))}</div>'
    if trained:
        yield "<h2>The run</h2>" + as_svg(picture(panels(rows)))
    if config:
        written = html.escape(json.dumps(config, indent=1))
        yield f"<details><summary>Configuration</summary><pre>{written}</pre></details>"


def panels(rows: Sequence[Row]) -> dict[str, Draw]:
    """Title -> what is drawn under it."""
    phases, shares = {f"seconds/{phase}": phase for phase in TIMED}, "probability/"
    tasks = {name: name.rpartition("/")[2] for row in rows[-2:] for name in row if name.startswith(shares)}
    top = max((row.get(name, 0.0) for row in rows for name in tasks), default=1.0)
    curriculum = lines(rows, tasks, legend=len(tasks) <= LEGEND, ylim=(0, 1.4 * top), xlabel="iteration")
    return {
        "time of each phase": stacked(rows, phases, ylabel="seconds", xlabel="iteration"),
        **({"curriculum: share of each task in the practice": curriculum} if tasks else {}),
        "return of an episode, and success: apart, the reward is hacked": lines(
            rows, {"return": "return", "success/train": "success", "reward_alarm": "alarm"}, xlabel="iteration"
        ),
        "divergence": lines(rows, {"update_kl": "KL", "clip_fraction": "share of ratios clipped"}, xlabel="iteration"),
        "entropy, nats a token": lines(rows, ["entropy"], legend=False, xlabel="iteration"),
        "log-probabilities, server against learner: largest gap": _gap(rows),
        "critic": lines(rows, {"value": "mean value", "explained_variance": "explained variance"}, xlabel="iteration"),
    }


def success(rows: Sequence[Row]) -> Draw:
    """Training success, SMOOTH iterations together, and greedy evaluations; both with 95 % intervals."""

    def draw(axes: Axes) -> None:
        steps, tallies = smoothed(rows)
        if tallies:
            low, high = np.transpose([tally.interval for tally in tallies])
            axes.fill_between(steps, 100 * low, 100 * high, color=BLUE, alpha=0.15, linewidth=0)
            label = f"training, sampled, {SMOOTH} iterations together"
            axes.plot(steps, [100 * tally.rate for tally in tallies], color=BLUE, label=label)
        if measured := _evaluations(rows):
            x = [row.get("environment_steps", 0) for row in measured]
            rate, low, high = (
                np.array([100 * row[f"success/{name}"] for row in measured]) for name in ("evaluate", "low", "high")
            )
            axes.errorbar(
                x,
                rate,
                (rate - low, high - rate),
                fmt="o-",
                markersize=4,
                color=DARK,
                capsize=2,
                label="evaluations, greedy",
            )
        axes.set(xlabel="environment steps", ylabel="success, %", ylim=(-2, 102))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if axes.lines:
            axes.legend(loc="best")

    return draw


def smoothed(rows: Sequence[Row]) -> tuple[list[float], list[Tally]]:
    """Environment steps, and the training episodes of the SMOOTH iterations up to there."""
    trained = [row for row in rows if "success/train" in row]
    counts = np.diff([0.0, *(row["episodes"] for row in trained)])
    each = [Tally(round(row["success/train"] * n), round(n)) for row, n in zip(trained, counts, strict=True)]
    windows = [sum(each[max(0, stop - SMOOTH) : stop], Tally()) for stop in range(1, len(each) + 1)]
    return [row["environment_steps"] for row in trained], windows


def _gap(rows: Sequence[Row]) -> Draw:
    plain = lines(rows, ["logprob_gap"], xlabel="iteration", legend=False, yscale="log")
    top = max(10 * GAP_LIMIT, *(2 * row.get("logprob_gap", 0.0) for row in rows))

    def draw(axes: Axes) -> None:
        plain(axes)
        axes.set_ylim(GAP_LIMIT / 1000, top)
        axes.axhline(GAP_LIMIT, color=DARK, linewidth=0.8, linestyle="--")

    return draw


def _evaluations(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "success/evaluate" in row]


def _where(rows: Sequence[Row], config: Mapping) -> str:
    """How far the run is."""
    if not rows:
        return "Nothing was measured yet."
    done, spent_s = rows[-1]["step"], max((row.get("wall_clock_s", 0.0) for row in rows), default=0.0)
    return f"iteration {done:.0f} of {config.get('iterations', '?')}, {hours(spent_s)} of wall clock"


def _spent_table(measured: Sequence[Row], trained: Sequence[Row]) -> str:
    """What each evaluation found, and what had been spent by then; last, where the run stands."""
    head = ["iteration", *(name.replace("_", " ") for name in SPENT), "wall clock", "success", "%", "95 %", "errors"]
    body = []
    since = [row for row in trained[-1:] if not measured or row["step"] > measured[-1]["step"]]
    for row in [*measured, *since]:
        found = ["", "", "", ""]
        if "success/evaluate" in row:
            n = round(row["evaluated"])
            low, high = 100 * row["success/low"], 100 * row["success/high"]
            tally = Tally(round(row["success/evaluate"] * n), n)
            found = [
                str(tally),
                f"{100 * tally.rate:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                f"{row['evaluation_errors']:.0f}",
            ]
        spent = [f"{row[name]:,.0f}" if name in row else "" for name in SPENT]
        clock = hours(row["wall_clock_s"]) if "wall_clock_s" in row else ""
        body.append([f"{row['step']:.0f}", *spent, clock, *found])
    return table(head, body)


def _tasks_table(rows: Sequence[Row], instructions: Mapping[str, str]) -> str:
    """Training success of the first and the last iterations, and of the first and the last evaluation; or nothing."""
    trained = [row for row in rows if any(name.startswith("train_episodes/") for name in row)]
    measured = [row for row in _evaluations(rows) if total([row], "evaluate").episodes]
    columns = {
        f"training, first {SMOOTH}": by_task(trained[:SMOOTH], "train"),
        f"training, last {SMOOTH}": by_task(trained[-SMOOTH:], "train"),
        "greedy, first": by_task(measured[:1], "evaluate"),
        "greedy, last": by_task(measured[-1:], "evaluate"),
    }
    tasks = dict.fromkeys(task for column in columns.values() for task in column)
    if not tasks:
        return ""
    body = [[task, *(str(column.get(task, Tally())) for column in columns.values())] for task in tasks]
    body = [[*line, instructions.get(line[0], "")] for line in body]
    body.append(["all", *(str(sum(column.values(), Tally())) for column in columns.values()), ""])
    return table(["task", *columns, "instruction"], body, words=("task", "instruction"), sums=True)
