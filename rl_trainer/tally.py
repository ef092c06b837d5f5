"""Successes among episodes: their rate and its Wilson interval at 95 %, and how the curve holds them, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import binomtest

from rl_trainer.rollouts import Finished

CONFIDENCE = 0.95
Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Tally:
    """So many successes among so many episodes.  An error is no episode."""

    successes: int = 0
    episodes: int = 0

    @property
    def rate(self) -> float:
        """Share of successes; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound; [0, 1] without episodes."""
        if not self.episodes:
            return 0.0, 1.0
        bounds = binomtest(self.successes, self.episodes).proportion_ci(CONFIDENCE, method="wilson")
        return float(bounds.low), float(bounds.high)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.successes + other.successes, self.episodes + other.episodes)

    def __str__(self) -> str:
        return f"{self.successes}/{self.episodes}"


def tally_of(finished: Iterable[Finished]) -> Tally:
    """Of what came in."""
    outcomes = [item.success for item in finished if item.episode is not None]
    return Tally(sum(outcomes), len(outcomes))


def scalars_of(finished: Sequence[Finished], kind: Kind) -> dict[str, float]:
    """What the curve holds of an iteration's or an evaluation's episodes."""
    scalars = dict[str, float]()
    for task in dict.fromkeys(item.rollout.task for item in finished):
        tally = tally_of(item for item in finished if item.rollout.task == task)
        scalars[f"{kind}_successes/{task}"] = float(tally.successes)
        scalars[f"{kind}_episodes/{task}"] = float(tally.episodes)
    return scalars


def by_task(rows: Iterable[Mapping[str, float]], kind: Kind) -> dict[str, Tally]:
    """Task id -> its tally over rows of the curve, tasks in the order of their numbers."""
    tallies, prefix = dict[str, Tally](), f"{kind}_episodes/"
    for row in rows:
        for name in (name for name in row if name.startswith(prefix)):
            task = name.removeprefix(prefix)
            tally = Tally(int(row[f"{kind}_successes/{task}"]), int(row[name]))
            tallies[task] = tallies.get(task, Tally()) + tally
    return {task: tallies[task] for task in sorted(tallies, key=natural)}


def total(rows: Iterable[Mapping[str, float]], kind: Kind) -> Tally:
    """Over rows of the curve, all tasks together."""
    return sum(by_task(rows, kind).values(), Tally())


def natural(task: str) -> tuple[str, int]:
    """Sorts "suite/9" before "suite/10"."""
    head = task.rstrip("0123456789")
    return head, int(task[len(head) :] or 0)
