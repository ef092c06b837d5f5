"""Folders in OpenVLA's published layout: config.json, safetensors, tokenizer, preprocessor_config.json.

Whatever is wrong with one is told in a sentence, as CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from policy_server.vla.config import ConfigError, VLAConfig
from policy_server.vla.lora_linear import LoRALinear
from policy_server.vla.model import VLA
from policy_server.vla.tokenizer import FILE as TOKENIZER
from policy_server.vla.tokenizer import Tokenizer

CONFIG, PREPROCESSOR, STATISTICS = "config.json", "preprocessor_config.json", "dataset_statistics.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors"]
SHARD_BYTES = 5_000_000_000

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model computes in."""
FLOATS = (*DTYPES.values(), torch.float16)
"""What weights may be stored in."""


EMBEDDED = {"nano": Path(__file__).parent.parent / "checkpoints" / "nano"}
"""Checkpoints that come with the package, by the name that stands for them."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint of a model we know.  The message says what is wrong and where."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was loaded."""

    path: Path
    model: VLA
    tokenizer: Tokenizer
    fingerprint: str
    """fingerprint() of the tensors as they are stored"""

    @property
    def config(self) -> VLAConfig:
        return self.model.config


def load_checkpoint(
    source: Path | str, *, dtype: str | None = "float32", device: torch.device | str = "cpu"
) -> Checkpoint:
    """A model in evaluation mode, of a folder or, where there is none, of a hub id.  Raises CheckpointError.

    dtype None keeps what is stored.
    """
    folder = local_folder(source)
    config = load_config(folder)
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{folder}: {TOKENIZER} is missing")
    try:
        tokenizer = Tokenizer.load(folder)
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{folder}: {TOKENIZER} is not readable: {error}") from error
    with torch.device("meta"):
        model = VLA(config)
    stored = _fill(model, folder, dtype=DTYPES[dtype] if dtype else None, device=torch.device(device))
    return Checkpoint(path=folder, model=model.eval(), tokenizer=tokenizer, fingerprint=stored)


