"""The gate's laws: evidence as computed by hand, errors at most as stated, and no verdict that hangs on an order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy.special import xlog1py, xlogy
from scipy.stats import binom

from policy_server.gate import Counts, GateRule, Judgement, Tally, Trial, e_value, judge, takes_candidate

RULE = GateRule()
STREAMS = 2000
SMALL = (Counts(0, 3), Counts(3, 3), Counts(17, 20), Counts(9, 40), Counts(1, 1))


def trials(successes: int, episodes: int, *, clips: int = 0) -> list[Trial]:
    """Of 100 ticks each, and so many of them clipped."""
    return [Trial(success=index < successes, ticks=100, clips=clips) for index in range(episodes)]


def judged(live: list[Trial], candidate: list[Trial], rule: GateRule = RULE) -> Judgement:
    return judge(rule, Tally.of(live), Tally.of(candidate))


def test_evidence_is_what_was_predicted_over_the_largest_likelihood_under_the_hypothesis():
    # Both outcomes are predicted with 1/2.  Largest p (1 - p - 0.1): at p = 0.45, 0.45^2.
    assert e_value(Counts(1, 1), Counts(0, 1), 0.1) == pytest.approx(0.25 / 0.45**2)
    # Two like outcomes are predicted with 1/2 and 3/4.  Largest p^2 (1 - p)^2: 1/16.
    assert e_value(Counts(2, 2), Counts(0, 2)) == pytest.approx((3 / 8) ** 2 * 16)
    # The rates obey the hypothesis.  A success and a failure: 1/2 and 1/4, over (1/2)^2; two successes: 3/8 over 1.
    assert e_value(Counts(1, 2), Counts(2, 2), 0.1) == pytest.approx((1 / 8) / (1 / 4) * (3 / 8))


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_the_largest_likelihood_is_that_of_a_search_through_all_probabilities(margin):
    p_G = np.linspace(0, 1, 1001)
    allowed_GG = p_G[:, None] <= p_G - margin + 1e-9
    for a, b in itertools.product(SMALL, repeat=2):
        a_G, b_G = (xlogy(s, p_G) + xlog1py(n - s, -p_G) for s, n in (a, b))
        largest = np.where(allowed_GG, a_G[:, None] + b_G, -np.inf).max()
        assert np.log(e_value(a, b, margin)) == pytest.approx(np.log(predicted(a) * predicted(b)) - largest, abs=2e-4)


def predicted(counts: Counts) -> float:
    """Krichevsky and Trofimov's probabilities of these outcomes, multiplied one by one."""
    failures = counts.episodes - counts.successes
    of_outcome = [(seen + 0.5) / (seen + 1) for seen in range(counts.successes)]
    of_outcome += [(seen + 0.5) / (counts.successes + seen + 1) for seen in range(failures)]
    return float(np.prod(of_outcome))


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("episodes", [(1, 1), (6, 4), (3, 12), (20, 20)])
def test_where_the_hypothesis_is_true_evidence_is_expected_to_be_1_at_most(margin, episodes):
    n_a, n_b = episodes
    e_AB = [[e_value(Counts(a, n_a), Counts(b, n_b), margin) for b in range(n_b + 1)] for a in range(n_a + 1)]
    for p in np.linspace(0, 1 - margin, 19):
        of_a_A, of_b_B = binom.pmf(np.arange(n_a + 1), n_a, p), binom.pmf(np.arange(n_b + 1), n_b, p + margin)
        assert of_a_A @ np.array(e_AB) @ of_b_B <= 1


def test_evidence_beyond_what_a_float_holds_is_as_much_as_one_holds():
    assert 1e300 < e_value(Counts(5000, 5000), Counts(0, 5000)) < np.inf


def test_nothing_is_shown_while_one_of_the_two_has_no_episode():
    assert judged([], []).verdict == "open"
    assert judged([], trials(99, 99, clips=90)).verdict == judged(trials(99, 99), []).verdict == "open"


def successes(counts: Counts) -> Tally:
    return Tally(episodes=counts.episodes, successes=counts.successes)


