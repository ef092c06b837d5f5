"""What is sampled depends on the request alone, and follows the model's distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.decoding import decode
from policy_server.vla.sampling import Sampler, uniform_numbers
from policy_server.vla.scoring import score
from tests.vla.requests import random_requests


def test_the_same_request_is_answered_the_same(nano: Checkpoint, rng: np.random.Generator):
    (request,) = random_requests(nano, 1, rng, greedy=0)
    first, second = decode(nano.model, [request]), decode(nano.model, [request])
    assert np.array_equal(first.token_ids_BN, second.token_ids_BN)


def test_seed_and_decision_each_change_the_answer(nano: Checkpoint, rng: np.random.Generator):
    (request,) = random_requests(nano, 1, rng, greedy=0)
    variants = [request, replace(request, seed=9), replace(request, decision=9)]
    ids = decode(nano.model, variants).token_ids_BN
    assert len({row.tobytes() for row in ids}) == 3


def test_seeds_use_all_of_their_64_bits():
    streams = [uniform_numbers(seed, 0, (1, 4)) for seed in (1, 1 + 2**32, 2**64 - 1)]
    assert len({stream.tobytes() for stream in streams}) == 3


def test_seed_and_decision_are_not_interchangeable():
    assert not np.array_equal(uniform_numbers(1, 2, (1, 4)), uniform_numbers(2, 1, (1, 4)))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_each_number_is_uniform_and_only_those_of_one_dimension_are_correlated(correlation: float):
    chunks_nKA = np.stack([uniform_numbers(seed, 3, (4, 2), correlation=correlation) for seed in range(4000)])
    assert stats.kstest(chunks_nKA[:, 2, 1], "uniform").pvalue > 1e-4
    normal_nN = stats.norm.ppf(chunks_nKA).reshape(len(chunks_nKA), -1)
    dimension_N = np.arange(8) % 2
    expected_NN = np.where(dimension_N[:, None] == dimension_N, correlation, 0) + (1 - correlation) * np.eye(8)
    assert np.abs(np.corrcoef(normal_nN.T) - expected_NN).max() < 0.08


def test_shared_noise_changes_the_tokens_and_log_probabilities_stay_those_of_each(
    nano: Checkpoint, rng: np.random.Generator
):
    (request,) = random_requests(nano, 1, rng, greedy=0)
    alone, shared = decode(nano.model, [request]), decode(nano.model, [replace(request, noise_correlation=0.9)])
    assert not np.array_equal(alone.token_ids_BN, shared.token_ids_BN)
    scored = score(nano.model, [request.prepared], shared.token_ids_BN, request.temperature)
    assert np.abs(scored - shared.token_logprobs_BN).max() < 1e-4


def test_greedy_answers_ignore_the_seed(nano: Checkpoint, rng: np.random.Generator):
    (request,) = random_requests(nano, 1, rng, greedy=1)
    ids = decode(nano.model, [request, replace(request, seed=123)]).token_ids_BN
    assert np.array_equal(ids[0], ids[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_tokens_follow_the_distribution_at_the_temperature(rng: np.random.Generator, temperature: float):
    """Chi-square of 4000 requests, each with its own seed; columns of few expected draws count together."""
    draws = 4000
    logits_V = torch.from_numpy(rng.normal(size=256)).float() * 2
    uniform = np.stack([uniform_numbers(seed, 3, (1, 1))[0] for seed in range(draws)])
    sampler = Sampler.of([temperature] * draws, uniform)
    columns = sampler.choose(logits_V.expand(draws, -1), 0).numpy()
    expected = torch.softmax(logits_V.double() / temperature, -1).numpy() * draws
    observed, frequent = np.bincount(columns, minlength=256), expected >= 10
    observed = np.append(observed[frequent], observed[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_a_column_of_no_probability_is_never_chosen():
    logits_BV = torch.full((2, 256), -2000.0)
    logits_BV[:, 7] = 0
    sampler = Sampler.of([1.0, 1.0], np.array([[0.0], [np.nextafter(1, 0)]]))
    assert sampler.choose(logits_BV, 0).tolist() == [7, 7]


def test_token_ids_are_action_tokens_only(nano: Checkpoint, rng: np.random.Generator):
    ids = decode(nano.model, random_requests(nano, 8, rng, greedy=0)).token_ids_BN
    assert ids.dtype == np.int32 and ids.shape == (8, nano.config.action_tokens)
    assert ids.min() >= nano.config.action_begin and ids.max() < nano.config.vocabulary
