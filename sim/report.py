"""What an evaluation found: success, failure and error by task and initial state, with intervals; JSON, table, plot.

The sample is a (task, initial state) pair.  An error is the system's fault: it is counted, shown, and left out of the
rate.  Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from robot_client.arm import Outcome

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """One episode of an evaluation."""

    task: str
    """e.g. "libero_object/3" """
    initial_state: str
    """e.g. "40", "fresh:3", "seed:2017" """
    outcome: Outcome
    ticks: int = 0
    """actions executed"""
    decisions: int = 0
    """chunks asked for"""
    wall_s: float = 0.0
    """from its start to its end; episodes run interleaved, so these overlap"""
    message: str = ""
    """for an error, what went wrong"""
    attempts: int = 1
    """how often it was begun"""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A success rate with its Wilson interval."""

    successes: int
    failures: int
    errors: int

    @property
    def n(self) -> int:
        """Samples in the rate: errors are none."""
        return self.successes + self.failures

    @property
    def rate(self) -> float:
        """Share of successes; NaN without samples."""
        return self.successes / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; [0, 1] without samples."""
        if not self.n:
            return 0.0, 1.0
        bounds = binomtest(self.successes, self.n).proportion_ci(CONFIDENCE, method="wilson")
        return float(bounds.low), float(bounds.high)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{100 * self.rate:5.1f} %" if self.n else "    - "
        return f"{self.successes:4d} /{self.n:4d}  {share}  [{100 * low:5.1f}, {100 * high:5.1f}]  errors {self.errors}"

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {**asdict(self), "n": self.n, "rate": self.rate if self.n else None, "wilson_95": [low, high]}


def rate_of(episodes: Iterable[EpisodeRecord]) -> Rate:
    """The episodes' rate, all samples alike."""
    outcomes = [episode.outcome for episode in episodes]
    return Rate(successes=outcomes.count("success"), failures=outcomes.count("failure"), errors=outcomes.count("error"))


def by_task(episodes: Sequence[EpisodeRecord]) -> dict[str, list[EpisodeRecord]]:
    """Task id -> its episodes in the order of their initial states, tasks in order."""
    ordered = sorted(episodes, key=lambda episode: (_natural(episode.task), _natural(episode.initial_state)))
    tasks: dict[str, list[EpisodeRecord]] = {}
    for episode in ordered:
        tasks.setdefault(episode.task, []).append(episode)
    return tasks