def stuck(counts: Counts) -> Tally:
    """All succeed, and so many are clipped in 75 of 100 ticks, above seven levels, the others in 5, above none."""
    count, episodes = counts
    clips = 75 * count + 5 * (episodes - count)
    above = (count,) * 7 + (0, 0)
    return Tally(episodes=episodes, successes=episodes, ticks=100 * episodes, clips=clips, above=above)


@cache
def verdict_of(tally: Callable[[Counts], Tally], live: Counts, candidate: Counts) -> str:
    return judge(RULE, tally(live), tally(candidate)).verdict


def shares(tally: Callable[[Counts], Tally], p_live: float, p_candidate: float) -> dict[str, float]:
    """Verdict -> share of STREAMS streams that end with it, judged after every episode; the versions take turns."""
    rng = np.random.default_rng(0)
    streams_S2E = rng.random((STREAMS, 2, RULE.max_episodes)) < [[p_live], [p_candidate]]
    ends = [first_verdict(tally, *stream_2E.tolist()) for stream_2E in streams_S2E]
    return {verdict: ends.count(verdict) / STREAMS for verdict in ("promote", "roll back", "undecided")}


def first_verdict(tally: Callable[[Counts], Tally], live_E: list[bool], candidate_E: list[bool]) -> str:
    live = candidate = Counts(0, 0)
    for of_live, of_candidate in zip(live_E, candidate_E, strict=True):
        live = Counts(live.successes + of_live, live.episodes + 1)
        if (verdict := verdict_of(tally, live, candidate)) != "open":
            return verdict
        candidate = Counts(candidate.successes + of_candidate, candidate.episodes + 1)
        if (verdict := verdict_of(tally, live, candidate)) != "open":
            return verdict
    raise AssertionError("a stream must end with a verdict")


@pytest.mark.parametrize("p_live", [0.2, 0.5, 0.8, 0.95])
def test_a_candidate_that_is_worse_by_the_margin_is_promoted_no_more_often_than_stated(p_live):
    assert shares(successes, p_live, p_live - RULE.margin)["promote"] <= RULE.promote_error


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_candidate_that_is_as_good_is_rolled_back_no_more_often_than_stated(p):
    assert shares(successes, p, p)["roll back"] <= RULE.rollback_error


def test_a_much_better_candidate_is_promoted_and_a_much_worse_one_is_rolled_back():
    assert shares(successes, 0.3, 0.7)["promote"] > 0.95
    assert shares(successes, 0.8, 0.2)["roll back"] > 0.95


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_a_candidate_that_gets_stuck_as_often_is_rolled_back_for_it_no_more_often_than_stated(p):
    assert shares(stuck, p, p)["roll back"] <= RULE.trouble_error


def test_a_candidate_that_gets_stuck_far_more_often_is_rolled_back():
    assert shares(stuck, 0.1, 0.7)["roll back"] > 0.95


def test_a_finding_needs_evidence_of_one_over_its_error_and_no_more():
    said = [judged(trials(20, 40), trials(count, 40)) for count in range(41)]
    for count, judgement in enumerate(said):
        assert judgement.promote_e == e_value(Counts(count, 40), Counts(20, 40), RULE.margin)
        failing = judgement.rollback_e >= 1 / RULE.rollback_error
        good = judgement.promote_e >= 1 / RULE.promote_error
        assert judgement.verdict == ("roll back" if failing else "promote" if good else "open")
    assert {judgement.verdict for judgement in said} == {"roll back", "promote", "open"}


def test_trouble_rolls_back_at_once_however_well_the_candidate_does():
    live, candidate = trials(0, 5, clips=5), trials(5, 5, clips=55)
    # Five of nine levels lie between 5 and 55 %.  At each, five of five against none of five: five alike are predicted
    # with 1/2 3/4 5/6 7/8 9/10 = 63/256, and the largest likelihood is (1/2)^10.  At the others, none of five twice.
    expected = (5 * (63 / 256) ** 2 * 2**10 + 4 * (63 / 256) ** 2) / 9
    judgement = judged(live, candidate)
    assert judgement.trouble_e == pytest.approx(expected) and expected > 20
    assert judgement.verdict == "roll back" and judgement.reason.startswith("the candidate is held or clipped more: ")
    before = judged(live, trials(0, 4, clips=55))
    assert 10 < before.trouble_e < 20 and before.verdict == "open"


