"""Low-rank adapters in PEFT's file layout, on every linear layer but the head.

An adapted layer keeps the base's parameter names and adds lora_A and lora_B, in float32 whatever the base's dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from policy_server.vla.checkpoint import CheckpointError, adapted_layers, fault
from policy_server.vla.lora_linear import LoRALinear
from policy_server.vla.model import VLA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "language_model.lm_head"
VISION = ("vision_backbone.", "projector.")

# Variants of PEFT that change the arithmetic, with the one value implemented here.
FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def apply_lora(model: VLA, *, rank: int, alpha: float, dropout: float = 0.0, vision: bool = True) -> list[nn.Parameter]:
    """Adapts every linear layer but the head and freezes the rest; gives the parameters to train.

    A fresh adapter changes nothing: its lora_B is zero.  vision: those of towers and projector, too.
    """
    model.requires_grad_(False)
    model.language_model.unfuse()
    for name, linear in linears(model).items():
        if vision or not name.startswith(VISION):
            put(model, name, LoRALinear.fresh(linear, rank=rank, alpha=alpha, dropout=dropout))
    return [parameter for name, parameter in model.named_parameters() if _is_lora(name)]


def merge_lora(model: VLA) -> None:
    """Adds the adapter into the base and removes it."""
    model.language_model.unfuse()
    for name, layer in dict(adapted_layers(model)).items():
        put(model, name, layer.merged())


def save_lora(model: VLA, folder: Path | str, *, base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `base` names the base model for other readers."""
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapter to save")
    first = next(iter(layers.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **FIXED,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "r": first.rank,
        "target_modules": sorted(layers),
        "task_type": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in lora_tensors(model).items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


def load_lora(model: VLA, folder: Path | str) -> None:
    """Adapts the layers an adapter names, with its weights, and freezes the rest.

    Raises CheckpointError, and then changes nothing.
    """
    file, layers = read_lora(model, folder), linears(model)
    model.requires_grad_(False)
    model.language_model.unfuse()
    for name, matrices in file.matrices.items():
        # Copies: what was read may be a view of the file.
        own = [matrix.to(model.device, copy=True) for matrix in matrices]
        put(model, name, LoRALinear(layers[name], *own, alpha=file.alpha, dropout=file.dropout))


@dataclass(frozen=True, kw_only=True)
class LoRAFile:
    """An adapter as it was stored."""

    rank: int
    alpha: float
    dropout: float
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """float32 A (rank, inputs) and B (outputs, rank) of every adapted layer"""


def read_lora(model: VLA, folder: Path | str) -> LoRAFile:
    """An adapter for the model, which stays as it is.  Raises CheckpointError."""
    folder = Path(folder)
    config, tensors = _read(folder)
    layers = linears(model)
    named = {_layer(key, layers, folder) for key in tensors}
    # Our own adapters name every layer in full; PEFT's may name parts of names, which promise no single layer.
    adapted = sorted(named | (layers.keys() & set(config.get("target_modules") or ())))
    return LoRAFile(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
        matrices={name: _matrices(tensors, name, layers[name], config["r"], folder) for name in adapted},
    )


def lora_tensors(model: VLA) -> dict[str, torch.Tensor]:
    """The adapter's matrices under PEFT's names."""
    return {
        f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
        for name, layer in adapted_layers(model)
        for matrix in ("lora_A", "lora_B")
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load((folder / WEIGHTS).read_bytes())  # load_file leaks a little of every tensor
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable adapter: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: {CONFIG} must hold an object, got {type(config).__name__}")
    for key, implemented in FIXED.items():
        if config.get(key) and config[key] != implemented:
            raise CheckpointError(f"{folder}: {CONFIG}: {key} must be {implemented!r}, got {config[key]!r}")
    limits = {"r": (int, 1, math.inf), "lora_alpha": (int | float, 0, 1e6), "lora_dropout": (int | float, 0, 1)}
    for key, (kind, least, most) in limits.items():
        value = config.setdefault(key, 0.0 if key == "lora_dropout" else None)
        if not isinstance(value, kind) or not least <= value <= most:
            raise CheckpointError(f"{folder}: {CONFIG}: {key} must be a number in [{least}, {most}], got {value!r}")
    if not all(isinstance(name, str) for name in config.get("target_modules") or ()):
        raise CheckpointError(f"{folder}: {CONFIG}: target_modules must be names, got {config['target_modules']!r}")
    return config, tensors


def _layer(key: str, linears: Mapping[str, nn.Linear], folder: Path) -> str:
    """The name of the layer that a tensor of an adapter belongs to."""
    name, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    if matrix not in ("lora_A", "lora_B") or name not in linears or key != f"{PREFIX}{name}.{matrix}.weight":
        raise CheckpointError(f"{folder}: unknown tensor {key} in {WEIGHTS}")
    return name


def _matrices(
    tensors: Mapping[str, torch.Tensor], name: str, linear: nn.Linear, rank: int, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    lora_A = _matrix(tensors, f"{PREFIX}{name}.lora_A.weight", (rank, linear.in_features), folder)
    lora_B = _matrix(tensors, f"{PREFIX}{name}.lora_B.weight", (linear.out_features, rank), folder)
    return lora_A, lora_B


def _matrix(tensors: Mapping[str, torch.Tensor], key: str, shape: tuple[int, int], folder: Path) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(f"{folder}: tensor {key} is missing from {WEIGHTS}")
    if wrong := fault(tensors[key], shape):
        raise CheckpointError(f"{folder}: tensor {key} {wrong}")
    return tensors[key].float()


def linears(model: VLA) -> dict[str, nn.Linear]:
    """The layers that an adapter may name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != HEAD}


def put(model: VLA, name: str, layer: nn.Linear) -> None:
    """Replaces a layer."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))
