"""A session's report: `OUT/report/index.html`, from what the server says of the session and from the trainer's folder.

Success over the episodes, what each version achieved, how often people helped and the arm was held or clipped, every
decision with its evidence, what the learner measured, films of the base and of the live version, and the adapter.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protos import session_pb2
from protos.episode_file import Episode
from rl_trainer.films import film_episode
from rl_trainer.metrics import read_curve
from rl_trainer.plots import BLUE, DARK, ORANGE, Axes, Draw, as_svg, lines, picture
from rl_trainer.report_page import embedded, hours, table, write_page
from rl_trainer.tally import Tally

WINDOW = 40
"""Episodes that are taken together."""
LEAST = 10
"""The first point of a curve is of so many."""
LEARNER = {
    "KL of a token": {"reference_kl": "from the base", "staleness_kl": "from those who played"},
    "KL of an action in an update": {"update_kl": "KL"},
    "negative log-likelihood of a token": {"success_nll": "successes", "intervention_nll": "interventions"},
    "lessons, decisions": {"success_lessons": "successes", "intervention_lessons": "interventions"},
    "critic": {"value": "mean value", "explained_variance": "explained variance"},
}


def film(folder: Path, episode: Episode, *, success: bool, camera: str) -> None:
    """Keeps the first success and the first failure of each version."""
    name = f"{episode.start.version}-{'success' if success else 'failure'}"
    path = folder / f"{name}.webp"
    if not path.exists():
        film_episode(path, episode, f"version {name.replace('-', ': ')}", camera=camera)


def write_session_report(out: Path, session: session_pb2.Session, seconds: float) -> Path:
    """The page's path.  session: with its log and its episodes; seconds: what its trainer worked."""
    rows = read_curve(out / "curve.jsonl")
    title = f"Session {session.session_id}"
    return write_page(out / "report" / "index.html", title, _sections(out, session, rows, seconds))


def _sections(
    out: Path, session: session_pb2.Session, rows: Sequence[Mapping[str, float]], seconds: float
) -> Iterable[str]:
    """The page, from top to bottom."""
    state = session_pb2.SessionState.Name(session.state).removeprefix("SESSION_STATE_").lower()
    episodes = [one for one in session.episodes if not one.error]
    told = f"{session.task}; {state}, {len(episodes)} episodes, {hours(seconds)} of its trainer's time"
    yield f'<p class="quiet">{html.escape(told)}</p>'
    if len(episodes) >= LEAST:
        yield f"<h2>Success without help, {WINDOW} episodes together</h2>"
        yield as_svg(picture({"": success(episodes, session.log)}, size_in=(10.0, 3.4)))
    yield "<h2>Versions</h2>" + _versions(session)
    if len(episodes) >= LEAST:
        yield as_svg(picture({"help and trouble": trouble(episodes)}, size_in=(10.0, 2.8)))
    yield "<h2>What was decided, and why</h2>" + _log(session)
    ends = dict.fromkeys((session.base_version, session.live_version))
    films = [out / "report" / f"{version}-{outcome}.webp" for version in ends for outcome in ("success", "failure")]
    if films := [path for path in films if path.exists()]:
        yield "<h2>The base and the live version</h2>"
        yield f'<div class="films">{"".join(map(embedded, films))}</div>'
    if rows:
        measured = {title: lines(rows, names, xlabel="update") for title, names in LEARNER.items()}
        yield "<h2>Learning</h2>" + as_svg(picture(measured))
    yield f"<h2>The adapter</h2><p>Version {session.live_version}, in PEFT's layout: "
    yield f"<code>versions/{session.live_version}</code> in the trainer's folder.</p>"


def success(episodes: Sequence[session_pb2.SessionEpisode], log: Sequence[session_pb2.SessionEvent]) -> Draw:
    """Of the latest WINDOW episodes, with its 95 % interval; a line where a version became live."""

    def draw(axes: Axes) -> None:
        wins = [episode.success and not episode.intervened for episode in episodes]
        ends = range(LEAST, len(wins) + 1)
        tallies = [_tally(wins[max(0, end - WINDOW) : end]) for end in ends]
        low, high = np.transpose([tally.interval for tally in tallies])
        axes.fill_between(ends, 100 * low, 100 * high, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(ends, [100 * tally.rate for tally in tallies], color=BLUE)
        for event in log:
            if event.what in ("promote", "revert"):
                at = sum(episode.unix_ns < event.unix_ns for episode in episodes)
                axes.axvline(at, color=DARK, linewidth=0.8, linestyle="--")
                axes.annotate(str(event.version), (at, 100), xytext=(3, 0), textcoords="offset points", fontsize=8)
        axes.set(xlabel="episodes", ylabel="success, %", ylim=(-2, 108), xlim=(0, None))

    return draw


def trouble(episodes: Sequence[session_pb2.SessionEpisode]) -> Draw:
    """Of the latest WINDOW episodes: the share with help, and the share of ticks that were held or clipped."""

    def draw(axes: Axes) -> None:
        ends = range(LEAST, len(episodes) + 1)
        windows = [episodes[max(0, end - WINDOW) : end] for end in ends]
        helped = [100 * _tally([one.intervened for one in window]).rate for window in windows]
        stopped = [
            100 * sum(one.holds + one.clips for one in window) / max(1, sum(one.ticks for one in window))
            for window in windows
        ]
        axes.plot(ends, helped, color=ORANGE, label="episodes in which a person took over")
        axes.plot(ends, stopped, color=BLUE, label="ticks held or clipped")
        axes.set(xlabel="episodes", ylabel="%", xlim=(0, None), ylim=(0, 1.3 * max(1.0, *helped, *stopped)))
        axes.legend(loc="upper left", ncols=2)

    return draw


def _tally(outcomes: Sequence[Any]) -> Tally:
    return Tally(sum(outcomes), len(outcomes))


def _versions(session: session_pb2.Session) -> str:
    roles = {session.base_version: "base", session.live_version: "live"}
    if session.HasField("candidate_version"):
        roles[session.candidate_version] = "on trial"
    body = []
    for one in session.versions:
        tally, stopped = one.tally, one.tally.holds + one.tally.clips
        outcomes = Tally(tally.successes, tally.episodes)
        low, high = outcomes.interval
        body.append(
            [
                str(one.version),
                roles.get(one.version, ""),
                str(outcomes),
                f"{100 * outcomes.rate:.1f}",
                f"[{100 * low:.1f}, {100 * high:.1f}]",
                str(tally.interventions),
                f"{100 * stopped / max(1, tally.ticks):.1f}",
                str(tally.errors),
            ]
        )
    head = ["version", "role", "success", "%", "95 %", "with help", "ticks held or clipped, %", "errors"]
    return table(head, body, words=("role",))


def _log(session: session_pb2.Session) -> str:
    head = ["at", "what", "version", "by", "evidence"]
    body = [[_clock(event.unix_ns), event.what, str(event.version), event.by, event.reason] for event in session.log]
    return table(head, body, words=("what", "by", "evidence"))


def _clock(unix_ns: int) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(unix_ns / 1e9))
