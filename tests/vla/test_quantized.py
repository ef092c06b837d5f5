"""Weights of fewer bits: less memory, near answers, and every law of the stored ones but equality with a learner's."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from policy_server.__main__ import main
from policy_server.config import ServeConfig
from policy_server.errors import CannotStart
from policy_server.loading import load, opened
from policy_server.vla.adapters import Adapters
from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.decoding import decode
from policy_server.vla.lora import linears, put
from policy_server.vla.model import VLA, collate
from policy_server.vla.passes import DecodeInput, PassShape
from policy_server.vla.quantized import GROUP, QUANTIZED, ROWS, Bits, CannotQuantize, quantize, stored_bytes
from policy_server.vla.scoring import score
from tests.vla.requests import random_requests
from tests.vla.test_adapters import bits as bits_of
from tests.vla.test_adapters import learner, scored

pytest.importorskip("torchao", reason="torchao is not installed")

BATCH_BOUND = 5e-5
"""The contract's, of logits, between a request alone and in any batch."""
ADAPTER_BOUND = 1e-4
"""The contract's, of log-probabilities, between an adapter beside its base and the two as one."""
WEIGHT_ERROR = {"int8": 0.01, "int4": 0.1}
"""Of a layer, relative to its size; the weights are normally distributed."""
LOGPROB_ERROR = {"int8": 0.05, "int4": 0.5}
"""Mean, of the tokens that the stored weights choose; measured up to 0.024 and 0.22."""


