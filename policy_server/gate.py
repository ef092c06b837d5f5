"""The promotion gate: whether a candidate version takes the live one's place, from what came of their episodes.

A candidate takes a share of a session's episodes, drawn by chance, beside the live version.  Whoever runs the session
asks `judge` after every finished episode, and stops at the first verdict that is not `open`:

    roll back    it is held or clipped, or ends as an error, more than the live version (trouble), or it succeeds less
                 often
    promote      it does not succeed less often by `margin` or more
    undecided    neither was shown in `max_episodes` of its episodes: it is dropped, and the live version stays

Each finding refutes its opposite by an e-process.  In the order in which they began, an episode is paired with the
last one of the other version that has no pair yet; where there is none, it waits.  Of two versions a and b, and of the
hypothesis H0 that their success probabilities obey a <= b - margin, evidence is multiplied, for each pair, by

    P(outcome of a) P(outcome of b) / Q(outcome of a) Q(outcome of b)

where P is predicted from the pairs before, by Krichevsky and Trofimov's rule: success with (s + 1/2) / (n + 1) after s
successes in n episodes; and Q, of all probabilities that obey H0, is what lies closest to P by its divergence from it.
If H0 is true, this factor is expected to be 1 at most, whatever P is: the evidence is a supermartingale that begins at
1, so that by Ville's inequality it comes to 1 / error, ever, with a probability of at most `error`: however often one
looks, and whenever one stops.  What is assumed: episodes are independent, and H0 holds in every pair, though the two
probabilities may drift from pair to pair.  With several robots that holds in the order in which episodes began, not
ended: a failure takes longer.  Who has a pair follows from chance alone, and pairs are neighbours for the most part: a
share far from one half leaves old episodes without a pair, and pairs none of today's with one of long ago.

An episode that ended as an error is no success.

Trouble is found in the same way.  For every tenth there is evidence from whether more than that share of an episode's
ticks was held or clipped, and there is evidence from whether it ended as an error, against H0 that this befalls the
candidate no more often; the mean of all ten obeys the same law.  An episode counts once, however its ticks hang
together.  What was held or clipped counts only while the candidate's share of all its ticks exceeds the live version's
by more than `trouble_rise`; errors, while its share of episodes does.

Sources: Turner, Ly and Grünwald 2024, Generic E-variables for exact sequential k-sample tests that allow for optional
stopping; Ramdas, Grünwald, Vovk and Shafer 2023, Game-theoretic statistics and safe anytime-valid inference;
Krichevsky and Trofimov 1981, The performance of universal encoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

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
    """probability that one which is held and clipped, and ends as an error, no more is rolled back for it, at most"""
    trouble_rise: float = 0.1
    """a smaller rise in the share of ticks that are held or clipped, or of errors, is no trouble"""
    share: float = 0.5
    """of the session's episodes that the candidate gets"""
    max_episodes: int = 60
    """of the candidate; then it is dropped (how often by then: benchmarks/gate.py)"""
    envelope: float = 0.25
    """how far the candidate's actions may lie from the live version's before any robot sees one: in the mean over what
    the session's robots saw lately, in that number of an action which differs most; 1 is its whole range"""

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
    """What the gate sees of a finished episode."""

    success: bool
    error: bool = False
    """it ended as one: the robot said so or fell silent, or it never ended"""
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
    def own_success(self) -> bool:
        """Without a person's help."""
        return self.success and not self.intervened

    @property
    def trouble(self) -> float:
        """Share of its ticks that were held or clipped."""
        return (self.holds + self.clips) / max(self.ticks, 1)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What came of a version's episodes since the candidate began, in whatever order."""

    episodes: int = 0
    """without those that ended as errors, as all but `errors`"""
    successes: int = 0
    """without a person's help"""
    interventions: int = 0
    """episodes in which a person took over"""
    ticks: int = 0
    holds: int = 0
    clips: int = 0
    errors: int = 0
    """episodes that ended as one"""

    def plus(self, trial: Trial) -> Tally:
        """With one episode more."""
        if trial.error:
            return replace(self, errors=self.errors + 1)
        return replace(
            self,
            episodes=self.episodes + 1,
            successes=self.successes + trial.own_success,
            interventions=self.interventions + trial.intervened,
            ticks=self.ticks + trial.ticks,
            holds=self.holds + trial.holds,
            clips=self.clips + trial.clips,
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Of its success: Wilson's at 95 %, to be shown: no verdict rests on it.  All of [0, 1] without episodes."""
        if not self.episodes:
            return 0.0, 1.0
        n, p, z2 = self.episodes, self.successes / self.episodes, Z_95**2
        middle, reach = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (middle - reach) / (1 + z2 / n)), min(1.0, (middle + reach) / (1 + z2 / n))

    @property
    def trouble(self) -> float:
        """Share of all ticks that were held or clipped; 0 without ticks."""
        return (self.holds + self.clips) / max(self.ticks, 1)

    @property
    def ended(self) -> int:
        """Episodes, errors too."""
        return self.episodes + self.errors

    @property
    def error_share(self) -> float:
        """Of its episodes, those that ended as errors; 0 without any."""
        return self.errors / max(self.ended, 1)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Against H0, that something befalls a with a probability of at most b's less the margin."""

    margin: float = 0.0
    pairs: int = 0
    of_a: int = 0
    """pairs in which it befell a"""
    of_b: int = 0
    log_e: float = 0.0

    @property
    def e(self) -> float:
        """At least 1 / error with a probability of at most `error`, if H0 is true; 1 without pairs."""
        return math.exp(min(self.log_e, 700.0))  # e^710 is no float

    def plus(self, a: bool, b: bool) -> Evidence:
        """With one pair more, in which it befell a, b, both or none."""
        p_a, p_b = (self.of_a + 0.5) / (self.pairs + 1), (self.of_b + 0.5) / (self.pairs + 1)
        q_a, q_b = closest(p_a, p_b, self.margin)
        gain = math.log(p_a / q_a if a else (1 - p_a) / (1 - q_a)) + math.log(p_b / q_b if b else (1 - p_b) / (1 - q_b))
        return replace(self, pairs=self.pairs + 1, of_a=self.of_a + a, of_b=self.of_b + b, log_e=self.log_e + gain)


