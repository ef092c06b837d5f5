"""The promotion gate: whether a candidate version takes the live one's place, from what came of their episodes.

A candidate takes a share of a session's episodes, drawn by chance, beside the live version.  Whoever runs the session
asks `judge` after every finished episode, and stops at the first verdict that is not `open`:

    roll back    it is held or clipped more than the live version (trouble), or it succeeds less often
    promote      it does not succeed less often by `margin` or more
    undecided    neither was shown in `max_episodes` of its episodes: it is dropped, and the live version stays

Each finding refutes its opposite by an e-process (universal inference).  Of two versions a and b, and of the hypothesis
H0 that the success probabilities obey a <= b - margin,

    E = P(outcomes of a) P(outcomes of b) / the largest likelihood of all these outcomes under H0

where P predicts each outcome from those before it, by Krichevsky and Trofimov's rule: success with (s + 1/2) / (n + 1)
after s successes in n episodes.  The product of these predictions is a beta function of the two counts.  If H0 is true,
E is at most the ratio of P to the true likelihood, a martingale that begins at 1, so that by Ville's inequality E comes
to 1 / error, ever, with a probability of at most `error`: however often one looks, whenever one stops, and however the
episodes of the two alternate.  What is assumed: episodes are independent, and a version succeeds in each with the same
probability.  With several robots that holds in the order in which episodes began, not ended: a failure takes longer.

Trouble is found in the same way.  For every tenth, E is taken of the episodes in which more than that share of the
ticks was held or clipped, against H0 that this befalls the candidate no more often; the mean of these E obeys the same
law.  An episode counts once, however its ticks hang together.  The finding counts only while the candidate's share of
all its ticks exceeds the live version's by more than `trouble_rise`.

Sources: Wasserman, Ramdas and Balakrishnan 2020, Universal inference; Ramdas, Grünwald, Vovk and Shafer 2023,
Game-theoretic statistics and safe anytime-valid inference; Krichevsky and Trofimov 1981, The performance of universal
encoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["open", "promote", "roll back", "undecided"]
Z_95 = 1.959964
"""Of a normal distribution, what 95 % lie within, in standard deviations."""
LEVELS = tuple(tenth / 10 for tenth in range(1, 10))
"""Shares of an episode's ticks."""


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """When a candidate is promoted, and when it is rolled back."""

    margin: float = 0.1
    """how much less often a candidate may succeed and yet be no worse, in success probability"""
    promote_error: float = 0.05
    """probability that a candidate is promoted which succeeds less often by the margin or more, at most"""
    rollback_error: float = 0.1
    """probability that one which succeeds at least as often is rolled back for its failures, at most"""
    trouble_error: float = 0.05
    """probability that one which is held and clipped no more is rolled back for trouble, at most"""
    trouble_rise: float = 0.1
    """a smaller rise in the share of ticks that are held or clipped is no trouble"""
    share: float = 0.5
    """of the session's episodes that the candidate gets"""
    max_episodes: int = 100
    """of the candidate; then it is dropped.  By 100, one that is better by 0.3 is promoted nearly always, by 0.2 in
    three of four cases and more, by 0.1 in a quarter to a half, and one that is equal seldom (benchmarks/gate.py)"""
    envelope: float = 0.15
    """how far the candidate's actions may lie from the live version's before any robot sees one, in the mean over what
    the session's robots saw lately; 1 is the whole range of a number"""

    def __post_init__(self) -> None:
        for name in ("margin", "trouble_rise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("promote_error", "rollback_error", "trouble_error", "share", "envelope"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {self.max_episodes}")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the gate sees of a finished episode.  One that ended as an error is the system's fault, and is none."""

    success: bool
    intervened: bool = False
    """a person took over: whatever came of it, it is no success of the policy"""
    ticks: int
    """executed, but for a person's"""
    holds: int = 0
    """of them, those at which the arm held"""
    clips: int = 0
    """of them, those at which the arm's safety gate clipped the policy's action"""

    def __post_init__(self) -> None:
        if min(self.holds, self.clips) < 0 or self.holds + self.clips > self.ticks:
            raise ValueError(
                f"holds and clips must not be negative and together at most ticks ({self.ticks}),"
                f" got {self.holds} and {self.clips}"
            )

    @property
    def trouble(self) -> float:
        """Share of its ticks that were held or clipped."""
        return (self.holds + self.clips) / max(self.ticks, 1)


