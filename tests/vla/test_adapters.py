"""Many adapters in one batch: each row answers as its adapter does alone, merged into the base."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policy_server.vla.adapters import Adapter, Adapters
from policy_server.vla.checkpoint import Checkpoint, CheckpointError, weights_fingerprint
from policy_server.vla.decoding import Decoded, decode
from policy_server.vla.derived import as_served
from policy_server.vla.lora import apply_lora, lora_tensors, merge_lora, save_lora
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput, PassShape
from policy_server.vla.scoring import score
from tests.vla.requests import random_requests

BOUND = 1e-4
"""The contract's, between an adapter beside its base and the two merged."""


@pytest.fixture(params=["nano", "reference"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(checkpoint: Checkpoint) -> VLA:
    """As a server holds it."""
    model = copy.deepcopy(checkpoint.model)
    model.language_model.fuse()
    return model


def learner(model: VLA, folder: Path, *, seed: int = 0, rank: int = 3, std: float = 0.03, vision: bool = True) -> VLA:
    """A model with an adapter that changes something, which is in the folder, too."""
    adapted = copy.deepcopy(model)
    torch.manual_seed(seed)
    for parameter in apply_lora(adapted, rank=rank, alpha=2 * rank, vision=vision):
        parameter.data.normal_(std=std)
    save_lora(adapted, folder)
    return adapted


def merged(adapted: VLA) -> VLA:
    alone = copy.deepcopy(adapted)
    merge_lora(alone)
    alone.language_model.fuse()
    return alone


def requests_for(
    checkpoint: Checkpoint, adapters: list[Adapter | None], rng: np.random.Generator, greedy: float = 1.0
) -> list[DecodeInput]:
    requests = random_requests(checkpoint, len(adapters), rng, greedy=greedy)
    return [replace(request, adapter=adapter) for request, adapter in zip(requests, adapters, strict=True)]


def places(model: VLA) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def scored(model: VLA, requests: list[DecodeInput], token_ids_BN: np.ndarray) -> np.ndarray:
    return score(model, [request.prepared for request in requests], token_ids_BN, 1.0)


def test_every_row_of_a_mixed_batch_is_its_own_adapter_merged(checkpoint, base, tmp_path, rng):
    """Three adapters and the base, in one pass; a token may differ where its two best are within rounding."""
    home, count = Adapters(base), 3
    learners = [learner(base, tmp_path / str(i), seed=i) for i in range(count)]
    adapters = [home.load(tmp_path / str(i)) for i in range(count)]
    alone = [base, *map(merged, learners)]
    requests = requests_for(checkpoint, [None, *adapters, adapters[0], None, adapters[2]], rng)
    owners = [0, 1, 2, 3, 1, 0, 3]
    together = decode(base, requests)
    expected = [decode(alone[owner], [replace(r, adapter=None)]) for owner, r in zip(owners, requests, strict=True)]
    ids_BN = np.concatenate([one.token_ids_BN for one in expected])
    same_B = (together.token_ids_BN == ids_BN).all(1)
    assert same_B.mean() > 0.5  # an untrained model's best two are often within rounding; the law is below
    logprobs_BN = np.concatenate([one.token_logprobs_BN for one in expected])
    assert np.abs(together.token_logprobs_BN - logprobs_BN)[same_B].max() < BOUND
    for row, (owner, request) in enumerate(zip(owners, requests, strict=True)):
        ids_1N = together.token_ids_BN[row : row + 1]
        said = scored(alone[owner], [request], ids_1N)
        assert np.abs(said - together.token_logprobs_BN[row]).max() < BOUND
        for other in {0, 1, 2, 3} - {owner}:
            assert np.abs(scored(alone[other], [request], ids_1N) - together.token_logprobs_BN[row]).max() > 10 * BOUND


def test_one_adapter_for_all_rows_is_as_the_same_row_by_row(checkpoint, base, tmp_path, rng):
    learner(base, tmp_path)
    adapter = Adapters(base).load(tmp_path)
    requests = requests_for(checkpoint, [adapter] * 3, rng)
    alike = decode(base, requests)
    longest = max(len(request.prepared.input_ids) for request in requests)
    row_by_row = decode(base, requests, PassShape(batch=3, prompt_length=longest))
    assert np.array_equal(alike.token_ids_BN, row_by_row.token_ids_BN)
    np.testing.assert_allclose(alike.token_logprobs_BN, row_by_row.token_logprobs_BN, atol=5e-5)


def test_a_pass_of_one_shape_is_bitwise_the_same_for_any_neighbours(checkpoint, base, tmp_path, rng):
    """Its neighbours have the same adapter, others or none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = Adapters(base)
    for seed in range(3):
        learner(base, tmp_path / str(seed), seed=seed)
    adapters = [None, *(home.load(tmp_path / str(seed)) for seed in range(3))]
    subjects = requests_for(checkpoint, adapters, rng, greedy=0.0)
    shape = PassShape(batch=4, prompt_length=48)
    try:
        for subject in subjects:
            answers = set()
            for row in range(4):
                neighbours = requests_for(checkpoint, [adapters[i] for i in rng.integers(0, 4, 4)], rng)
                neighbours[row] = subject
                answers.add(bits(decode(base, neighbours, shape), row))
            answers.add(bits(decode(base, [subject], shape), 0))
            assert len(answers) == 1
    finally:
        torch.set_num_threads(threads)


def bits(decoded: Decoded, row: int) -> tuple[bytes, bytes]:
    return decoded.token_ids_BN[row].tobytes(), decoded.token_logprobs_BN[row].tobytes()


def test_the_base_goes_on_as_it_was_and_an_adapter_takes_the_memory_of_its_factors(checkpoint, base, tmp_path, rng):
    requests = requests_for(checkpoint, [None, None], rng)
    before, where = decode(base, requests), places(base)
    adapted = learner(base, tmp_path, rank=4)
    home = Adapters(base)
    adapter = home.load(tmp_path)
    decode(base, [replace(request, adapter=adapter) for request in requests])
    assert places(base) == where == places(home._model)
    assert np.array_equal(decode(base, requests).token_logprobs_BN, before.token_logprobs_BN)
    assert adapter.flat.numel() == sum(tensor.numel() for tensor in lora_tensors(adapted).values())


def test_after_a_pass_nothing_of_its_adapters_is_left_in_the_model(checkpoint, base, tmp_path, rng):
    learner(base, tmp_path)
    home = Adapters(base)
    requests = requests_for(checkpoint, [home.load(tmp_path)] * 2, rng)
    plain = [replace(request, adapter=None) for request in requests]
    decode(base, requests)
    with pytest.raises(ValueError, match="the batch must fit"):
        decode(base, requests, PassShape(batch=1, prompt_length=8))
    assert all(product.low_rank is None for product in home._products.values())
    assert np.array_equal(decode(home._model, plain).token_ids_BN, decode(base, plain).token_ids_BN)


def test_adapters_of_one_layout_share_it_and_others_do_not(base, tmp_path):
    home = Adapters(base)
    for name, options in {"a": {}, "b": {"seed": 1}, "rank": {"rank": 5}, "decoder": {"vision": False}}.items():
        learner(base, tmp_path / name, **options)
    a, b, rank, decoder = (home.load(tmp_path / name) for name in ("a", "b", "rank", "decoder"))
    assert a.layout is b.layout
    assert len({a.layout, rank.layout, decoder.layout}) == 3


def test_an_adapter_of_some_layers_leaves_the_others_alone(checkpoint, base, tmp_path, rng):
    """PEFT's habit: only q and v, of which one product serves k, too."""
    adapted = learner(base, tmp_path / "all")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and not any(part in name for part in ("q_proj", "v_proj")):
            parameter.data.zero_()
    save_lora(adapted, tmp_path / "some")
    adapter = Adapters(base).load(tmp_path / "some")
    requests = requests_for(checkpoint, [adapter, None], rng)
    together = decode(base, requests)
    said = scored(merged(adapted), requests[:1], together.token_ids_BN[:1])
    assert np.abs(said - together.token_logprobs_BN[:1]).max() < BOUND


def test_scoring_with_an_adapter_is_scoring_the_merged_model(checkpoint, base, tmp_path, rng):
    adapted = learner(base, tmp_path)
    adapter = Adapters(base).load(tmp_path)
    requests = requests_for(checkpoint, [None] * 4, rng)
    ids_BN = decode(base, requests).token_ids_BN
    prepared = [request.prepared for request in requests]
    ours = score(base, prepared, ids_BN, 0.7, adapter=adapter)
    assert np.abs(ours - score(merged(adapted), prepared, ids_BN, 0.7)).max() < BOUND
    assert np.abs(ours - score(base, prepared, ids_BN, 0.7)).max() > 10 * BOUND


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_hashes_as_the_learners_model_in_the_dtype_of_the_server(base, tmp_path, dtype):
    adapted = learner(base, tmp_path)
    served = as_served(base, dtype)
    adapter = Adapters(served).load(tmp_path)
    assert adapter.fingerprint == weights_fingerprint(adapted, dtype) == weights_fingerprint(as_served(adapted, dtype))
    assert adapter.fingerprint != weights_fingerprint(base, dtype)


def test_a_fresh_adapter_hashes_as_the_base(base, tmp_path):
    fresh = copy.deepcopy(base)
    apply_lora(fresh, rank=2, alpha=4)
    save_lora(fresh, tmp_path)
    assert Adapters(base).load(tmp_path).fingerprint == weights_fingerprint(fresh) == weights_fingerprint(base)


def test_a_learners_model_as_served_keeps_its_adapter_beside_the_base(base, checkpoint, tmp_path, rng):
    adapted = learner(base, tmp_path)
    requests = requests_for(checkpoint, [None] * 2, rng)
    ids_BN = decode(base, requests).token_ids_BN
    served = as_served(adapted.train(), "float32")
    assert not any(module.training for module in served.modules())
    assert np.abs(scored(served, requests, ids_BN) - scored(adapted.eval(), requests, ids_BN)).max() < BOUND


def test_factors_whose_product_overflows_are_refused_by_the_layer(base, tmp_path):
    adapted = copy.deepcopy(base)
    for parameter in apply_lora(adapted, rank=3, alpha=7):
        parameter.data.fill_(1e30)
    save_lora(adapted, tmp_path)
    with pytest.raises(CheckpointError, match=r"the product of the factors of \S+ is not finite"):
        Adapters(base).load(tmp_path)


def test_adapters_of_two_layouts_in_one_pass_are_an_error(base, checkpoint, tmp_path, rng):
    home = Adapters(base)
    learner(base, tmp_path / "a")
    learner(base, tmp_path / "b", rank=5)
    requests = requests_for(checkpoint, [home.load(tmp_path / "a"), home.load(tmp_path / "b")], rng)
    with pytest.raises(ValueError):
        decode(base, requests)