def test_holds_are_trouble_as_clips_are():
    held = [Trial(success=False, ticks=100, holds=50, clips=5) for _ in range(5)]
    assert (
        judged(trials(0, 5, clips=5), held).trouble_e == judged(trials(0, 5, clips=5), trials(0, 5, clips=55)).trouble_e
    )


def test_an_equal_rate_of_trouble_never_rolls_back_nor_does_a_rise_that_is_none():
    for clips in range(0, 101, 5):
        assert judged(trials(40, 80, clips=clips), trials(40, 80, clips=clips)).trouble_e == 0
    certain = judged(trials(40, 80, clips=5), trials(40, 80, clips=14))
    assert certain.trouble_e == 0 and certain.verdict == "open"


def test_a_success_after_a_takeover_is_none_of_the_policys():
    helped = [Trial(success=True, intervened=True, ticks=100)] * 30
    tally = Tally.of(helped)
    assert (tally.episodes, tally.successes, tally.interventions) == (30, 0, 30)
    assert judged(trials(15, 30), helped).verdict == judged(trials(15, 30), trials(0, 30)).verdict == "roll back"


def test_what_is_not_shown_within_the_most_episodes_is_undecided_and_the_candidate_gets_no_more():
    before = judged(trials(50, 100), trials(49, RULE.max_episodes - 1))
    spent = judged(trials(50, 100), trials(50, RULE.max_episodes))
    assert (before.verdict, spent.verdict) == ("open", "undecided")
    assert judged(trials(1, 2), trials(1, 2), GateRule(max_episodes=2)).verdict == "undecided"


def test_what_is_shown_by_the_last_episode_counts():
    rule = GateRule(max_episodes=40)
    assert judged(trials(4, 40), trials(36, 40), rule).verdict == "promote"


def test_a_judgement_does_not_depend_on_the_order_of_the_episodes():
    live = trials(12, 30) + trials(2, 8, clips=40) + [Trial(success=True, intervened=True, ticks=90, holds=3)]
    candidate = trials(25, 30, clips=12) + trials(3, 6, clips=70)
    expected = judged(live, candidate)
    for seed in range(20):
        chance = random.Random(seed)
        assert judged(chance.sample(live, len(live)), chance.sample(candidate, len(candidate))) == expected


def test_the_reason_has_the_numbers():
    judgement = judged(trials(2, 30, clips=4), trials(29, 30, clips=6))
    assert judgement.verdict == "promote"
    assert judgement.reason.startswith(
        "the candidate does not succeed less often by 0.1 or more: success 29 of 30, live 2 of 30; held or clipped 6.0%"
        f" of ticks, live 4.0%; e-values: promote {judgement.promote_e:.3g} (needs 20), roll back "
    )


def test_the_candidate_gets_its_share_of_uniform_draws():
    draws = np.linspace(0, 1, 1000, endpoint=False)
    for share in (0.1, 0.5, 0.9):
        rule = GateRule(share=share)
        assert sum(takes_candidate(rule, float(draw)) for draw in draws) == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("margin", 1.0, r"margin must be in \[0, 1\), got 1.0"),
        ("margin", -0.1, r"margin must be in \[0, 1\), got -0.1"),
        ("trouble_rise", 1.5, r"trouble_rise must be in \[0, 1\), got 1.5"),
        ("promote_error", 0.0, "promote_error must be between 0 and 1, got 0.0"),
        ("rollback_error", 1.0, "rollback_error must be between 0 and 1, got 1.0"),
        ("trouble_error", float("nan"), "trouble_error must be between 0 and 1, got nan"),
        ("share", 1.0, "share must be between 0 and 1, got 1.0"),
        ("max_episodes", 0, "max_episodes must be at least 1, got 0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(field, value, said):
    with pytest.raises(ValueError, match=said):
        GateRule(**{field: value})


@pytest.mark.parametrize(("holds", "clips"), [(-1, 0), (0, -1), (6, 5)])
def test_a_trial_with_impossible_ticks_is_refused(holds, clips):
    with pytest.raises(ValueError, match=rf"together at most ticks \(10\), got {holds} and {clips}"):
        Trial(success=True, ticks=10, holds=holds, clips=clips)
