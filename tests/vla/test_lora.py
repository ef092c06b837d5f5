"""Adapters: PEFT itself is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from policy_server.vla.checkpoint import Checkpoint, CheckpointError, fingerprint
from policy_server.vla.decoding import decode
from policy_server.vla.lora import apply_lora, load_lora, lora_tensors, merge_lora, save_lora
from policy_server.vla.lora_linear import LoRALinear
from policy_server.vla.model import VLA, Prompts, collate
from tests.vla.requests import random_requests


@pytest.fixture
def prompts(nano: Checkpoint, rng: np.random.Generator) -> Prompts:
    return collate([request.prepared for request in random_requests(nano, 3, rng)])


def logits(model: torch.nn.Module, prompts: Prompts) -> torch.Tensor:
    config = model.config if isinstance(model, VLA) else model.base_model.model.config
    ids = torch.arange(3 * config.action_tokens).view(3, -1) % 256 + config.action_begin
    with torch.no_grad():
        return model(prompts, ids).logits_BNV


def randomised(model: VLA, *, rank: int = 4, alpha: float = 8) -> VLA:
    """A copy with an adapter that changes something."""
    adapted = copy.deepcopy(model)
    for parameter in apply_lora(adapted, rank=rank, alpha=alpha):
        parameter.data.normal_(std=0.05)
    return adapted


def peft_targets(model: VLA) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]


def test_peft_reads_what_we_save(nano: Checkpoint, prompts: Prompts, tmp_path: Path):
    ours = randomised(nano.model)
    save_lora(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(nano.model), str(tmp_path)).eval()
    assert (logits(ours, prompts) - logits(theirs, prompts)).abs().max() < 1e-5
    assert (logits(ours, prompts) - logits(nano.model, prompts)).abs().max() > 1e-2


def test_we_read_what_peft_saves(nano: Checkpoint, prompts: Prompts, tmp_path: Path):
    targets = peft_targets(nano.model)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(nano.model), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = copy.deepcopy(nano.model)
    load_lora(ours, tmp_path)
    assert (logits(ours, prompts) - logits(theirs, prompts)).abs().max() < 1e-5
    assert set(lora_tensors(ours)) == set(load_file(tmp_path / "adapter_model.safetensors"))


def test_a_fresh_adapter_changes_nothing(nano: Checkpoint, prompts: Prompts):
    adapted = copy.deepcopy(nano.model)
    apply_lora(adapted, rank=4, alpha=8)
    assert torch.equal(logits(adapted, prompts), logits(nano.model, prompts))


def test_merging_keeps_the_function_and_the_names(nano: Checkpoint, prompts: Prompts):
    adapted = randomised(nano.model)
    before = logits(adapted, prompts)
    merge_lora(adapted)
    assert (logits(adapted, prompts) - before).abs().max() < 5e-5
    assert list(adapted.state_dict()) == list(nano.model.state_dict())
    assert not lora_tensors(adapted)


def test_only_the_adapter_is_trained(nano: Checkpoint, prompts: Prompts):
    adapted = copy.deepcopy(nano.model)
    parameters = apply_lora(adapted, rank=4, alpha=8)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    base = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" not in name}
    ids = torch.full((3, adapted.config.action_tokens), adapted.config.action_begin + 3)
    adapted(prompts, ids).logits_BNV[..., 3].sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, adapted.state_dict()[name]) for name, tensor in base.items())
    assert any(tensor.abs().max() > 0 for name, tensor in lora_tensors(adapted).items() if "lora_B" in name)


def test_of_a_model_with_a_loaded_adapter_only_the_adapter_is_trained(nano: Checkpoint, tmp_path: Path):
    save_lora(randomised(nano.model, rank=3, alpha=5), tmp_path)
    loaded = copy.deepcopy(nano.model).requires_grad_(True)
    load_lora(loaded, tmp_path)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if name.endswith((".lora_A", ".lora_B"))} != set()


def test_an_adapter_of_the_decoder_alone_leaves_image_tokens_as_they_are(nano: Checkpoint, tmp_path: Path):
    adapted = copy.deepcopy(nano.model)
    parameters = apply_lora(adapted, rank=4, alpha=8, vision=False)
    assert adapted.vision_is_frozen and not nano.model.vision_is_frozen
    assert parameters and not any("vision_backbone" in n or ".projector." in n for n in lora_tensors(adapted))
    save_lora(adapted, tmp_path)
    load_lora(loaded := copy.deepcopy(nano.model), tmp_path)
    assert set(lora_tensors(loaded)) == set(lora_tensors(adapted))


def test_an_adapter_of_a_bfloat16_layer_computes_in_bfloat16_and_learns_in_float32():
    torch.manual_seed(0)
    exact = LoRALinear.fresh(torch.nn.Linear(32, 24), rank=4, alpha=8)
    exact.lora_B.data.normal_(std=0.2)
    half = copy.deepcopy(exact)
    half.weight.data, half.bias.data = half.weight.data.bfloat16(), half.bias.data.bfloat16()
    x = torch.randn(16, 32)
    out, expected = half(x.bfloat16()), exact(x)
    assert out.dtype == torch.bfloat16 and (out - expected).abs().max() < 0.02 * expected.abs().max()
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for name in ("lora_A", "lora_B"):
        got, wanted = getattr(half, name).grad, getattr(exact, name).grad
        assert got.dtype == torch.float32 and (got - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_an_adapter_that_is_not_merged_decodes_as_the_merged_one(nano: Checkpoint, rng: np.random.Generator):
    requests = random_requests(nano, 2, rng, greedy=1.0)
    fused = copy.deepcopy(nano.model)
    fused.language_model.fuse()
    adapted = randomised(fused)
    loose = decode(adapted, requests)
    merge_lora(adapted)
    adapted.language_model.fuse()
    assert np.abs(loose.token_logprobs_BN - decode(adapted, requests).token_logprobs_BN).max() < 1e-3


def test_saving_and_loading_gives_the_same_adapter(nano: Checkpoint, tmp_path: Path):
    ours = randomised(nano.model, rank=3, alpha=5)
    save_lora(ours, tmp_path)
    loaded = copy.deepcopy(nano.model)
    load_lora(loaded, tmp_path)
    assert fingerprint(loaded.state_dict()) == fingerprint(ours.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora must be False, got True"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": 7}, "must have shape"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(nano: Checkpoint, tmp_path: Path, change, message):
    save_lora(randomised(nano.model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_lora(copy.deepcopy(nano.model), tmp_path)


@pytest.mark.parametrize("damage", ["unknown", "half"])
def test_an_adapter_for_another_base_is_refused_by_name(nano: Checkpoint, tmp_path: Path, damage: str):
    save_lora(randomised(nano.model), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensor = tensors.pop(name)
    if damage == "unknown":
        tensors["base_model.model.odd.lora_A.weight"] = tensor
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="unknown tensor" if damage == "unknown" else "is missing"):
        load_lora(copy.deepcopy(nano.model), tmp_path)