class Counts(NamedTuple):
    """So many successes, or whatever is counted, among so many episodes."""

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """0 without episodes."""
        return self.successes / max(self.episodes, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's at 95 %, to be shown: no verdict rests on it.  All of [0, 1] without episodes."""
        if not self.episodes:
            return 0.0, 1.0
        n, p, z2 = self.episodes, self.rate, Z_95**2
        middle, reach = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (middle - reach) / (1 + z2 / n)), min(1.0, (middle + reach) / (1 + z2 / n))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What came of a version's episodes since the candidate began, in whatever order."""

    episodes: int = 0
    successes: int = 0
    """without a person's help"""
    interventions: int = 0
    """episodes in which a person took over"""
    ticks: int = 0
    holds: int = 0
    clips: int = 0
    above: tuple[int, ...] = (0,) * len(LEVELS)
    """for each of LEVELS: episodes in which a larger share of the ticks was held or clipped"""

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> Tally:
        """Of these episodes."""
        tally = cls()
        for trial in trials:
            tally = tally.plus(trial)
        return tally

    def plus(self, trial: Trial) -> Tally:
        """With one episode more."""
        return Tally(
            episodes=self.episodes + 1,
            successes=self.successes + (trial.success and not trial.intervened),
            interventions=self.interventions + trial.intervened,
            ticks=self.ticks + trial.ticks,
            holds=self.holds + trial.holds,
            clips=self.clips + trial.clips,
            above=tuple(n + (trial.trouble > level) for n, level in zip(self.above, LEVELS, strict=True)),
        )

    @property
    def outcomes(self) -> Counts:
        """Successes among episodes."""
        return Counts(self.successes, self.episodes)

    @property
    def trouble(self) -> float:
        """Share of all ticks that were held or clipped; 0 without ticks."""
        return (self.holds + self.clips) / max(self.ticks, 1)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict and all that led to it."""

    verdict: Verdict
    reason: str
    """a sentence with the numbers"""
    live: Tally
    candidate: Tally
    promote_e: float
    """evidence that the candidate succeeds less often by less than the margin, if at all"""
    rollback_e: float
    """evidence that it succeeds less often"""
    trouble_e: float
    """evidence that it is held or clipped more"""


def takes_candidate(rule: GateRule, draw: float) -> bool:
    """Whether the next episode goes to the candidate; draw: uniform in [0, 1), a new one for every episode.

    Chance alone keeps the two versions comparable, whatever robots ask and in which order.
    """
    return draw < rule.share


def departure(live_nKA: np.ndarray, candidate_nKA: np.ndarray, span_A: np.ndarray) -> float:
    """Mean distance of two versions' answers to the same observations, each number in parts of its range span_A."""
    return float((np.abs(candidate_nKA - live_nKA) / span_A).mean())


def judge(rule: GateRule, live: Tally, candidate: Tally) -> Judgement:
    """The verdict on the episodes so far.  The errors are as stated if the first one that is not `open` is kept."""
    promote_e = e_value(candidate.outcomes, live.outcomes, rule.margin)
    rollback_e = e_value(live.outcomes, candidate.outcomes)
    trouble_e = _trouble_e(rule, live, candidate)
    if trouble_e >= 1 / rule.trouble_error:
        verdict, finding = "roll back", "the candidate is held or clipped more"
    elif rollback_e >= 1 / rule.rollback_error:
        verdict, finding = "roll back", "the candidate succeeds less often"
    elif promote_e >= 1 / rule.promote_error:
        verdict, finding = "promote", f"the candidate does not succeed less often by {rule.margin:g} or more"
    elif candidate.episodes >= rule.max_episodes:
        verdict, finding = "undecided", f"nothing was shown in {rule.max_episodes} episodes of the candidate"
    else:
        verdict, finding = "open", "nothing is shown yet"
    return Judgement(
        verdict=verdict,
        reason=(
            f"{finding}: success {candidate.successes} of {candidate.episodes}, live {live.successes} of"
            f" {live.episodes}; held or clipped {candidate.trouble:.1%} of ticks, live {live.trouble:.1%};"
            f" e-values: promote {promote_e:.3g} (needs {1 / rule.promote_error:g}), roll back {rollback_e:.3g}"
            f" ({1 / rule.rollback_error:g}), trouble {trouble_e:.3g} ({1 / rule.trouble_error:g})"
        ),
        live=live,
        candidate=candidate,
        promote_e=promote_e,
        rollback_e=rollback_e,
        trouble_e=trouble_e,
    )


def e_value(a: Counts, b: Counts, margin: float = 0.0) -> float:
    """Evidence against H0, that a's success probability is at most b's less the margin; at most 1 without episodes."""
    log_e = _log_predicted(a) + _log_predicted(b) - _log_largest(a, b, margin)
    return math.exp(min(log_e, 700.0))  # e^710 is no float


def _trouble_e(rule: GateRule, live: Tally, candidate: Tally) -> float:
    """Evidence that the candidate is held or clipped more; 0 while the rise is none that matters."""
    if candidate.trouble - live.trouble <= rule.trouble_rise:
        return 0.0
    pairs = zip(candidate.above, live.above, strict=True)
    return sum(e_value(Counts(c, candidate.episodes), Counts(n, live.episodes)) for c, n in pairs) / len(LEVELS)


def _log_predicted(counts: Counts) -> float:
    """log P = log B(successes + 1/2, failures + 1/2) / B(1/2, 1/2), where B(1/2, 1/2) = pi."""
    successes, episodes = counts
    failures = episodes - successes
    return math.lgamma(successes + 0.5) + math.lgamma(failures + 0.5) - math.lgamma(episodes + 1) - math.log(math.pi)


def _log_largest(a: Counts, b: Counts, margin: float) -> float:
    """log of the largest likelihood of both where p_a <= p_b - margin: at their rates, or where p_b = p_a + margin."""
    if not a.episodes or not b.episodes or a.rate <= b.rate - margin:
        return _log_likelihood(a, a.rate) + _log_likelihood(b, b.rate)
    p = _likeliest(a, b, margin) if margin else (a.successes + b.successes) / (a.episodes + b.episodes)
    return _log_likelihood(a, p) + _log_likelihood(b, p + margin)


def _likeliest(a: Counts, b: Counts, margin: float) -> float:
    """The p that makes p for a and p + margin for b likeliest: the log-likelihood is concave, its slope is bisected."""
    low, high = 0.0, 1 - margin
    for _ in range(30):  # to 1e-9
        p, q = (low + high) / 2, (low + high) / 2 + margin
        slope = (a.successes - a.episodes * p) / (p * (1 - p)) + (b.successes - b.episodes * q) / (q * (1 - q))
        low, high = (p, high) if slope > 0 else (low, p)
    return high


def _log_likelihood(counts: Counts, p: float) -> float:
    """successes log p + failures log (1 - p), where 0 log 0 = 0."""
    successes, episodes = counts
    failures = episodes - successes
    return (successes and successes * math.log(p)) + (failures and failures * math.log(1 - p))
