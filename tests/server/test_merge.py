"""`policy_server merge`: a model and its adapter become one checkpoint in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policy_server.__main__ import main
from policy_server.config import ServeConfig
from policy_server.loading import load
from policy_server.vla.checkpoint import load_checkpoint, load_config, save_checkpoint, weights_fingerprint
from policy_server.vla.decoding import decode
from policy_server.vla.lora import load_lora, merge_lora
from tests.server.publishing import adapter
from tests.vla.requests import random_requests


@pytest.fixture
def adapter_folder(tiny_vla: Path, tmp_path: Path) -> Path:
    adapter(load_checkpoint(tiny_vla).model, tmp_path / "adapter")
    return tmp_path / "adapter"


def merge(model: Path, adapter: Path, out: Path, *more: str) -> int:
    return main(["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(out), *more])


def test_the_merged_checkpoint_decodes_as_the_adapter_beside_its_base(tiny_vla, adapter_folder, tmp_path):
    out = tmp_path / "merged"
    assert merge(tiny_vla, adapter_folder, out) == 0
    merged, beside = load_checkpoint(out), load_checkpoint(tiny_vla)
    plain = decode(beside.model, requests := random_requests(beside, 3, np.random.default_rng(0), greedy=1.0))
    load_lora(beside.model, adapter_folder)
    ours, theirs = decode(merged.model, requests), decode(beside.model, requests)
    merge_lora(beside.model)
    assert weights_fingerprint(merged.model) == weights_fingerprint(beside.model) == merged.fingerprint
    assert np.array_equal(ours.token_ids_BN, theirs.token_ids_BN)
    np.testing.assert_allclose(ours.token_logprobs_BN, theirs.token_logprobs_BN, atol=5e-5)
    assert np.abs(plain.token_logprobs_BN - ours.token_logprobs_BN).max() > 1e-2


@pytest.fixture
def cloned_folder(tiny_vla: Path, adapter_folder: Path) -> Path:
    """An adapter that was trained on actions of its own."""
    (statistics,) = load_config(tiny_vla).norm_stats.values()
    wider = {"action": statistics["action"] | {"q99": [2.0] * len(statistics["action"]["q99"])}}
    (adapter_folder / "dataset_statistics.json").write_text(json.dumps({"mine": {**statistics, **wider}}))
    return adapter_folder


def test_the_merged_checkpoint_knows_the_actions_that_its_adapter_was_trained_on(tiny_vla, cloned_folder, tmp_path):
    assert merge(tiny_vla, cloned_folder, tmp_path / "merged") == 0
    assert load_config(tmp_path / "merged").norm_stats["mine"]["action"]["q99"][0] == 2.0


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_served_with_the_actions_that_it_was_trained_on(tiny_vla, cloned_folder, tmp_path, beside):
    versions = {"episodes": tmp_path / "episodes", "admin_port": 0} if beside else {}
    config = ServeConfig(model=str(tiny_vla), adapter=cloned_folder, unnorm_key="mine", device="cpu", **versions)
    assert config.has_versions == beside
    assert load(config).spec.action[0].high == pytest.approx(2.0, rel=0.01)  # the centre of the last bin


def test_it_is_complete_in_the_published_layout(tiny_vla, adapter_folder, tmp_path):
    merge(tiny_vla, adapter_folder, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in tiny_vla.iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".merged")] == []
    names = [set(load_file(folder / "model.safetensors")) for folder in (tiny_vla, tmp_path / "merged")]
    assert names[0] == names[1]


def test_weights_keep_the_dtype_they_are_stored_in_unless_told(tiny_vla, adapter_folder, tmp_path):
    half = load_checkpoint(tiny_vla, dtype="bfloat16")
    save_checkpoint(tmp_path / "half", half.model, half.tokenizer)
    merge(tmp_path / "half", adapter_folder, tmp_path / "stored")
    merge(tmp_path / "half", adapter_folder, tmp_path / "wide", "--dtype", "float32")
    dtypes = [{t.dtype for t in load_file(tmp_path / n / "model.safetensors").values()} for n in ("stored", "wide")]
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


def test_a_folder_that_exists_is_not_written_over(tiny_vla, adapter_folder, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    assert merge(tiny_vla, adapter_folder, tmp_path / "merged") == 2
    assert "exists" in capsys.readouterr().err and not list((tmp_path / "merged").iterdir())


@pytest.mark.parametrize(("model", "adapter"), [("nowhere", "adapter"), ("tiny", "nowhere")])
def test_what_cannot_be_read_is_one_sentence_and_exit_code_2(
    tiny_vla, adapter_folder, tmp_path, capsys, model, adapter
):
    model = tiny_vla if model == "tiny" else tmp_path / model
    assert merge(model, tmp_path / adapter, tmp_path / "merged") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("policy_server: ")]
    assert "cannot merge: " in line and not (tmp_path / "merged").exists()
