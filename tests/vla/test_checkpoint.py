"""Checkpoints: what is saved is what is loaded, and whatever is wrong is told in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policy_server.compare import load_reference
from policy_server.vla.checkpoint import (
    Checkpoint,
    CheckpointError,
    fingerprint,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from policy_server.vla.config import VLAConfig, nano_config
from policy_server.vla.model import VLA
from tests.vla.conftest import STATISTICS, TESTS

PUBLISHED = TESTS / "golden" / "checkpoint_56px_bf16_sharded"


def test_a_saved_checkpoint_loads_as_it_was(nano: Checkpoint, tmp_path: Path):
    save_checkpoint(tmp_path, nano.model, nano.tokenizer)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == VLAConfig.from_dict(nano.config.to_dict())
    assert loaded.fingerprint == fingerprint(loaded.model.state_dict()) == nano.fingerprint
    assert loaded.tokenizer.encode("open it").tolist() == nano.tokenizer.encode("open it").tolist()


def test_a_fused_model_saves_the_same_tensors(nano: Checkpoint, tmp_path: Path):
    save_checkpoint(tmp_path / "single", nano.model, nano.tokenizer)
    fused = load_checkpoint(tmp_path / "single")
    fused.model.language_model.fuse()
    save_checkpoint(tmp_path / "fused", fused.model, fused.tokenizer)
    assert load_checkpoint(tmp_path / "fused").fingerprint == nano.fingerprint


def test_fused_weights_follow_updates_in_place(nano: Checkpoint, tmp_path: Path):
    save_checkpoint(tmp_path, nano.model, nano.tokenizer)
    model = load_checkpoint(tmp_path).model
    model.language_model.fuse()
    attention = model.language_model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.add_(1)
    width = model.config.llm.hidden_size
    assert torch.equal(attention.fused.weight[width : 2 * width], attention.k_proj.weight)


def test_published_names_and_pixel_statistics_survive_a_round_trip(tmp_path: Path):
    reference = load_reference(PUBLISHED)
    save_checkpoint(tmp_path, reference.model, reference.tokenizer)
    published = json.loads((PUBLISHED / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(published)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.towers == reference.config.towers
    assert loaded.config.towers[0].pixel_mean == (0.484375, 0.455078125, 0.40625)
    assert loaded.config.other["llm_backbone_id"] == "llama2-7b-pure"


def test_large_checkpoints_are_sharded(nano: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("policy_server.vla.checkpoint.SHARD_BYTES", 3_000_000)
    save_checkpoint(tmp_path, nano.model, nano.tokenizer)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) >= 3
    assert load_checkpoint(tmp_path).fingerprint == nano.fingerprint


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


HEAD = "language_model.lm_head.weight"
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "not a checkpoint, config.json is missing"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json is not readable"),
    "other model": (lambda d: edit_config(d, model_type="llava"), "model_type must be \"openvla\", got 'llava'"),
    "unknown tower": (lambda d: edit_config(d, vision_towers=None), "unknown vision tower"),
    "other projector": (lambda d: edit_config(d, arch_specifier="linear"), "arch_specifier must be"),
    "misspelt tower": (lambda d: edit_config(d, vision_towers=[{"widht": 3}]), r"vision_towers: .*widht"),
    "deaf prompt": (lambda d: edit_config(d, prompt_template="go"), r"must contain \{instruction\}, got 'go'"),
    "grouped heads": (
        lambda d: edit_config(d, text_config={"num_key_value_heads": 8}),
        "num_key_value_heads must be 32, got 8",
    ),
    "no quantiles": (
        lambda d: edit_config(d, norm_stats={"x": {"action": {"mean": [0.0]}, "proprio": {"q01": [], "q99": []}}}),
        r"norm_stats\['x'\]\['action'\] must hold q01 and q99",
    ),
    "no statistics of the state": (
        lambda d: edit_config(d, norm_stats={"x": {"action": {"q01": [0.0], "q99": [1.0]}}}),
        r"norm_stats\['x'\]\['proprio'\] must hold q01 and q99",
    ),
    "a list of statistics": (lambda d: edit_config(d, norm_stats=[1]), "of the wrong kind"),
    "no patches": (lambda d: edit_config(d, patch_merge=0), "of the wrong kind"),
    "a number as text": (lambda d: edit_config(d, chunk_length="8"), "of the wrong kind"),
    "no mean": (
        lambda d: (d / "preprocessor_config.json").write_text('{"tvf_normalize_params": [{"std": [1, 1, 1]}]}'),
        "must have mean and std",
    ),
    "no statistics beside it": (lambda d: (d / "dataset_statistics.json").write_text("["), "is not readable JSON"),
    "statistics without quantiles beside it": (
        lambda d: (d / "dataset_statistics.json").write_text('{"mine": {"action": {"mean": [0.0]}}}'),
        r"dataset_statistics.json: norm_stats\['mine'\]\['action'\] must hold q01 and q99",
    ),
    "a number of statistics beside it": (
        lambda d: (d / "dataset_statistics.json").write_text('{"mine": 1}'),
        "dataset_statistics.json",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "not a readable safetensors file"),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop(HEAD)), rf"tensor {HEAD} is missing"),
    "unknown tensor": (lambda d: edit_weights(d, lambda t: t.update(odd=t[HEAD][:1].clone())), "unknown tensor odd"),
    "wrong shape": (
        lambda d: edit_weights(d, lambda t: t.update({HEAD: t[HEAD][:5].clone()})),
        rf"tensor {HEAD} must have shape \(768, 160\), got \(5, 160\)",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_is_refused_in_one_sentence(nano: Checkpoint, tmp_path: Path, breakage: str):
    save_checkpoint(tmp_path, nano.model, nano.tokenizer)
    break_it, message = BREAKAGES[breakage]
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_the_published_training_says_of_its_actions_beside_a_checkpoint_is_known(
    nano: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, nano.model, nano.tokenizer)
    mine = {"mine": {**next(iter(nano.config.norm_stats.values())), "num_transitions": 9}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(mine))
    assert load_config(tmp_path).norm_stats.keys() == {*nano.config.norm_stats, "mine"}


def test_a_missing_shard_is_named(tmp_path: Path):
    shutil.copytree(PUBLISHED, tmp_path / "copy")
    (tmp_path / "copy" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002\.safetensors .* is missing"):
        load_reference(tmp_path / "copy")


def test_neither_a_folder_nor_a_hub_id():
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint("no/such/folder")


def test_openvla_7b_has_its_size_and_its_names():
    """The published config.json, field for field; the names of all four kinds of blocks, and of what is never used."""
    statistics = {"bridge_orig": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}
    config = VLAConfig.from_dict(
        {
            "model_type": "openvla",
            "arch_specifier": "no-align+fused-gelu-mlp",
            "vision_backbone_id": "dinosiglip-vit-so-224px",
            "llm_backbone_id": "llama2-7b-pure",
            "image_resize_strategy": "resize-naive",
            "image_sizes": [224, 224],
            "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
            "timm_override_act_layers": [None, None],
            "use_fused_vision_backbone": True,
            "n_action_bins": 256,
            "pad_to_multiple_of": 64,
            "pad_token_id": 32000,
            "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
            "norm_stats": statistics,
        }
    )
    with torch.device("meta"):
        model = VLA(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == 7.54
    assert (config.vocabulary, config.action_begin, config.num_image_tokens) == (32000, 31744, 256)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    published = {
        "vision_backbone.featurizer.cls_token": (1, 1, 1024),
        "vision_backbone.featurizer.reg_token": (1, 4, 1024),
        "vision_backbone.featurizer.pos_embed": (1, 256, 1024),
        "vision_backbone.featurizer.patch_embed.proj.weight": (1024, 3, 14, 14),
        "vision_backbone.featurizer.blocks.23.ls2.scale_factor": (1024,),
        "vision_backbone.featurizer.norm.bias": (1024,),
        "vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight": (4304, 1152),
        "vision_backbone.fused_featurizer.attn_pool.kv.weight": (2304, 1152),
        "projector.fc1.weight": (8704, 2176),
        "projector.fc3.bias": (4096,),
        "language_model.model.embed_tokens.weight": (32064, 4096),
        "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "language_model.lm_head.weight": (32064, 4096),
    }
    assert {name: names.get(name) for name in published} == published


def test_configs_survive_a_round_trip():
    config = nano_config(STATISTICS, state_names=tuple("abcdefgh"), camera="wrist", tick_rate_hz=5.0)
    assert VLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fresh_models_are_the_same_for_the_same_seed():
    config = nano_config(STATISTICS)
    one, same, other = (fingerprint(VLA.initialise(config, seed).state_dict()) for seed in (0, 0, 1))
    assert one == same != other


def test_nano_fits_twelve_megabytes():
    model = VLA.initialise(nano_config(STATISTICS))
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 12e6