def _natural(name: str) -> tuple[str, int]:
    """Sorts "fresh:9" before "fresh:10" and "suite/9" before "suite/10"."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)


def outcomes_digest(episodes: Sequence[EpisodeRecord]) -> str:
    """SHA-256 over every (task, state, outcome, ticks): equal for two evaluations with the same outcomes."""
    lines = [
        f"{task} {episode.initial_state} {episode.outcome} {episode.ticks}\n"
        for task, of_task in by_task(episodes).items()
        for episode in of_task
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation's result together with all that is needed to read it."""

    suite: str
    protocol: str
    states_note: str
    """which states of each task, in words"""
    instructions: dict[str, str]
    """task id -> what the policy was told"""
    model: str
    version: int
    base_fingerprint: str
    chunk_length: int
    """K"""
    replan_after: int
    """how many of the K actions were executed; 0: all"""
    image_path: str
    unnorm_key: str
    assets: str
    """what was on screen, e.g. "LIBERO with stand-in visuals" """
    temperature: float
    """0 is greedy"""
    noise_correlation: float = 0.0
    """how much of the noise the ticks of a chunk share"""
    seed: int
    """what the episodes' own seeds are derived from"""
    processes: int
    slots: int
    setup_s: float
    """until the first worker made a step"""
    wall_s: float
    """from the first worker's start to the last episode's end"""
    planned: int
    """episodes asked for; fewer are in the report only when it was interrupted"""
    workers_lost: tuple[dict[str, Any], ...] = ()
    quarantined: tuple[str, ...] = ()
    episodes: tuple[EpisodeRecord, ...]

    @property
    def rate(self) -> Rate:
        return rate_of(self.episodes)

    @property
    def error_share(self) -> float:
        return self.rate.errors / len(self.episodes) if self.episodes else 0.0

    @property
    def episodes_per_minute(self) -> float:
        return 60 * len(self.episodes) / self.wall_s if self.wall_s else 0.0

    @property
    def sampling(self) -> str:
        if self.temperature == 0:
            return "greedy"
        shared = f", noise correlated by {self.noise_correlation:g}" if self.noise_correlation else ""
        return f"sampled at temperature {self.temperature:g}{shared}, seed {self.seed}"

    @property
    def chunks(self) -> str:
        executed = f", {self.replan_after} executed" if self.replan_after else ""
        return f"K = {self.chunk_length}{executed}"

    @property
    def headline(self) -> str:
        return f"{self.suite}, protocol {self.protocol} ({self.states_note}), {self.sampling}; {self.assets}"

    def as_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name not in ("episodes", "instructions")}
        return {
            **fields,
            "sampling": self.sampling,
            "complete": len(self.episodes) == self.planned,
            "episodes_per_minute": round(self.episodes_per_minute, 2),
            "outcomes_sha256": outcomes_digest(self.episodes),
            "overall": self.rate.as_json(),
            "tasks": {
                task: {
                    "instruction": self.instructions.get(task, ""),
                    **rate_of(episodes).as_json(),
                    "states": {episode.initial_state: episode.outcome for episode in episodes},
                }
                for task, episodes in by_task(self.episodes).items()
            },
            "episodes": [asdict(episode) for episodes in by_task(self.episodes).values() for episode in episodes],
        }

    def table(self) -> str:
        """The report as text for a terminal."""
        lines = [
            self.headline,
            f"model {self.model} version {self.version} ({self.base_fingerprint[:12]}), {self.chunks}",
        ]
        for task, episodes in by_task(self.episodes).items():
            lines.append(f"{task:>18}  {rate_of(episodes)}  {self.instructions.get(task, '')}")
        lines.append(f"{'all':>18}  {self.rate}")
        lines.append(
            f"{len(self.episodes)} of {self.planned} episodes in {self.wall_s:.0f} s, "
            f"{self.episodes_per_minute:.1f} a minute; workers replaced: {len(self.workers_lost)}; "
            f"outcomes {outcomes_digest(self.episodes)[:12]}"
        )
        if self.quarantined:
            lines.append(f"QUARANTINED (counted as errors): {', '.join(self.quarantined)}")
        for episode in self.episodes:
            if episode.outcome == "error":
                lines.append(f"ERROR {episode.task} state {episode.initial_state}: {episode.message}")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes report.json, report.txt and success.png."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        (folder / "report.txt").write_text(self.table() + "\n", encoding="utf-8")
        self.plot(folder / "success.png")

    def plot(self, path: Path) -> None:
        """A bar with its interval for every task, and one for all of them."""
        import matplotlib  # half a second to import: only when there is something to draw

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = [
            (f"{task}  {self.instructions.get(task, '')}"[:64], rate_of(e))
            for task, e in by_task(self.episodes).items()
        ]
        rows.append(("all", self.rate))
        figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.34 * len(rows)))
        for place, (name, rate) in enumerate(reversed(rows)):
            low, high = rate.interval
            share = rate.rate if rate.n else 0.0
            axes.barh(place, share, color="#33658a" if name == "all" else "#86bbd8")
            axes.plot([low, high], [place, place], color="#22223b", linewidth=1.5)
            axes.text(
                1.01, place, f"{rate.successes}/{rate.n}" + (f" +{rate.errors} err" if rate.errors else ""), va="center"
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_xlabel("success rate, Wilson 95 % interval")
        axes.set_title(f"{self.model} v{self.version}: {self.headline}", fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
