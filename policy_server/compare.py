"""Our outputs beside the reference's: the `compare DIR` command.

DIR is laid out like `../shared/openvla_golden/`; the stages whose files are there are compared, and one line is printed
for each.  Limits are absolute errors in float32; ids must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.checkpoint import CONFIG, Checkpoint, load_checkpoint
from policy_server.vla.config import VLAConfig
from policy_server.vla.decoding import decode
from policy_server.vla.model import VLA, collate
from policy_server.vla.passes import DecodeInput
from policy_server.vla.preprocessing import LIBERO_CROP_AREA, Prepared, Preprocessor
from protos import image

CHECKPOINTS = {"model_56px": "checkpoint_56px_bf16_sharded", "model_224px": "checkpoint_224px_fp32"}
LOGITS_LIMIT, PIXELS_LIMIT, LOGPROBS_LIMIT, ACTIONS_LIMIT = 1e-4, 1e-6, 1e-4, 1e-6
EQUAL_LEVELS = 0.999


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage."""

    stage: str
    error: float
    """largest over all cases"""
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.stage:<44} {self.error:9.2e}  limit {self.limit:7.0e}  {verdict:<6} {self.note}"


class NothingToCompare(ValueError):
    """The folder holds none of the reference files."""


def compare(folder: Path | str) -> list[Row]:
    """Every stage the folder has reference files for.  Raises NothingToCompare and CheckpointError."""
    folder = Path(folder)
    rows = [*_preprocessing(folder), *_action_tables(folder)]
    for name, checkpoint in CHECKPOINTS.items():
        if (folder / "golden" / f"{name}.npz").is_file():
            loaded = load_reference(folder / checkpoint)
            rows += [*_model(folder, name, loaded), *_texts(folder, loaded), *_edges(folder, loaded)]
    if not rows:
        raise NothingToCompare(f"{folder}: expected golden/ and preprocess/ with reference files, found none")
    return rows


def report(rows: Sequence[Row]) -> str:
    """The table, with a closing line."""
    failed = sum(not row.passed for row in rows)
    closing = f"{len(rows)} stages, {failed} FAILED" if failed else f"{len(rows)} stages, all within their limits"
    return "\n".join([*map(str, rows), closing])


def load_reference(folder: Path) -> Checkpoint:
    """A reference checkpoint in float32; its miniature towers, unknown by name, are described in fixture_arch.json."""
    described = folder / "fixture_arch.json"
    if not described.is_file():
        return load_checkpoint(folder)
    arch = json.loads(described.read_text())
    config = json.loads((folder / CONFIG).read_text())
    config["image_path"] = "processor"
    config["vision_towers"] = [_tower(arch[name]) for name in ("featurizer", "fused_featurizer") if name in arch]
    with TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            if file.name != CONFIG:
                (Path(scratch) / file.name).symlink_to(file.resolve())
        (Path(scratch) / CONFIG).write_text(json.dumps(config))
        return load_checkpoint(scratch)


def _tower(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": arch["img_size"],
        "patch_size": arch["patch_size"],
        "width": arch["embed_dim"],
        "depth": arch["depth"],
        "heads": arch["num_heads"],
        "mlp_width": arch["mlp_hidden"],
        "output_block": arch["depth"] - 2,
        "class_token": arch["class_token"],
        "register_tokens": arch["reg_tokens"],
        "layer_scale": arch["layer_scale"],
        "attention_pool": arch.get("attn_pool", False),
    }


def _preprocessing(folder: Path) -> Iterator[Row]:
    path = folder / "preprocess" / "libero_preprocess.npz"
    if not path.is_file():
        return
    arrays = np.load(path)
    rotated = [frame[::-1, ::-1] for frame in arrays["raw"]]
    size = arrays["resized_u8"].shape[1:3]
    stored = [image.jpeg_round_trip(frame) for frame in rotated]
    cropped = [image.centre_crop(image.resize(frame, size), area=LIBERO_CROP_AREA) for frame in stored]
    yield _levels("JPEG round trip, fast DCT", stored, arrays["jpeg_decoded"])
    yield _levels("Lanczos-3 resize", [image.resize(x, size) for x in arrays["jpeg_decoded"]], arrays["resized_u8"])
    crops = [image.centre_crop(frame, area=LIBERO_CROP_AREA) for frame in arrays["resized_u8"]]
    yield _levels("centre crop", crops, arrays["cropped_u8"])
    yield _levels("the three together", cropped, arrays["cropped_u8"])