@pytest.fixture(params=["tiny", "nano", "reference"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    if request.param == "tiny":
        return load_checkpoint(request.getfixturevalue("tiny_vla"))
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["int8", "int4"])
def bits(request: pytest.FixtureRequest) -> Bits:
    return request.param


@pytest.fixture
def quantized(checkpoint: Checkpoint, bits: Bits) -> VLA:
    """As a server holds it."""
    model = copy.deepcopy(checkpoint.model)
    quantize(model, bits, torch.device("cpu"))
    model.language_model.fuse()
    return model


def layers(model: VLA) -> dict[str, nn.Linear]:
    """Those that are quantised."""
    return {name: layer for name, layer in linears(model).items() if name.startswith(QUANTIZED)}


@torch.no_grad()
def meant(weight: torch.Tensor) -> torch.Tensor:
    """What a weight stands for, read off what it makes of unit vectors."""
    return functional.linear(torch.eye(weight.shape[1]), weight).T.contiguous()


def dequantized(model: VLA) -> VLA:
    """The same numbers in plain layers, as a server holds them."""
    plain = copy.deepcopy(model)
    for name, layer in layers(model).items():
        put(plain, name, one := nn.Linear(layer.in_features, layer.out_features, bias=False))
        one.weight, one.bias = nn.Parameter(meant(layer.weight), requires_grad=False), layer.bias
    plain.language_model.fuse()
    return plain


def test_a_layer_takes_the_memory_of_its_bits_and_scales(checkpoint, quantized, bits):
    """For each output a scale of 32 bits, and 8 that are always 0; of 4 bits, two numbers for each group of inputs."""
    for name, layer in layers(quantized).items():
        count, outputs = layer.in_features * layer.out_features, layer.out_features
        fits = layer.in_features % GROUP == 0 and outputs % ROWS == 0
        expected = count // 2 + 8 * count // GROUP if bits == "int4" and fits else count + 5 * outputs
        bias = 0 if layer.bias is None else layer.bias.nbytes
        assert stored_bytes(layer) - bias == expected, name
    saved = sum(stored_bytes(layer) for layer in layers(checkpoint.model).values())
    saved -= sum(stored_bytes(layer) for layer in layers(quantized).values())
    assert stored_bytes(checkpoint.model) - stored_bytes(quantized) == saved > 0


def test_what_was_stored_is_let_go(checkpoint, bits):
    model = copy.deepcopy(checkpoint.model)
    before = {name: weakref.ref(layer.weight) for name, layer in layers(model).items()}
    quantize(model, bits, torch.device("cpu"))
    gc.collect()
    assert not [name for name, weight in before.items() if weight() is not None]


def test_a_layers_weights_are_near_and_everything_else_is_as_it_was(checkpoint, quantized, bits):
    stored, own = layers(checkpoint.model), layers(quantized)
    for name, layer in own.items():
        if stored[name].weight.any():
            error = (meant(layer.weight) - stored[name].weight).norm() / stored[name].weight.norm()
            assert 0 < error < WEIGHT_ERROR[bits], name
    tensors = quantized.state_dict()
    for name, tensor in checkpoint.model.state_dict().items():
        if name.removesuffix(".weight") not in own:
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("checkpoint", ["tiny", "nano"], indirect=True)
def test_answers_are_near_those_of_the_stored_weights(checkpoint, quantized, bits, rng):
    requests = random_requests(checkpoint, 32, rng, greedy=1.0)
    ids_BN = decode(checkpoint.model, requests).token_ids_BN
    gap_BN = np.abs(scored(quantized, requests, ids_BN) - scored(checkpoint.model, requests, ids_BN))
    assert 0 < gap_BN.mean() < LOGPROB_ERROR[bits]


def test_logits_do_not_depend_on_the_batch(checkpoint, quantized, rng):
    requests = random_requests(checkpoint, 16, rng)
    together = decode(quantized, requests)
    ids_BN = torch.from_numpy(together.token_ids_BN).long()
    with torch.inference_mode():
        batched = quantized(collate([request.prepared for request in requests]), ids_BN).logits_BNV
        for row, request in enumerate(requests):
            alone = quantized(collate([request.prepared]), ids_BN[row : row + 1]).logits_BNV[0]
            assert (batched[row] - alone).abs().max() < BATCH_BOUND
    alone_BN = np.concatenate([decode(quantized, [request]).token_ids_BN for request in requests])
    assert (alone_BN == together.token_ids_BN).mean() > 0.99  # two best within rounding are rare, and may be


def test_a_pass_of_one_shape_is_bitwise_the_same_for_any_neighbours(checkpoint, quantized, rng):
    """Of eight rows; of four, a product with the reference's 172 outputs alone rounds by row, quantised or not."""
    threads, shape = torch.get_num_threads(), PassShape(batch=8, prompt_length=48)
    torch.set_num_threads(1)
    subject, *others = random_requests(checkpoint, 8, rng, greedy=0.0)
    try:
        answers = set()
        for row in (0, 3, 7):
            neighbours = [others[index] for index in rng.integers(0, len(others), 8)]
            neighbours[row] = subject
            answers.add(bits_of(decode(quantized, neighbours, shape), row))
        assert len(answers) == 1
    finally:
        torch.set_num_threads(threads)


def test_adapters_over_it_are_the_same_adapters_over_the_weights_it_stands_for(checkpoint, quantized, tmp_path, rng):
    """Two adapters and none, in one pass."""
    plain = dequantized(quantized)
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        learner(plain, folder, seed=seed)
    rows = [0, None, 1, 0]
    over = {name: Adapters(model) for name, model in (("quantized", quantized), ("plain", plain))}
    loaded = {name: [home.load(folder) for folder in folders] for name, home in over.items()}
    requests = random_requests(checkpoint, len(rows), rng, greedy=1.0)

    def asked(name: str) -> list[DecodeInput]:
        adapters = [None if row is None else loaded[name][row] for row in rows]
        return [replace(request, adapter=own) for request, own in zip(requests, adapters, strict=True)]

    ours, theirs = decode(quantized, asked("quantized")), decode(plain, asked("plain"))
    same_B = (ours.token_ids_BN == theirs.token_ids_BN).all(1)
    assert same_B.mean() >= 0.5  # an untrained model's best two are often within rounding
    assert np.abs(ours.token_logprobs_BN - theirs.token_logprobs_BN)[same_B].max() < ADAPTER_BOUND
    bare = decode(quantized, requests)
    assert not np.array_equal(ours.token_logprobs_BN[0], bare.token_logprobs_BN[0])
    np.testing.assert_allclose(ours.token_logprobs_BN[1], bare.token_logprobs_BN[1], atol=ADAPTER_BOUND)


def test_a_start_adapter_is_served_beside_it(tiny_vla, bits, tmp_path, rng):
    learner(load_checkpoint(tiny_vla).model, tmp_path)
    served = load(ServeConfig(model=str(tiny_vla), weights=bits, dtype="float32", adapter=tmp_path))
    assert served.spec.model == f"{tiny_vla.name}-{bits}"
    plain = dequantized(served.first.vla)
    adapter = Adapters(plain).load(tmp_path)
    requests = random_requests(load_checkpoint(tiny_vla), 3, rng)
    prepared, ids_BN = [request.prepared for request in requests], decode(plain, requests).token_ids_BN
    ours = served.score(prepared, ids_BN, 1.0, served.first)
    assert np.abs(ours - score(plain, prepared, ids_BN, 1.0, adapter=adapter)).max() < ADAPTER_BOUND
    assert np.abs(ours - score(plain, prepared, ids_BN, 1.0)).max() > 10 * ADAPTER_BOUND


def test_four_bits_are_computed_with_in_bfloat16_unless_told_otherwise(tiny_vla):
    dtypes = {
        bits: load(ServeConfig(model=str(tiny_vla), weights=bits)).first.vla.action_head.dtype for bits in WEIGHT_ERROR
    }
    assert dtypes == {"int8": torch.float32, "int4": torch.bfloat16}


def test_a_process_for_each_device_can_have_it(tiny_vla):
    with opened(ServeConfig(model=str(tiny_vla), weights="int8", devices=("cpu",))) as model:
        model.warm_up()
        assert model.spec.model == f"{tiny_vla.name}-int8"


@pytest.mark.parametrize("where", ["admin port", "versions", "episodes"])
def test_published_versions_and_quantised_weights_are_refused_together_in_one_sentence(where, tmp_path, capsys):
    (tmp_path / "versions").mkdir()
    options = {
        "admin port": (["--admin-port", "0"], "admin_port"),
        "versions": (["--versions", str(tmp_path / "versions")], str(tmp_path)),
        "episodes": (["--episodes", str(tmp_path)], str(tmp_path)),
    }
    args, named = options[where]
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--weights", "int8", *args])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "weights must be 'stored' to serve published versions, got 'int8' with" in said
    assert named in said.replace(" ", "")
    assert "cannot be proved equal" in said


def test_without_the_library_the_command_says_what_to_install(tiny_vla, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CannotStart, match=r"need the package torchao .* pip install 'vla-rl\[quantized\]'"):
        load(ServeConfig(model=str(tiny_vla), weights="int8"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_layout_is_another_and_the_answers_are_near(nano, bits, rng):
    """In bfloat16, whose own bound between two ways of computing the same logits is 0.3."""
    requests = random_requests(nano, 8, rng, greedy=1.0)
    models = {}
    for device in ("cpu", "cuda"):
        models[device] = copy.deepcopy(nano.model).to(torch.bfloat16)
        quantize(models[device], bits, torch.device(device))
    ids_BN = decode(models["cpu"], requests).token_ids_BN
    ours, theirs = (scored(models[device], requests, ids_BN) for device in ("cuda", "cpu"))
    assert {parameter.device.type for parameter in models["cuda"].parameters()} == {"cuda"}
    assert np.abs(ours - theirs).mean() < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_four_bits_on_cuda_need_bfloat16(nano):
    with pytest.raises(CannotQuantize, match="need dtype bfloat16"):
        quantize(copy.deepcopy(nano.model), "int4", torch.device("cuda"))
