"""The gate's laws: evidence as computed by hand, errors at most as stated, and neighbours paired."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import rel_entr

from policy_server.gate import (
    Comparison,
    Evidence,
    GateRule,
    Judgement,
    Trial,
    closest,
    departure,
    judge,
    takes_candidate,
)

RULE = GateRule()
STREAMS = 400
GRID = np.linspace(0.001, 0.999, 500)


def trials(successes: int, episodes: int, *, clips: int = 0) -> list[Trial]:
    """Of 100 ticks each, and so many of them clipped; successes come first."""
    return [Trial(success=index < successes, ticks=100, clips=clips) for index in range(episodes)]


def judged(live: list[Trial], candidate: list[Trial], rule: GateRule = RULE) -> Judgement:
    """Of all these episodes; the versions take turns while both have some."""
    comparison = Comparison.under(rule)
    for of_live, of_candidate in itertools.zip_longest(live, candidate):
        for trial, of_the_candidate in ((of_live, False), (of_candidate, True)):
            if trial is not None:
                comparison = comparison.plus(trial, of_candidate=of_the_candidate)
    return judge(rule, comparison)


def evidence(pairs: list[tuple[bool, bool]], margin: float = 0.0) -> float:
    found = Evidence(margin=margin)
    for a, b in pairs:
        found = found.plus(a, b)
    return found.e


def test_evidence_is_what_was_predicted_over_what_lies_closest_to_it_under_the_hypothesis():
    # Both outcomes of a first pair are predicted with 1/2.  Closest with q_a <= q_b - 0.1: 0.45 and 0.55.
    assert evidence([(True, False)], 0.1) == pytest.approx((0.5 / 0.45) ** 2)
    assert evidence([(True, True)], 0.1) == pytest.approx(0.5 / 0.45 * 0.5 / 0.55)
    # Without a margin a first pair shows nothing.  A second one like it is predicted with 3/4 each; closest: 1/2.
    assert evidence([(True, False)]) == 1
    assert evidence([(True, False)] * 2) == pytest.approx((3 / 4 / (1 / 2)) ** 2)
    assert evidence([(True, False), (False, True)]) == pytest.approx((1 / 4 / (1 / 2)) ** 2)
    # What is predicted obeys the hypothesis: whatever comes then shows nothing.
    assert evidence([(False, True)] * 9) == evidence([(False, True)] * 8 + [(True, False)]) == 1


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_the_closest_is_that_of_a_search_through_all_probabilities(margin):
    q_a, q_b = np.meshgrid(GRID, GRID, indexing="ij")
    for p_a, p_b in itertools.product((0.02, 0.3, 0.5, 0.95), repeat=2):
        apart = sum(rel_entr(p, q) + rel_entr(1 - p, 1 - q) for p, q in ((p_a, q_a), (p_b, q_b)))
        least = np.where(q_a <= q_b - margin + 1e-9, apart, np.inf).min()
        found = sum(
            rel_entr(p, q) + rel_entr(1 - p, 1 - q) for p, q in zip((p_a, p_b), closest(p_a, p_b, margin), strict=True)
        )
        assert least - 2e-3 < found <= least + 1e-9


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_where_the_hypothesis_is_true_a_pair_is_expected_to_add_nothing(margin):
    """Whatever was predicted: the law that all else rests on."""
    true = [(a, b) for a in np.linspace(0, 1, 21) for b in np.linspace(0, 1, 21) if a <= b - margin + 1e-9]
    for of_a, of_b in itertools.product(range(6), repeat=2):
        seen = Evidence(margin=margin, pairs=5, of_a=of_a, of_b=of_b)
        for p_a, p_b in true:
            chances = [(a, b, (p_a if a else 1 - p_a) * (p_b if b else 1 - p_b)) for a in (0, 1) for b in (0, 1)]
            assert sum(chance * seen.plus(bool(a), bool(b)).e for a, b, chance in chances) <= 1 + 1e-9


def test_evidence_beyond_what_a_float_holds_is_as_much_as_one_holds():
    assert 1e300 < evidence([(True, False)] * 5000) < np.inf


def test_nothing_is_shown_while_one_of_the_two_has_no_episode():
    assert judged([], []).verdict == "open"
    most = RULE.max_episodes - 1
    assert judged([], trials(most, most, clips=90)).verdict == judged(trials(99, 99), []).verdict == "open"


def shares(
    this: Trial, other: Trial, p_live: float, p_candidate: float, *, rule: GateRule = RULE, drift: float = 0.0
) -> dict[str, float]:
    """Verdict -> share of STREAMS streams that end with it, judged after every episode: `this` with probability p.

    drift: what both p have gained in the end, after 300 episodes.
    """
    rng = np.random.default_rng(0)
    ends = [first_verdict((this, other), (p_live, p_candidate), rng, rule, drift) for _ in range(STREAMS)]
    return {verdict: ends.count(verdict) / STREAMS for verdict in ("promote", "roll back", "undecided")}


def first_verdict(
    kinds: tuple[Trial, Trial], p_2: tuple[float, float], rng: np.random.Generator, rule: GateRule, drift: float
) -> str:
    comparison = Comparison.under(rule)
    while (verdict := judge(rule, comparison).verdict) == "open":
        whose = takes_candidate(rule, rng.random())
        gained = drift * min((comparison.live.ended + comparison.candidate.ended) / 300, 1)
        comparison = comparison.plus(kinds[rng.random() >= p_2[whose] + gained], of_candidate=whose)
    return verdict


def successes(p_live: float, p_candidate: float, *, rule: GateRule = RULE, drift: float = 0.0) -> dict[str, float]:
    succeeds, fails = (Trial(success=success, ticks=100) for success in (True, False))
    return shares(succeeds, fails, p_live, p_candidate, rule=rule, drift=drift)


def stuck(p_live: float, p_candidate: float) -> dict[str, float]:
    """All succeed; some are clipped in 75 of 100 ticks, above seven levels, the others in 5, above none."""
    often, seldom = (Trial(success=True, ticks=100, clips=clips) for clips in (75, 5))
    return shares(often, seldom, p_live, p_candidate)


@pytest.mark.parametrize("p_live", [0.2, 0.5, 0.8, 0.95])
def test_a_candidate_that_is_worse_by_the_margin_is_promoted_no_more_often_than_stated(p_live):
    assert successes(p_live, p_live - RULE.margin)["promote"] <= RULE.promote_error


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_candidate_that_is_as_good_is_rolled_back_no_more_often_than_stated(p):
    assert successes(p, p)["roll back"] <= RULE.rollback_error


def test_a_much_better_candidate_is_promoted_and_a_much_worse_one_is_rolled_back():
    assert successes(0.3, 0.7)["promote"] > 0.95
    assert successes(0.8, 0.2)["roll back"] > 0.95


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_a_candidate_that_gets_stuck_as_often_is_rolled_back_for_it_no_more_often_than_stated(p):
    assert stuck(p, p)["roll back"] <= RULE.trouble_error


def test_a_candidate_that_gets_stuck_far_more_often_is_rolled_back():
    assert stuck(0.1, 0.7)["roll back"] > 0.95


def test_a_finding_needs_evidence_of_one_over_its_error_and_no_more():
    said = [judged(trials(20, 40), trials(count, 40)[::-1]) for count in range(41)]
    for judgement in said:
        failing = judgement.rollback_e >= 1 / RULE.rollback_error
        good = judgement.promote_e >= 1 / RULE.promote_error
        assert judgement.verdict == ("roll back" if failing else "promote" if good else "open")
    assert {judgement.verdict for judgement in said} == {"roll back", "promote", "open"}


def test_trouble_rolls_back_at_once_however_well_the_candidate_does():
    live, candidate = trials(0, 5, clips=5), trials(5, 5, clips=55)
    # Five of nine levels lie between 5 and 55 %.  At each, every pair is one that befell the candidate alone, predicted
    # with 1/2, 3/4, 5/6, 7/8 and 9/10 twice, while 1/2 twice lies closest.  At the others a pair shows nothing, and
    # errors, of which there are none, have no part.
    expected = (5 * (63 / 256) ** 2 * 2**10 + 4) / 10
    judgement = judged(live, candidate)
    assert judgement.trouble_e == pytest.approx(expected) and expected > 20
    assert judgement.verdict == "roll back" and judgement.reason.startswith("the candidate is held or clipped, or ")
    before = judged(live, trials(0, 4, clips=55))
    assert 9 < before.trouble_e < 20 and before.verdict == "open"


def test_holds_are_trouble_as_clips_are():
    held = [Trial(success=False, ticks=100, holds=50, clips=5) for _ in range(5)]
    assert (
        judged(trials(0, 5, clips=5), held).trouble_e == judged(trials(0, 5, clips=5), trials(0, 5, clips=55)).trouble_e
    )


def test_an_equal_rate_of_trouble_never_rolls_back_nor_does_a_rise_that_is_none():
    for clips in range(0, 101, 5):
        assert judged(trials(20, 40, clips=clips), trials(20, 40, clips=clips)).trouble_e == 0
    certain = judged(trials(20, 40, clips=5), trials(20, 40, clips=14))
    assert certain.trouble_e == 0 and certain.verdict == "open"


ERROR = Trial(success=False, error=True, ticks=0)


def test_a_candidate_that_ends_in_errors_is_rolled_back_where_the_live_version_only_fails():
    # Each of six pairs befell the candidate alone: 1/2, 3/4, 5/6, 7/8, 9/10 and 11/12 twice, over 1/2 twice.
    judgement = judged(trials(0, 6), [ERROR] * 6)
    assert judgement.trouble_e == pytest.approx((231 / 1024) ** 2 * 2**12 / 10) and judgement.rollback_e == 1
    assert judgement.verdict == "roll back" and "errors 6, live 0" in judgement.reason
    assert (judgement.candidate.episodes, judgement.candidate.errors) == (0, 6)


def test_an_error_is_no_success_so_that_one_who_errs_is_not_promoted_for_what_else_it_does():
    now_and_then = [trial for pair in zip(trials(15, 15), [ERROR] * 15, strict=True) for trial in pair]
    failing = [trial for pair in zip(trials(15, 15), trials(0, 15), strict=True) for trial in pair]
    erring, other = judged(trials(30, 30), now_and_then), judged(trials(30, 30), failing)
    assert (erring.promote_e, erring.rollback_e) == (other.promote_e, other.rollback_e)
    assert erring.verdict == other.verdict == "roll back"


def test_errors_that_befall_both_are_no_trouble():
    comparison = Comparison.under(RULE)
    for _ in range(20):
        comparison = comparison.plus(ERROR, of_candidate=True).plus(ERROR, of_candidate=False)
    assert comparison.broken.e == 1 and judge(RULE, comparison).verdict == "open"


def test_an_error_opens_no_door_to_a_rise_of_holds_that_is_none():
    few, more = trials(20, 20, clips=8), trials(20, 20, clips=12)
    assert judged(few, [*more[:3], ERROR, *more[3:7]]).trouble_e < 1 / RULE.trouble_error


def test_errors_too_come_to_an_end():
    rule = GateRule(max_episodes=4)
    assert [judged([], [ERROR] * count, rule).verdict for count in (3, 4)] == ["open", "undecided"]


def test_a_success_after_a_takeover_is_none_of_the_policys():
    helped = [Trial(success=True, intervened=True, ticks=100)] * 30
    tally = judged([], helped).candidate
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


def test_neighbours_are_paired_and_what_came_long_before_waits():
    """After twenty failures of the live version, whose turn it was, both succeed in turn."""
    old, turns = trials(0, 20), trials(10, 10)
    comparison = Comparison.under(RULE)
    for trial in old:
        comparison = comparison.plus(trial, of_candidate=False)
    for trial in turns:
        comparison = comparison.plus(trial, of_candidate=False).plus(trial, of_candidate=True)
    alone = judged(turns, turns)
    assert (comparison.as_good.e, comparison.worse.e) == (alone.promote_e, alone.rollback_e)
    assert comparison.waiting == tuple(old)


def test_where_success_drifts_the_errors_are_as_stated_whatever_the_share():
    few = GateRule(share=0.2)
    assert successes(0.25, 0.1, rule=few, drift=0.6)["promote"] <= few.promote_error
    assert successes(0.85, 0.85, rule=few, drift=-0.6)["roll back"] <= few.rollback_error


def test_the_reason_has_the_numbers():
    judgement = judged(trials(2, 30, clips=4), trials(29, 30, clips=6))
    assert judgement.verdict == "promote"
    assert judgement.reason.startswith(
        "the candidate does not succeed less often by 0.1 or more: success 29 of 30, live 2 of 30; held or clipped 6.0%"
        f" of ticks, live 4.0%; errors 0, live 0; e-values: promote {judgement.promote_e:.3g} (needs 20), roll back "
    )


def test_one_number_that_is_turned_about_is_far_off_however_many_are_the_same():
    live_nKA = np.random.default_rng(0).uniform(-1, 1, (4, 3, 7))
    turned_nKA = live_nKA * [1, 1, 1, 1, 1, 1, -1]
    apart_A = departure(live_nKA, turned_nKA, np.full(7, 2.0))
    assert apart_A[6] == pytest.approx(np.abs(live_nKA[..., 6]).mean()) and apart_A[6] > RULE.envelope
    assert not apart_A[:6].any()


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