def _levels(stage: str, ours: Sequence[np.ndarray], reference: np.ndarray) -> Row:
    """Grey levels: at most one apart, and equal in nearly all values; too few equal counts as a level more."""
    difference = np.abs(np.stack(ours).astype(int) - reference.astype(int))
    equal = float((difference == 0).mean())
    error = float(difference.max()) + (equal < EQUAL_LEVELS)
    return Row(stage=f"preprocess: {stage} (levels)", error=error, limit=1, note=f"{equal:.4%} equal")


def _action_tables(folder: Path) -> Iterator[Row]:
    path = folder / "golden" / "action_tokenizer.npz"
    if not path.is_file():
        return
    arrays = np.load(path)
    for vocabulary in (32000, 960):
        table = _table(vocabulary)
        wrong = sum(
            int((table.token_ids(arrays[f"{name}/actions"]) != arrays[f"{name}/token_ids_v{vocabulary}"]).sum())
            for name in ("random_f64", "random_f32", "edges_f64", "edges_f32")
        )
        yield Row(stage=f"actions to ids, vocabulary {vocabulary} (wrong)", error=wrong, limit=0)
        ids, centres = (arrays[f"all_ids_v{vocabulary}/{name}"] for name in ("token_ids", "decoded"))
        error = float(np.abs(table.centre(ids) - centres).max())
        yield Row(stage=f"ids to actions, vocabulary {vocabulary}", error=error, limit=ACTIONS_LIMIT)


def _table(vocabulary: int) -> ActionTokens:
    config = VLAConfig.from_dict(
        {
            "model_type": "openvla",
            "arch_specifier": "no-align+gelu-mlp",
            "timm_model_ids": ["vit_so400m_patch14_siglip_224"],
            "text_config": {"vocab_size": vocabulary + 64},
            "norm_stats": {"any": {"action": {"q01": [-1.0], "q99": [1.0]}}},
        }
    )
    return ActionTokens(config)


def _model(folder: Path, name: str, checkpoint: Checkpoint) -> Iterator[Row]:
    """The stages from the image to the action, each the worst of all cases."""
    arrays = np.load(folder / "golden" / f"{name}.npz")
    described = json.loads((folder / "golden" / f"{name}.json").read_text())["cases"]
    cases = [case for case in described if f"{case['case']}/step_logits" in arrays]
    first_key = next(iter(checkpoint.config.norm_stats))
    preprocessor = Preprocessor(checkpoint.config, checkpoint.tokenizer, unnorm_key=first_key)
    worst: dict[str, Row] = {}
    for index, case in enumerate(cases):
        prefix = f"{case['case']}/"
        expected = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
        prepared = preprocessor.prepare(_image(folder, expected, index), case["task"])
        for row in [*_stages(checkpoint.model, expected, prepared), *_answer(checkpoint.model, expected, prepared)]:
            if row.stage not in worst or not row.error <= worst[row.stage].error:  # a NaN is worse than any number
                worst[row.stage] = row
    for row in worst.values():
        yield replace(row, stage=f"{checkpoint.config.image_size} px: {row.stage}", note=f"{len(cases)} cases")


def _texts(folder: Path, checkpoint: Checkpoint) -> Iterator[Row]:
    """Any text: double spaces, byte fallback, special tokens."""
    path = folder / "golden" / "tokenizer.json"
    if path.is_file():
        texts = json.loads(path.read_text())
        wrong = sum(checkpoint.tokenizer.encode(text["text"]).tolist() != text["input_ids"] for text in texts)
        yield Row(stage="tokenizer: texts (wrong)", error=wrong, limit=0, note=f"{len(texts)} texts")


