"""The model computes what the original OpenVLA code computes, stage by stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from policy_server.compare import NothingToCompare, compare, report
from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.model import Prompts
from tests.vla.conftest import TESTS


def test_every_stage_equals_the_reference(reference_folder: Path):
    rows = compare(reference_folder)
    assert len(rows) >= 23
    assert all(row.passed for row in rows), report(rows)


def test_comparison_notices_one_changed_weight(tmp_path: Path):
    shutil.copytree(TESTS / "golden", tmp_path / "golden")
    shard = tmp_path / "golden" / "checkpoint_56px_bf16_sharded" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["language_model.model.norm.weight"][0] *= 1.1
    save_file(tensors, shard)
    failed = {row.stage for row in compare(tmp_path / "golden") if not row.passed}
    assert "56 px: logits_full" in failed and "56 px: projected_patches" not in failed


def test_comparison_refuses_a_folder_without_reference_files(tmp_path: Path):
    with pytest.raises(NothingToCompare, match="found none"):
        compare(tmp_path)


def test_right_padded_batch_equals_the_reference(reference_folder: Path, reference: Checkpoint):
    """Logits at every position, and the training loss over actions and end of sequence."""
    path = reference_folder / "golden" / "batch_56px.npz"
    if not path.is_file():
        pytest.skip(f"lacks {path.name}: it is in the full reference folder only")
    arrays = np.load(path)
    images = np.load(reference_folder / "golden" / "model_56px.npz")
    model = reference.model
    prompts = Prompts(
        images_BHW3=torch.from_numpy(np.stack([images[f"{name}/image"] for name in arrays["case_names"]])),
        input_ids_BL=torch.from_numpy(arrays["input_ids"]),
        lengths_B=torch.from_numpy(arrays["attention_mask"].sum(1)),
        states_BS=None,
    )
    with torch.inference_mode():
        logits = model.language_model.lm_head(model.hidden(prompts, prompts.input_ids_BL[:, :0]))
    valid = torch.from_numpy(arrays["valid_positions"])
    error = (logits - torch.from_numpy(arrays["logits"]))[valid].abs().max()
    assert error < 1e-4
    patches = model.config.num_image_tokens
    labels = torch.from_numpy(arrays["labels"])
    loss = torch.nn.functional.cross_entropy(logits[:, patches:-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-5)