def closest(p_a: float, p_b: float, margin: float) -> tuple[float, float]:
    """Of all (q_a, q_b) with q_a <= q_b - margin, what P diverges from least; P itself where it is one of them."""
    if p_a <= p_b - margin:
        return p_a, p_b
    if not margin:
        return (p_a + p_b) / 2, (p_a + p_b) / 2
    low, high = 0.0, 1 - margin
    for _ in range(40):  # to 1e-12: the divergence from (q, q + margin) is convex in q
        q_a, q_b = (low + high) / 2, (low + high) / 2 + margin
        slope = (p_a - q_a) / (q_a * (1 - q_a)) + (p_b - q_b) / (q_b * (1 - q_b))
        low, high = (q_a, high) if slope > 0 else (low, q_a)
    return low, low + margin


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A trial so far: episodes of the candidate and of the live version, in the order in which they began."""

    live: Tally = Tally()
    candidate: Tally = Tally()
    waiting: tuple[Trial, ...] = ()
    """for the other version's: of the candidate where it has more episodes, of the live version where that has"""
    as_good: Evidence = Evidence()
    """that the candidate succeeds less often by less than the margin, if at all"""
    worse: Evidence = Evidence()
    """that it succeeds less often"""
    troubled: tuple[Evidence, ...] = (Evidence(),) * len(LEVELS)
    """for each of LEVELS: that a larger share of ticks is held or clipped in more of its episodes"""
    broken: Evidence = Evidence()
    """that more of its episodes end as errors"""

    @classmethod
    def under(cls, rule: GateRule) -> Comparison:
        """Without episodes."""
        return cls(as_good=Evidence(margin=rule.margin))

    def plus(self, trial: Trial, *, of_candidate: bool) -> Comparison:
        """With one episode more."""
        lead = self.candidate.ended - self.live.ended
        whose = "candidate" if of_candidate else "live"
        counted = replace(self, **{whose: getattr(self, whose).plus(trial)})
        if lead == 0 or (lead > 0) == of_candidate:
            return replace(counted, waiting=(*self.waiting, trial))
        *waiting, other = self.waiting
        candidate, live = (trial, other) if of_candidate else (other, trial)
        return replace(
            counted,
            waiting=tuple(waiting),
            as_good=self.as_good.plus(candidate.own_success, live.own_success),
            worse=self.worse.plus(live.own_success, candidate.own_success),
            troubled=tuple(
                evidence.plus(candidate.trouble > level, live.trouble > level)
                for evidence, level in zip(self.troubled, LEVELS, strict=True)
            ),
            broken=self.broken.plus(candidate.error, live.error),
        )


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
    """evidence that it is held or clipped, or ends as an error, more"""


