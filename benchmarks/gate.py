"""The promotion gate on simulated streams of episodes: how often it errs, how often it finds, and what that takes.

    python -m benchmarks.gate [--streams 10000] [--other-streams 2000] [--rule.max-episodes 60]

Every stream goes through the real `judge`, after each episode and up to its first verdict; `takes_candidate` says whose
turn it is.  In a world without trouble the two versions differ in success alone, which may drift; in one with trouble
they succeed alike, and an episode ends as an error, or is held or clipped in 80 % of its ticks when the arm gets stuck,
else about as much as the world says.

A stated error counts as held when the upper end of its interval is not above it in any world that it is about.
Intervals are Clopper and Pearson's at 95 %.  Prints a table, writes benchmarks/results/gate.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import binomtest

from policy_server.gate import Comparison, GateRule, Trial, judge, takes_candidate

TICKS = 150
"""Of an episode."""
STUCK = 0.8
SPREAD = 0.3
"""Standard deviation of an episode's share of held or clipped ticks, as a part of the mean."""
DRIFTED = 300
ENDS = ("promote", "roll back: success", "roll back: trouble", "undecided")
PARTS = (0.25, 0.5, 0.75, 1.0)
"""Of the most episodes."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Measures the gate's errors, its power, and how long it takes."""

    streams: int = 10_000
    """in each world that stands still"""
    other_streams: int = 2000
    """in each world that drifts, and in each with trouble"""
    rule: GateRule = field(default_factory=GateRule)
    seed: int = 0
    json: Path = Path(__file__).parent / "results" / "gate.json"


@dataclass(frozen=True, kw_only=True)
class World:
    """Two versions, (live, candidate)."""

    name: str
    success: tuple[float, float]
    """probability, where an episode does not end as an error, at first"""
    drift: float = 0.0
    """what both have gained after DRIFTED episodes of both"""
    share: float | None = None
    """of the episodes that the candidate gets; None: the rule's"""
    trouble: tuple[float, float] = (0.0, 0.0)
    """mean share of an episode's ticks that are held or clipped while the arm is not stuck"""
    stuck: tuple[float, float] = (0.0, 0.0)
    """probability that it gets stuck in an episode"""
    errors: tuple[float, float] = (0.0, 0.0)
    """probability that an episode ends as an error"""


CANDIDATES = {
    0.2: (0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    0.5: (0.0, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8),
    0.8: (0.0, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0),
}
"""Live -> candidates: worse by two margins, one, and half of one, equal, better; and one that never succeeds."""
SUCCESS_WORLDS = [
    World(name=f"success {live:.2f} and {candidate:.2f}", success=(live, candidate))
    for live, candidates in CANDIDATES.items()
    for candidate in candidates
]
DRIFTING_WORLDS = [
    World(name=f"{name}, share {share}", success=success, drift=drift, share=share)
    for share in (0.2, 0.5)
    for name, success, drift in (
        ("0.15 worse, rising", (0.25, 0.1), 0.6),
        ("0.15 worse, falling", (0.85, 0.7), -0.6),
        ("equal, rising", (0.25, 0.25), 0.6),
        ("equal, falling", (0.85, 0.85), -0.6),
    )
]
TROUBLE_WORLDS = [
    World(name=name, success=(0.5, 0.5), trouble=trouble, stuck=stuck)
    for name, trouble, stuck in (
        ("trouble 5 %, alike", (0.05, 0.05), (0.0, 0.0)),
        ("trouble 45 %, alike", (0.45, 0.45), (0.0, 0.0)),
        ("stuck 1 in 5, alike", (0.05, 0.05), (0.2, 0.2)),
        ("trouble 5 to 10 %", (0.05, 0.1), (0.0, 0.0)),
        ("trouble 5 to 30 %", (0.05, 0.3), (0.0, 0.0)),
        ("trouble 5 to 90 %", (0.05, 0.9), (0.0, 0.0)),
        ("trouble 45 to 90 %", (0.45, 0.9), (0.0, 0.0)),
        ("stuck 1 in 5 to 1 in 2", (0.05, 0.05), (0.2, 0.5)),
        ("stuck never to always", (0.05, 0.05), (0.0, 1.0)),
    )
] + [
    World(name=f"errors {before:.0%} and {after:.0%}", success=(0.5, 0.5), errors=(before, after))
    for before, after in ((0.1, 0.1), (0.1, 0.3), (0.1, 0.6), (0.0, 1.0))
]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of the streams, and its interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.share:6.2f} [{100 * self.low:5.2f}, {100 * self.high:6.2f}]"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a world's streams."""

    world: World
    ends: dict[str, Rate]
    mean_episodes: float
    """of the candidate until the verdict"""
    median_episodes: dict[str, float]
    """the same, by verdict"""
    promoted_within: dict[int, float]
    """episodes of the candidate -> share of the streams"""


@dataclass(frozen=True, kw_only=True)
class Law:
    """A stated error, and the world that comes closest to it."""

    text: str
    stated: float
    worst: Rate
    world: str
    held: bool


