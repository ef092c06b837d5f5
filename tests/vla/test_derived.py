"""Models made of another's tensors: what they share, what they are, and the merge that both sides of a publish do."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from policy_server.vla.checkpoint import Checkpoint, CheckpointError, weights_fingerprint
from policy_server.vla.decoding import decode
from policy_server.vla.derived import as_served, with_adapter, with_tensors
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla.lora_linear import LoRALinear
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


def adapted(model: VLA, folder: Path) -> VLA:
    """The learner's model, and its adapter in the folder."""
    learner = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in apply_lora(learner, rank=3, alpha=7):
        parameter.data.normal_(std=0.05)
    save_lora(learner, folder)
    return learner


def places(model: VLA) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def changed(base: VLA, folder: Path, *names: str) -> dict[str, torch.Tensor]:
    tensors = {name: base.state_dict()[name] + 0.25 for name in names}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_only_what_differs_takes_memory(base: VLA, tmp_path: Path):
    changed(base, tmp_path, K_PROJ, HEAD)
    derived = with_tensors(base, tmp_path)
    derived.language_model.fuse()
    own = {name for name, place in places(derived).items() if place != places(base)[name]}
    fused_with_it = {K_PROJ.replace("k_proj", other) for other in ("q_proj", "k_proj", "v_proj")}
    assert own == {HEAD, *fused_with_it}
    for mine, theirs in zip(derived.language_model.model.layers[1:], base.language_model.model.layers[1:], strict=True):
        assert mine.self_attn.fused.data_ptr() == theirs.self_attn.fused.data_ptr()


def test_a_version_of_an_adapter_shares_what_no_adapter_touches(base: VLA, tmp_path: Path):
    adapted(base, tmp_path)
    derived = with_adapter(base, tmp_path)
    linear = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)} - {HEAD}
    assert {name for name, place in places(derived).items() if place != places(base)[name]} == linear


@pytest.mark.parametrize("kind", ["tensors", "adapter"])
def test_the_base_goes_on_as_it_was(base: VLA, nano: Checkpoint, tmp_path: Path, kind: str, rng: np.random.Generator):
    requests = random_requests(nano, 2, rng)
    before, where = decode(base, requests), places(base)
    if kind == "tensors":
        changed(base, tmp_path, K_PROJ, HEAD)
        derived = with_tensors(base, tmp_path)
    else:
        adapted(base, tmp_path)
        derived = with_adapter(base, tmp_path)
    derived.language_model.fuse()
    assert places(base) == where
    after = decode(base, requests)
    assert np.array_equal(after.token_logprobs_BN, before.token_logprobs_BN)
    assert not np.array_equal(decode(derived, requests).token_logprobs_BN, before.token_logprobs_BN)


def test_a_derived_model_decodes_as_one_that_was_loaded_with_its_tensors(
    base: VLA, nano: Checkpoint, tmp_path: Path, rng: np.random.Generator
):
    tensors = changed(base, tmp_path, K_PROJ, HEAD)
    derived = with_tensors(base, tmp_path)
    derived.language_model.fuse()
    loaded = copy.deepcopy(nano.model)
    loaded.load_state_dict({**nano.model.state_dict(), **tensors})
    loaded.language_model.fuse()
    requests = random_requests(nano, 2, rng)
    ours, theirs = decode(derived, requests), decode(loaded, requests)
    assert np.array_equal(ours.token_ids_BN, theirs.token_ids_BN)
    assert np.array_equal(ours.token_logprobs_BN, theirs.token_logprobs_BN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_hashes_alike_on_both_sides_in_the_dtype_of_the_server(base: VLA, tmp_path: Path, dtype: str):
    learner = adapted(base, tmp_path)
    served = with_adapter(as_served(base, dtype), tmp_path)
    served.language_model.fuse()
    assert weights_fingerprint(served) == weights_fingerprint(learner, dtype)
    assert weights_fingerprint(served) == weights_fingerprint(as_served(learner, dtype))
    assert weights_fingerprint(served) != weights_fingerprint(base, dtype)


def test_the_fingerprint_sees_one_number_of_one_tensor_and_no_layout(base: VLA, nano: Checkpoint):
    assert weights_fingerprint(base) == weights_fingerprint(nano.model) == nano.fingerprint
    base.language_model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    assert weights_fingerprint(base) != nano.fingerprint


def test_the_merge_is_a_sum_over_ranks_in_order_each_step_rounded_to_float32():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(37, 19, dtype=torch.bfloat16), rank=5, alpha=3, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    a, b = layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy()
    delta = np.zeros((19, 37), np.float32)
    for k in range(5):
        delta += np.float32(b[:, k, None] * a[k])
    expected = layer.weight.detach().float() + torch.from_numpy(delta * np.float32(3 / 5))
    assert torch.equal(layer.merged_weight(), expected.to(torch.bfloat16))
    assert torch.equal(layer.merged().weight, expected.to(torch.bfloat16))


def test_a_wide_base_is_rounded_before_the_merge_as_a_server_holds_it():
    layer = LoRALinear(torch.nn.Linear(1, 1), rank=1, alpha=1, dropout=0.0)
    layer.weight.data.fill_(1 + 2**-9)  # half way between two bfloat16: rounds to 1
    layer.lora_A.data.fill_(1)
    layer.lora_B.data.fill_(2**-8)  # half way again: 1 + 2^-8 rounds to 1, 1 + 2^-9 + 2^-8 would round up
    assert layer.merged_weight(torch.bfloat16).item() == 1
    assert layer.merged_weight().item() == 1 + 2**-9 + 2**-8


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


def test_factors_whose_product_overflows_are_refused_by_the_layer(base: VLA, tmp_path: Path):
    learner = copy.deepcopy(base)
    for parameter in apply_lora(learner, rank=3, alpha=7):
        parameter.data.fill_(1e30)
    save_lora(learner, tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor \S+ is not finite in torch.float32"):
        with_adapter(base, tmp_path)