def takes_candidate(rule: GateRule, draw: float) -> bool:
    """Whether the next episode goes to the candidate; draw: uniform in [0, 1), a new one for every episode.

    Chance alone keeps the two versions comparable, whatever robots ask and in which order.
    """
    return draw < rule.share


def departure(live_nKA: np.ndarray, candidate_nKA: np.ndarray, span_A: np.ndarray) -> np.ndarray:
    """Mean distance of two versions' answers to the same observations, (A,), in parts of each number's range span_A.

    The largest tells: a mean over all numbers would hide one that is turned about.
    """
    return (np.abs(candidate_nKA - live_nKA) / span_A).mean(axis=(0, 1))


def judge(rule: GateRule, trial: Comparison) -> Judgement:
    """The verdict on the episodes so far.  The errors are as stated if the first one that is not `open` is kept."""
    live, candidate = trial.live, trial.candidate
    promote_e, rollback_e = trial.as_good.e, trial.worse.e
    held = sum(evidence.e for evidence in trial.troubled) * (candidate.trouble - live.trouble > rule.trouble_rise)
    broken = trial.broken.e * (candidate.error_share - live.error_share > rule.trouble_rise)
    trouble_e = (held + broken) / (len(LEVELS) + 1)
    if trouble_e >= 1 / rule.trouble_error:
        verdict, finding = "roll back", "the candidate is held or clipped, or ends as an error, more"
    elif rollback_e >= 1 / rule.rollback_error:
        verdict, finding = "roll back", "the candidate succeeds less often"
    elif promote_e >= 1 / rule.promote_error:
        verdict, finding = "promote", f"the candidate does not succeed less often by {rule.margin:g} or more"
    elif candidate.ended >= rule.max_episodes:
        verdict, finding = "undecided", f"nothing was shown in {rule.max_episodes} episodes of the candidate"
    else:
        verdict, finding = "open", "nothing is shown yet"
    return Judgement(
        verdict=verdict,
        reason=(
            f"{finding}: success {candidate.successes} of {candidate.ended}, live {live.successes} of"
            f" {live.ended}; held or clipped {candidate.trouble:.1%} of ticks, live {live.trouble:.1%};"
            f" errors {candidate.errors}, live {live.errors};"
            f" e-values: promote {promote_e:.3g} (needs {1 / rule.promote_error:g}), roll back {rollback_e:.3g}"
            f" ({1 / rule.rollback_error:g}), trouble {trouble_e:.3g} ({1 / rule.trouble_error:g})"
        ),
        live=live,
        candidate=candidate,
        promote_e=promote_e,
        rollback_e=rollback_e,
        trouble_e=trouble_e,
    )