def main(config: GateConfig) -> int:
    streams = [(world, config.streams) for world in SUCCESS_WORLDS]
    streams += [(world, config.other_streams) for world in [*DRIFTING_WORLDS, *TROUBLE_WORLDS]]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(measured, *job, config.rule, (config.seed, n)) for n, job in enumerate(streams)]
        rows = [job.result() for job in jobs]
    laws = laws_of(rows, config.rule)
    print_table(rows, laws)
    print(f"{config.streams} streams in a world, {config.other_streams} where it drifts or has trouble")
    figures = {
        "streams": config.streams,
        "other_streams": config.other_streams,
        "rule": asdict(config.rule),
        "seed": config.seed,
        "rows": [asdict(row) for row in rows],
        "laws": [asdict(law) for law in laws],
    }
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(not all(law.held for law in laws))


def measured(world: World, streams: int, rule: GateRule, seed: tuple[int, int]) -> Row:
    rng = np.random.default_rng(seed)
    ends, episodes = zip(*[stream(world, rule, rng) for _ in range(streams)], strict=True)
    end_S, episodes_S = np.array(ends), np.array(episodes)
    within = [round(part * rule.max_episodes) for part in PARTS]
    return Row(
        world=world,
        ends={end: rate(int((end_S == end).sum()), streams) for end in ENDS},
        mean_episodes=float(episodes_S.mean()),
        median_episodes={end: float(np.median(episodes_S[end_S == end])) for end in np.unique(end_S).tolist()},
        promoted_within={most: float(((end_S == "promote") & (episodes_S <= most)).mean()) for most in within},
    )


def stream(world: World, rule: GateRule, rng: np.random.Generator) -> tuple[str, int]:
    """How it ends, one of ENDS, and episodes of the candidate until then."""
    rule = rule if world.share is None else replace(rule, share=world.share)
    comparison = Comparison.under(rule)
    while (judgement := judge(rule, comparison)).verdict == "open":
        whose = takes_candidate(rule, rng.random())
        gained = world.drift * min((comparison.live.ended + comparison.candidate.ended) / DRIFTED, 1)
        comparison = comparison.plus(episode(world, whose, gained, rng), of_candidate=whose)
    end = judgement.verdict
    if end == "roll back":
        end += f": {'trouble' if judgement.trouble_e >= 1 / rule.trouble_error else 'success'}"
    return end, comparison.candidate.ended


def episode(world: World, whose: bool, gained: float, rng: np.random.Generator) -> Trial:
    """One of the candidate, or of the live version; gained: by its success, since the world began to drift."""
    if world.errors[whose] and rng.random() < world.errors[whose]:
        return Trial(success=False, error=True, ticks=0)
    success, stuck = rng.random(2) < (world.success[whose] + gained, world.stuck[whose])
    share = (STUCK if stuck else world.trouble[whose]) * rng.normal(1, SPREAD)
    return Trial(success=bool(success), ticks=TICKS, clips=round(TICKS * min(max(share, 0), 1)))


def rate(count: int, streams: int) -> Rate:
    interval = binomtest(count, streams).proportion_ci(0.95, method="exact")
    return Rate(share=count / streams, low=float(interval.low), high=float(interval.high))


def laws_of(rows: Sequence[Row], rule: GateRule) -> list[Law]:
    """The three stated errors, over the worlds in which a verdict would be one."""

    def law(text: str, verdict: str, stated: float, among: Sequence[Row]) -> Law:
        worst = max(among, key=lambda row: row.ends[verdict].high)
        highest = worst.ends[verdict]
        return Law(text=text, stated=stated, worst=highest, world=worst.world.name, held=highest.high <= stated)

    def gain(world: World) -> float:
        live, candidate = (success * (1 - errors) for success, errors in zip(world.success, world.errors, strict=True))
        return round(candidate - live, 9)

    worse = [row for row in rows if gain(row.world) <= -rule.margin]
    as_good = [row for row in rows if gain(row.world) >= 0]
    as_calm = [
        row for row in rows if all(len(set(two)) == 1 for two in (row.world.trouble, row.world.stuck, row.world.errors))
    ]
    return [
        law("worse by the margin or more, and promoted", "promote", rule.promote_error, worse),
        law("as good or better, and rolled back for failing", "roll back: success", rule.rollback_error, as_good),
        law("as calm, and rolled back for trouble", "roll back: trouble", rule.trouble_error, as_calm),
    ]


def print_table(rows: Sequence[Row], laws: Sequence[Law]) -> None:
    columns = f"{'promote':<23}{'failing':<23}{'trouble':<23}undecided  episodes"
    print(f"{'% of streams':<32}{columns}  promoted within {[*rows[0].promoted_within]}")
    for row in rows:
        rates = "".join(f"{row.ends[verdict]!s:<23}" for verdict in ENDS[:3])
        within = " / ".join(f"{100 * share:.0f}" for share in row.promoted_within.values())
        print(f"{row.world.name:<32}{rates}{100 * row.ends['undecided'].share:9.2f} {row.mean_episodes:9.1f}  {within}")
    for law in laws:
        said = "held  " if law.held else "BROKEN"
        print(f"{said} {law.text}: stated {law.stated:.0%}; the most {law.worst} %, {law.world}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GateConfig, description=__doc__)))
