from __future__ import annotations

import numpy as np
import pytest

from rl_trainer.advantage import gae, group_relative, leave_one_out, normalised, plain_sum, potential_shaping

REWARDS, VALUES, TICKS = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.25, 0.75]), np.array([1, 1, 1])


def test_gae_with_termination_is_that_computed_by_hand() -> None:
    """delta = (.5 * .25 - .5, .5 * .75 - .25, 1 - .75); each is passed on with .5 * .8 = .4."""
    advantage = gae(REWARDS, VALUES, 0.0, TICKS, gamma=0.5, lambda_=0.8)
    last, middle = 0.25, 0.125 + 0.4 * 0.25
    np.testing.assert_allclose(advantage, [-0.375 + 0.4 * middle, middle, last])


def test_gae_with_truncation_adds_the_discounted_value_of_what_came_after() -> None:
    """Defect 6: running out of time is no termination."""
    ended = gae(REWARDS, VALUES, 0.0, TICKS, gamma=0.5, lambda_=0.8)
    cut = gae(REWARDS, VALUES, 0.6, TICKS, gamma=0.5, lambda_=0.8)
    np.testing.assert_allclose(cut - ended, [0.4**2 * 0.3, 0.4 * 0.3, 0.3])


def test_gae_discounts_by_executed_ticks_and_its_lambda_by_decisions() -> None:
    """Ticks 2, 3, 1 at gamma .5: discounts .25, .125, .5."""
    advantage = gae(REWARDS, VALUES, 0.6, np.array([2, 3, 1]), gamma=0.5, lambda_=0.8)
    last = 1 + 0.5 * 0.6 - 0.75
    middle = 0.125 * 0.75 - 0.25 + 0.8 * 0.125 * last
    first = 0.25 * 0.25 - 0.5 + 0.8 * 0.25 * middle
    np.testing.assert_allclose(advantage, [first, middle, last])


def test_gae_with_lambda_one_is_the_discounted_return_less_the_value() -> None:
    advantage = gae(REWARDS, VALUES, 0.0, np.array([2, 3, 1]), gamma=0.9, lambda_=1.0)
    np.testing.assert_allclose(advantage + VALUES, [0.9**5, 0.9**3, 1.0])


def test_gae_of_one_decision_is_its_error() -> None:
    assert gae(np.array([1.0]), np.array([0.2]), 0.0, np.array([4]), gamma=0.9, lambda_=0.9) == pytest.approx([0.8])


def test_grpo_standardises_within_what_began_alike() -> None:
    """Returns 1, 0, 0, 0: mean 1/4, standard deviation sqrt(3)/4."""
    groups = [("task", "a"), ("task", "b"), ("task", "a"), ("task", "a"), ("task", "b"), ("task", "a")]
    returns = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    expected = [3**0.5, 1.0, -(3**-0.5), -(3**-0.5), -1.0, -(3**-0.5)]
    np.testing.assert_allclose(group_relative(returns, groups), expected)


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    groups = ["a", "b", "a", "a", "b"]
    returns = np.array([1.0, 1.0, 0.0, 0.5, 0.0])
    expected = [1 - 0.25, 1.0, 0 - 0.75, 0.5 - 0.5, -1.0]
    np.testing.assert_allclose(leave_one_out(returns, groups), expected, atol=1e-15)


@pytest.mark.parametrize("compare", [group_relative, leave_one_out])
def test_a_group_of_equals_and_one_without_others_teach_nothing(compare) -> None:
    returns = np.array([0.1, 0.1, 0.1, 0.7])  # the mean of three 0.1 is not 0.1 in binary
    np.testing.assert_allclose(compare(returns, ["a", "a", "a", "b"]), np.zeros(4), atol=1e-15)


def test_normalised_advantages_have_mean_0_and_deviation_1() -> None:
    np.testing.assert_allclose(normalised(np.array([1.0, 3.0, 5.0])), [-(1.5**0.5), 0, 1.5**0.5])


def test_advantages_that_are_all_alike_are_none() -> None:
    np.testing.assert_array_equal(normalised(np.full(3, 0.1)), np.zeros(3))


def test_shaping_is_the_discounted_gain_of_potential() -> None:
    """Phi .2, .6, then .8 where it was truncated: .25 * .6 - .2 and .5 * .8 - .6 at gamma .5, ticks 2 and 1."""
    shaped = potential_shaping(np.array([0.0, 1.0]), np.array([0.2, 0.6]), 0.8, np.array([2, 1]), gamma=0.5)
    np.testing.assert_allclose(shaped, [-0.05, 0.8])


def test_at_a_terminal_state_the_potential_is_zero_and_paid_back() -> None:
    shaped = potential_shaping(np.array([0.0, 1.0]), np.array([0.2, 0.6]), 0.0, np.array([2, 1]), gamma=0.5)
    np.testing.assert_allclose(shaped, [-0.05, 0.4])


@pytest.mark.parametrize("after", [0.0, 0.8])
def test_shaping_moves_every_return_by_a_constant_of_its_first_state(after: float) -> None:
    """So it cannot change which policy is best: the discounted sum telescopes to gamma^total Phi(end) - Phi(start)."""
    ticks, potential = np.array([4, 1, 3]), np.array([0.3, 0.9, 0.1])
    added = potential_shaping(np.zeros(3), potential, after, ticks, gamma=0.9)
    before = 0.9 ** np.array([0, 4, 5])
    assert (before * added).sum() == pytest.approx(0.9**8 * after - 0.3)


def test_the_papers_reward_is_the_plain_sum() -> None:
    assert plain_sum(np.array([0, 0, 1]), np.array([1, 0, 1])).tolist() == [1, 0, 2]