def _edges(folder: Path, checkpoint: Checkpoint) -> Iterator[Row]:
    """Ids outside the action range."""
    path = folder / "golden" / "decode_edges.json"
    if path.is_file():
        for key in checkpoint.config.norm_stats:
            table = ActionTokens(checkpoint.config, key)
            edges = json.loads(path.read_text())
            errors = [_error(table.decode(edge["token_ids"])[0], np.array(edge[f"action_{key}"])) for edge in edges]
            yield Row(stage=f"ids outside the range, {key}", error=max(errors), limit=ACTIONS_LIMIT)


def _image(folder: Path, expected: Mapping[str, np.ndarray], index: int) -> np.ndarray:
    """The case's own image; the 224 px cases take the end of the preprocessing chain instead."""
    if "image" in expected:
        return expected["image"]
    return np.load(folder / "preprocess" / "libero_preprocess.npz")["cropped_u8"][index]


@torch.inference_mode()
def _stages(vla: VLA, expected: Mapping[str, np.ndarray], prepared: Prepared) -> Iterator[Row]:
    """What the model computes before it answers, for the stages the case has."""
    prompts = collate([prepared])
    pixels = vla.pixel_values(prompts.images_BHW3)
    features = [tower(part) for tower, part in zip(vla.vision_backbone.towers, pixels.split(3, 1), strict=True)]
    projected = vla.projector(torch.cat(features, -1))
    tokens = torch.from_numpy(expected["action_token_ids"])[None]
    hidden = vla.hidden(prompts, tokens[:, :-1])[0]
    prompt_end = hidden.shape[0] - tokens.shape[1]
    logits = vla.language_model.lm_head(hidden)
    yield Row(stage="prompt ids (wrong)", error=_wrong(prepared.input_ids, expected["input_ids"]), limit=0)
    ours = {
        "pixel_values": (pixels[0], PIXELS_LIMIT),
        "featurizer_patches": (features[0][0], LOGITS_LIMIT),
        "fused_featurizer_patches": (features[-1][0], LOGITS_LIMIT),
        "projected_patches": (projected[0], LOGITS_LIMIT),
        "logits_full": (logits[: prompt_end + 1], LOGITS_LIMIT),
        "logits_text_positions": (logits[vla.config.num_image_tokens + 1 : prompt_end + 1], LOGITS_LIMIT),
        "last_hidden_prompt_end": (hidden[prompt_end], LOGITS_LIMIT),
        "step_logits": (logits[prompt_end:], LOGITS_LIMIT),
    }
    for name, (tensor, limit) in ours.items():
        if name in expected:
            yield Row(stage=name, error=_error(tensor.numpy(), expected[name]), limit=limit)


def _answer(vla: VLA, expected: Mapping[str, np.ndarray], prepared: Prepared) -> Iterator[Row]:
    """Greedy decoding, its log-probabilities, and the actions under every key."""
    answer = decode(vla, [DecodeInput(prepared=prepared)])
    token_ids, logprobs = answer.token_ids_BN[0], answer.token_logprobs_BN[0]
    yield Row(stage="action tokens (wrong)", error=_wrong(token_ids, expected["action_token_ids"]), limit=0)
    error = _error(logprobs, expected["logprob_action_vocab"])
    yield Row(stage="log-probabilities", error=error, limit=LOGPROBS_LIMIT)
    for key in vla.config.norm_stats:
        actions = ActionTokens(vla.config, key).decode(token_ids)[0]
        yield Row(stage=f"actions, {key}", error=_error(actions, expected[f"action_{key}"]), limit=ACTIONS_LIMIT)


def _error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(ours - reference).max())


def _wrong(ours: np.ndarray, reference: np.ndarray) -> int:
    """How many ids differ; another length makes all of them wrong."""
    return int((ours != reference).sum()) if ours.shape == reference.shape else len(reference)