def local_folder(source: Path | str, *, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder itself, that of an embedded model, or where the hub's files were put: those of these patterns."""
    folder = EMBEDDED.get(str(source), Path(source))
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: there is no such folder, and it is no hub id of the form OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{source}: there is no such folder, and the hub did not give it: {reason}") from error


def load_config(folder: Path) -> VLAConfig:
    """config.json, with the pixel statistics of preprocessor_config.json and what a training left beside it."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: not a checkpoint, {CONFIG} is missing")
    try:
        config = VLAConfig.from_json(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {CONFIG}: {error}") from error
    config = with_statistics(config, folder)
    if not (folder / PREPROCESSOR).is_file():
        return config
    statistics = _read_json(folder / PREPROCESSOR).get("tvf_normalize_params") or []
    if len(statistics) != len(config.towers):
        raise CheckpointError(
            f"{folder}: {PREPROCESSOR}: tvf_normalize_params must have {len(config.towers)} entries,"
            f" got {len(statistics)}"
        )
    try:
        towers = [
            replace(tower, pixel_mean=tuple(one["mean"]), pixel_std=tuple(one["std"]))
            for tower, one in zip(config.towers, statistics, strict=True)
        ]
    except (LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: {PREPROCESSOR}: each of tvf_normalize_params must have mean and std"
        ) from error
    return replace(config, towers=tuple(towers))


def with_statistics(config: VLAConfig, folder: Path) -> VLAConfig:
    """Knows the data sets of the folder's dataset_statistics.json too: the published training says there, beside a
    checkpoint or an adapter, what the actions that it was trained on mean.  Raises CheckpointError.
    """
    if not (folder / STATISTICS).is_file():
        return config
    try:
        return replace(config, norm_stats={**config.norm_stats, **_read_json(folder / STATISTICS)})
    except (ConfigError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {STATISTICS}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.parent}: {path.name} must hold an object, got {type(values).__name__}")
    return values


def _fill(model: VLA, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> str:
    """Puts the checkpoint's tensors in the place of the model's, which may be on the meta device; their fingerprint."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    digests: list[str] = []
    for shard, names in shards(folder).items():
        for name, tensor in _tensors(folder / shard, names):
            if name not in wanted:
                raise CheckpointError(f"{folder}: unknown tensor {name} in {shard}")
            if tuple(tensor.shape) != wanted[name]:
                raise CheckpointError(
                    f"{folder}: tensor {name} must have shape {wanted[name]}, got {tuple(tensor.shape)} in {shard}"
                )
            digests.append(digest(name, tensor))
            tensors[name] = tensor.to(device=device, dtype=dtype)
    if missing := sorted(wanted.keys() - tensors.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: tensor {missing[0]} is missing{more}")
    model.load_state_dict(tensors, assign=True)
    model.to(device)
    return fingerprint_of(digests)


def fault(tensor: torch.Tensor, shape: Sequence[int]) -> str | None:
    """What is wrong with weights that came from elsewhere, as the rest of a sentence."""
    if tuple(tensor.shape) != tuple(shape):
        return f"must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
    if tensor.dtype not in FLOATS:
        return f"must be one of {[str(dtype).removeprefix('torch.') for dtype in FLOATS]}, got {tensor.dtype}"
    finite = tensor.isfinite()
    return None if finite.all() else f"must be finite, got {int((~finite).sum())} values that are not"


def shards(folder: Path) -> dict[str, list[str] | None]:
    """File name -> names of its tensors, None for whatever it holds.  Raises CheckpointError for a missing file."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there")
        return {WEIGHTS: None}
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder}: {INDEX} has no weight_map")
    files: dict[str, list[str] | None] = {}
    for name, shard in weight_map.items():
        names = files.setdefault(shard, [])
        assert names is not None
        names.append(name)
    if missing := [shard for shard in files if not (folder / shard).is_file()]:
        raise CheckpointError(f"{folder}: shard {missing[0]} of {INDEX} is missing")
    return files


def _tensors(path: Path, names: list[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            held = set(file.keys())
            for name in names or sorted(held):
                if name not in held:
                    raise CheckpointError(f"{path.parent}: tensor {name} is missing from shard {path.name}")
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} is not a readable safetensors file: {error}") from error


def save_checkpoint(folder: Path | str, model: VLA, tokenizer: Tokenizer) -> None:
    """Writes the published layout.  LoRA matrices are not part of it: merge them first, or save them with lora.py."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, model.config.to_dict())
    _write_json(folder / PREPROCESSOR, preprocessor_config(model.config))
    tokenizer.save(folder)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    groups = _grouped(tensors)
    if len(groups) == 1:
        save_file(_owned(tensors), str(folder / WEIGHTS), metadata={"format": "pt"})
        return
    weight_map = {}
    for index, names in enumerate(groups, 1):
        shard = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        save_file(_owned({name: tensors[name] for name in names}), str(folder / shard), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, shard))
    size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _grouped(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += tensor.nbytes
    return groups


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors that are views into fused ones, which safetensors refuses."""
    return {name: tensor.clone() if tensor._is_view() else tensor for name, tensor in tensors.items()}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def preprocessor_config(config: VLAConfig) -> dict[str, Any]:
    """The published file's fields that a reader of pixels needs."""
    size = config.image_size
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, size, size] for _ in config.towers],
        "interpolations": ["bicubic" for _ in config.towers],
        "means": [list(tower.pixel_mean) for tower in config.towers],
        "stds": [list(tower.pixel_std) for tower in config.towers],
        "tvf_crop_params": [{"output_size": [size, size]} for _ in config.towers],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(tower.pixel_mean), "std": list(tower.pixel_std)} for tower in config.towers
        ],
        "tvf_resize_params": [
            {"antialias": True, "interpolation": 3, "max_size": None, "size": [size, size]} for _ in config.towers
        ],
        "use_fused_vision_backbone": len(config.towers) == 2,
    }


def held_tensors(model: VLA, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """What the model computes with: the base under the published names, and the factors of adapters, one at a time.

    A factor B has the scale in it; an adapter that changes nothing, its B being zero, is left out.
    With a dtype: as a server holds it that computes in it.
    """
    for name, tensor in model.state_dict().items():
        if not name.endswith((".lora_A", ".lora_B")):
            yield name, tensor.to(dtype or tensor.dtype)
    for name, layer in adapted_layers(model):
        lora_A, lora_B = layer.factors(dtype or layer.weight.dtype)
        if lora_B.any():
            yield from ((f"{name}.lora_A", lora_A), (f"{name}.lora_B", lora_B))


def adapted_layers(model: VLA) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def weights_fingerprint(model: VLA, dtype: str | None = None) -> str:
    """Of what the model computes with: equal for a learner's adapted model and the version a server made of it.

    dtype: what the server computes in, where this model does not.  How a model is laid out in memory does not matter.
    """
    return fingerprint_of(weights_digests(model, dtype).values())


def weights_digests(model: VLA, dtype: str | None = None, *, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """What weights_fingerprint() is made of: digest() of each tensor, by its name.

    known: of tensors that nobody has changed since; they are not read again, which takes 10 s and more for 7 B weights.
    """
    known = known or {}
    held = held_tensors(model, DTYPES[dtype] if dtype else None)
    return {name: known.get(name) or digest(name, tensor) for name, tensor in held}


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hex, of named tensors; it does not depend on their order or on how they are sharded."""
    return fingerprint_of(digest(name, tensor) for name, tensor in tensors.items())


def digest(name: str, tensor: torch.Tensor) -> str:
    """Name, dtype, shape and SHA-256 of the bytes, in a line."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def fingerprint_of(digests: Iterable[str]) -> str:
    """SHA-256, hex, of what digest() says of every tensor, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
