"""What a run was asked for, where it stands, and the models that it leaves: each written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from protos.episode_file import sync

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that is not in the optimiser's tensors."""

    step: int = 0
    """optimiser steps taken"""
    seconds: float = 0.0
    """wall time used"""
    best_loss: float = float("inf")
    """lowest validation loss so far"""
    data: str = ""
    """Samples.fingerprint"""

    def save(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        save_state(path, asdict(self), tensors)

    @classmethod
    def load(cls, path: Path) -> tuple[RunState, dict[str, torch.Tensor]]:
        """The state and the optimiser's tensors."""
        fields, tensors = load_state(path)
        return cls(**fields), tensors


def save_state(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """A run's numbers and tensors in one file, which is replaced whole and survives a power cut once this returns."""
    partial = path.with_suffix(".partial")
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, partial, {"run": json.dumps(fields)})
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What save_state() wrote."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def keep_record(record: Path, config: DataclassInstance, *, unsaid: Sequence[str] = ()) -> None:
    """Writes down what was asked for, whole or not at all."""
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps({n: value for n, value in _said(config).items() if n not in unsaid}, indent=1))
    os.replace(partial, record)


def differences(record: Path, config: DataclassInstance, *, but: Sequence[str]) -> str:
    """What a run's record says otherwise than the config, in words."""
    before, wanted = json.loads(record.read_text()), _said(config)
    changed = [name for name in before if name not in but and before[name] != wanted.get(name)]
    return "; ".join(f"{name} was {before[name]!r}, got {wanted.get(name)!r}" for name in changed)


def _said(config: DataclassInstance) -> dict[str, Any]:
    """As JSON has it."""
    return json.loads(json.dumps(asdict(config), default=str))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder is this process's alone while the block lasts.  Raises ValueError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{folder} is in use by another trainer") from error
    finally:
        os.close(claim)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write to inside the block, which takes the place of `folder` as a whole when the block is done."""
    fresh, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for path in (*fresh.iterdir(), fresh):
        sync(path)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
