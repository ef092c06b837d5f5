"""Batching changes nothing but speed: the contract's law, and the laws that bind decoding to scoring."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.decoding import Decoded, decode
from policy_server.vla.model import collate
from policy_server.vla.passes import DecodeInput
from policy_server.vla.policy import Policy
from tests.vla.requests import random_requests

BATCHES = (1, 2, 7, 16)
LOGITS_BOUND = 5e-5


@pytest.fixture(params=["nano", "reference"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return request.getfixturevalue(request.param)


def scores(checkpoint: Checkpoint, requests: list[DecodeInput], token_ids_BN: np.ndarray) -> torch.Tensor:
    prompts = collate([request.prepared for request in requests])
    with torch.inference_mode():
        return checkpoint.model(prompts, torch.from_numpy(token_ids_BN).long()).logits_BNV


def in_batches(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """0 .. count - 1 in random order, cut into batches of 1, 2, 7 and 16."""
    order, cuts = rng.permutation(count), [0]
    while cuts[-1] < count:
        cuts.append(cuts[-1] + int(rng.choice(BATCHES)))
    return [order[a:b] for a, b in pairwise(cuts)]


def test_logits_and_tokens_do_not_depend_on_the_batch(checkpoint: Checkpoint, rng: np.random.Generator):
    """200 random requests; a token may differ only where its two best are within twice the bound, or the cut is."""
    requests = random_requests(checkpoint, 200, rng)
    differing = 0
    for rows in in_batches(len(requests), rng):
        together = decode(checkpoint.model, [requests[row] for row in rows])
        alone = [decode(checkpoint.model, [requests[row]]) for row in rows]
        ids_BN = np.concatenate([one.token_ids_BN for one in alone])
        batched = scores(checkpoint, [requests[row] for row in rows], ids_BN)
        for index, row in enumerate(rows):
            single = scores(checkpoint, [requests[row]], alone[index].token_ids_BN)[0]
            assert (batched[index] - single).abs().max() < LOGITS_BOUND
            differing += not np.array_equal(together.token_ids_BN[index], ids_BN[index])
            if requests[row].temperature == 0:
                best_two = single.topk(2).values
                clear = (best_two[:, 0] - best_two[:, 1] > 2 * LOGITS_BOUND).numpy()
                first_unclear = int(np.argmin(clear)) if not clear.all() else len(clear)
                assert (together.token_ids_BN[index] == ids_BN[index])[:first_unclear].all()
    assert differing <= 2  # a cut of the cumulative distribution may fall within rounding of the uniform number


def test_reported_logprobs_are_those_of_scoring(checkpoint: Checkpoint, rng: np.random.Generator):
    """Cached decoding against one full pass over the same tokens, at each request's temperature, 1 when greedy."""
    requests = random_requests(checkpoint, 32, rng)
    decoded = decode(checkpoint.model, requests)
    logits = scores(checkpoint, requests, decoded.token_ids_BN)
    temperature = torch.tensor([request.temperature or 1.0 for request in requests])[:, None, None]
    columns = torch.from_numpy(decoded.token_ids_BN).long() - checkpoint.config.action_begin
    expected = torch.log_softmax(logits / temperature, -1).gather(-1, columns[..., None])[..., 0]
    assert np.abs(decoded.token_logprobs_BN - expected.numpy()).max() < 1e-4


def test_greedy_tokens_are_the_best_of_a_full_pass(checkpoint: Checkpoint, rng: np.random.Generator):
    requests = random_requests(checkpoint, 16, rng, greedy=1.0)
    decoded = decode(checkpoint.model, requests)
    logits = scores(checkpoint, requests, decoded.token_ids_BN)
    best = logits.max(-1).values
    chosen = logits.gather(
        -1, torch.from_numpy(decoded.token_ids_BN).long()[..., None] - checkpoint.config.action_begin
    )
    assert (best - chosen[..., 0]).max() < 2 * LOGITS_BOUND


