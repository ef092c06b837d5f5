"""Models made of another's tensors: what they share, and what they are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from policy_server.vla.checkpoint import Checkpoint, weights_fingerprint
from policy_server.vla.decoding import decode
from policy_server.vla.derived import with_tensors
from policy_server.vla.model import VLA
from policy_server.vla.scoring import score
from tests.vla.requests import random_requests

K_PROJ = "language_model.model.layers.0.self_attn.k_proj.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def base(nano: Checkpoint) -> VLA:
    """As a server holds it."""
    model = copy.deepcopy(nano.model)
    model.language_model.fuse()
    return model


def places(model: VLA) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def changed(base: VLA, folder: Path, *names: str) -> dict[str, torch.Tensor]:
    tensors = {name: base.state_dict()[name] + 0.25 for name in names}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_only_what_differs_takes_memory(base: VLA, tmp_path: Path):
    changed(base, tmp_path, K_PROJ, HEAD)
    derived = with_tensors(base, tmp_path)
    own = {name for name, place in places(derived).items() if place != places(base)[name]}
    fused_with_it = {K_PROJ.replace("k_proj", other) for other in ("q_proj", "k_proj", "v_proj")}
    assert own == {HEAD, *fused_with_it}
    assert {buffer.data_ptr() for buffer in derived.buffers()} == {buffer.data_ptr() for buffer in base.buffers()}
    for mine, theirs in zip(derived.language_model.model.layers[1:], base.language_model.model.layers[1:], strict=True):
        assert mine.self_attn.fused.weight.data_ptr() == theirs.self_attn.fused.weight.data_ptr()


def test_the_base_goes_on_as_it_was(base: VLA, nano: Checkpoint, tmp_path: Path, rng: np.random.Generator):
    requests = random_requests(nano, 2, rng)
    before, where = decode(base, requests), places(base)
    changed(base, tmp_path, K_PROJ, HEAD)
    derived = with_tensors(base, tmp_path)
    assert places(base) == where
    after = decode(base, requests)
    assert np.array_equal(after.token_logprobs_BN, before.token_logprobs_BN)
    assert not np.array_equal(decode(derived, requests).token_logprobs_BN, before.token_logprobs_BN)


def test_a_derived_model_decodes_as_one_that_was_loaded_with_its_tensors(
    base: VLA, nano: Checkpoint, tmp_path: Path, rng: np.random.Generator
):
    tensors = changed(base, tmp_path, K_PROJ, HEAD)
    derived = with_tensors(base, tmp_path)
    loaded = copy.deepcopy(nano.model)
    loaded.load_state_dict({**nano.model.state_dict(), **tensors})
    loaded.language_model.fuse()
    requests = random_requests(nano, 2, rng)
    ours, theirs = decode(derived, requests), decode(loaded, requests)
    assert np.array_equal(ours.token_ids_BN, theirs.token_ids_BN)
    assert np.array_equal(ours.token_logprobs_BN, theirs.token_logprobs_BN)


def test_the_fingerprint_sees_one_number_of_one_tensor_and_no_layout(base: VLA, nano: Checkpoint):
    assert weights_fingerprint(base) == weights_fingerprint(nano.model) == nano.fingerprint
    base.language_model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    assert weights_fingerprint(base) != nano.fingerprint


def test_scoring_gives_the_log_probabilities_that_decoding_reports(
    base: VLA, nano: Checkpoint, rng: np.random.Generator
):
    requests = random_requests(nano, 4, rng, greedy=1.0)
    decoded = decode(base, requests)
    scored = score(base, [request.prepared for request in requests], decoded.token_ids_BN, 1.0)
    np.testing.assert_allclose(scored, decoded.token_logprobs_BN, atol=5e-5)
    cooler = score(base, [request.prepared for request in requests], decoded.token_ids_BN, 0.5)
    assert np.abs(cooler - scored).max() > 1e-2


def test_a_model_with_dropout_on_is_not_scored(base: VLA, nano: Checkpoint, rng: np.random.Generator):
    (request,) = random_requests(nano, 1, rng)
    with pytest.raises(ValueError, match="evaluation mode"):
        score(base.train(), [request.prepared], np.zeros((1, 14), np.int32), 1.0)
