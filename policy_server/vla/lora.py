"""Low-rank adapters (Hu et al., 2021) in PEFT's file layout: W x + (alpha / r) B A x, on every linear layer
but the head.

An adapted layer keeps the base's parameter names and adds lora_A and lora_B, in float32 whatever the base's dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from policy_server.vla.checkpoint import CheckpointError
from policy_server.vla.model import VLA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "language_model.lm_head"

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


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside it; it shares the base's parameters."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = functional.linear(x, self.weight, self.bias)
        dropped = functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return base + (functional.linear(functional.linear(dropped, self.lora_A), self.lora_B) * self.scale).to(x.dtype)

    def merged(self) -> nn.Linear:
        """A plain linear layer with W + (alpha / r) B A."""
        merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = (self.lora_B @ self.lora_A * self.scale).detach()
        merged.weight = nn.Parameter((self.weight.detach().float() + delta).to(self.weight.dtype))
        merged.bias = self.bias
        return merged


def apply_lora(model: VLA, *, rank: int, alpha: float, dropout: float = 0.0) -> list[nn.Parameter]:
    """Adapts every linear layer but the head and freezes the rest; gives the parameters to train.

    A fresh adapter changes nothing: its lora_B is zero.
    """
    model.requires_grad_(False)
    model.language_model.unfuse()
    for name, linear in list(_linears(model)):
        _put(model, name, LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout))
    return [parameter for name, parameter in model.named_parameters() if _is_lora(name)]


def merge_lora(model: VLA) -> None:
    """Adds the adapter into the base and removes it."""
    model.language_model.unfuse()
    for name, layer in list(_adapted(model)):
        _put(model, name, layer.merged())


def save_lora(model: VLA, folder: Path | str, *, base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `base` names the base model for other readers."""
    layers = dict(_adapted(model))
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
    """Adapts the layers an adapter names, with its weights.  Raises CheckpointError."""
    folder = Path(folder)
    config, tensors = _read(folder)
    linears = dict(_linears(model))
    layers: dict[str, LoRALinear] = {}
    for key in tensors:
        name, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B") or name not in linears:
            raise CheckpointError(f"{folder}: unknown tensor {key} in {WEIGHTS}")
        if name not in layers:
            layers[name] = LoRALinear(
                linears[name],
                rank=int(config["r"]),
                alpha=float(config["lora_alpha"]),
                dropout=float(config.get("lora_dropout", 0.0)),
            )
    model.language_model.unfuse()
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            _copy(getattr(layer, matrix), tensors, f"{PREFIX}{name}.{matrix}.weight", folder)
        _put(model, name, layer)


def lora_tensors(model: VLA) -> dict[str, torch.Tensor]:
    """The adapter's matrices under PEFT's names."""
    return {
        f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
        for name, layer in _adapted(model)
        for matrix in ("lora_A", "lora_B")
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable adapter: {error}") from error
    for key, implemented in FIXED.items():
        if config.get(key) and config[key] != implemented:
            raise CheckpointError(f"{folder}: {CONFIG}: {key} must be {implemented!r}, got {config[key]!r}")
    if not isinstance(config.get("r"), int) or "lora_alpha" not in config:
        raise CheckpointError(f"{folder}: {CONFIG} must have r and lora_alpha")
    return config, tensors


def _copy(parameter: nn.Parameter, tensors: dict[str, torch.Tensor], key: str, folder: Path) -> None:
    if key not in tensors:
        raise CheckpointError(f"{folder}: tensor {key} is missing from {WEIGHTS}")
    if tensors[key].shape != parameter.shape:
        raise CheckpointError(
            f"{folder}: tensor {key} must have shape {tuple(parameter.shape)}, got {tuple(tensors[key].shape)}"
        )
    parameter.data.copy_(tensors[key])


def _linears(model: VLA) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != HEAD:
            yield name, module


def _adapted(model: VLA) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _put(model: VLA, name: str, layer: nn.Linear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