def test_bfloat16_answers_depend_on_the_batch_within_their_own_bound(nano: Checkpoint, rng: np.random.Generator):
    """Measured on logits that reach 16: 0.13 between batches of 1 and 7, and as much from float32."""
    requests = random_requests(nano, 7, rng)
    half = replace(nano, model=copy.deepcopy(nano.model).to(torch.bfloat16))
    decoded = decode(half.model, requests)
    assert np.isfinite(decoded.token_logprobs_BN).all() and decoded.token_logprobs_BN.dtype == np.float32
    together = scores(half, requests, decoded.token_ids_BN)
    exact = scores(nano, requests, decoded.token_ids_BN)
    alone = torch.cat([scores(half, [r], decoded.token_ids_BN[i : i + 1]) for i, r in enumerate(requests)])
    assert (together - alone).abs().max() < 0.3
    assert (together - exact).abs().max() < 0.3


def test_padding_the_prompt_changes_nothing(checkpoint: Checkpoint, rng: np.random.Generator):
    requests = random_requests(checkpoint, 4, rng)
    prepared = [request.prepared for request in requests]
    ids = torch.full((4, checkpoint.config.action_tokens), checkpoint.config.action_begin + 7)
    with torch.inference_mode():
        tight = checkpoint.model(collate(prepared), ids)
        loose = checkpoint.model(collate(prepared, prompt_length=40), ids)
    assert (tight.logits_BNV - loose.logits_BNV).abs().max() < LOGITS_BOUND
    assert (tight.hidden_BD - loose.hidden_BD).abs().max() < LOGITS_BOUND


def test_scores_read_the_last_prompt_token_of_each_row(checkpoint: Checkpoint, rng: np.random.Generator):
    """The critic's state: it differs from observation to observation, and is blind to the actions and to padding."""
    prepared = [request.prepared for request in random_requests(checkpoint, 6, rng)]
    prompts = collate(prepared)
    begin, tokens = checkpoint.config.action_begin, checkpoint.config.action_tokens
    with torch.inference_mode():
        one = checkpoint.model(prompts, torch.full((6, tokens), begin)).hidden_BD
        other = checkpoint.model(prompts, torch.full((6, tokens), begin + 99)).hidden_BD
        read = checkpoint.model.read(prompts)
        alone = [checkpoint.model(collate([single]), torch.full((1, tokens), begin)).hidden_BD for single in prepared]
    assert torch.cdist(one, one).add(torch.eye(6)).min() > 1e-2
    assert torch.equal(one, other)
    assert (read - one).abs().max() < LOGITS_BOUND  # a pass over the prompts alone reads the same
    assert len({len(single.input_ids) for single in prepared}) > 1, "some rows are padded"
    assert (torch.cat(alone) - one).abs().max() < LOGITS_BOUND


def test_hidden_states_from_a_slot_on_are_those_of_all_slots(checkpoint: Checkpoint, rng: np.random.Generator):
    prompts = collate([request.prepared for request in random_requests(checkpoint, 3, rng)])
    ids = torch.full((3, 5), checkpoint.config.action_begin + 9)
    with torch.inference_mode():
        every, some = checkpoint.model.hidden(prompts, ids), checkpoint.model.hidden(prompts, ids, first=7)
    assert (every[:, 7:] - some).abs().max() < LOGITS_BOUND


def test_deterministic_answers_are_bitwise_the_same_for_any_neighbours(
    checkpoint: Checkpoint, rng: np.random.Generator
):
    """Every row, every batch size, and a thread that is not the one that loaded the model."""
    key = next(iter(checkpoint.config.norm_stats))
    threads = torch.get_num_threads()
    own = replace(checkpoint, model=copy.deepcopy(checkpoint.model))  # a policy lays its weights out for decoding
    policy = Policy(own, unnorm_key=key, deterministic_batch=8, max_prompt_tokens=48)
    requests = random_requests(checkpoint, 24, rng, greedy=0.3)
    answers: list[Decoded] = []

    def decode_all() -> None:
        for row in range(8):
            neighbours = [requests[1 + i] for i in rng.permutation(23)[:8]]
            neighbours[row] = requests[0]
            answers.append(row_of(policy.decode(neighbours[: rng.integers(row + 1, 9)]), row))

    worker = threading.Thread(target=decode_all)
    try:
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(threads)
    assert len(answers) == 8
    assert len({(a.token_ids_BN.tobytes(), a.token_logprobs_BN.tobytes()) for a in answers}) == 1


def row_of(decoded: Decoded, row: int) -> Decoded:
    part = slice(row, row + 1)
    return Decoded(
        token_ids_BN=decoded.token_ids_BN[part],
        token_logprobs_BN=decoded.token_logprobs_BN[part],
        vision_s=0,
        prefill_s=0,
        decode_s=0,
    )
