"""A model made of another's tensors and some of its own: only what differs takes memory.

Every function leaves the model it starts from as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from policy_server.vla.checkpoint import DTYPES, WEIGHTS, CheckpointError, adapted_layers, fault
from policy_server.vla.lora import linears, put
from policy_server.vla.model import VLA


def with_tensors(base: VLA, folder: Path) -> VLA:
    """The base with the tensors of FOLDER/model.safetensors in the place of its own, laid out for decoding.

    Raises CheckpointError.
    """
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: {WEIGHTS} is not a readable safetensors file: {error}") from error
    own = base.state_dict()
    if not tensors:
        raise CheckpointError(f"{folder}: {WEIGHTS} must hold at least one tensor, got none")
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"{folder}: unknown tensor {name} in {WEIGHTS}")
        if wrong := fault(tensor, own[name].shape):
            raise CheckpointError(f"{folder}: tensor {name} {wrong}")
    like = {"device": base.device, "dtype": base.language_model.lm_head.weight.dtype}
    with beside_decoding(base.device):
        # Copies always: what was loaded may be a view of the file, which the version must outlive.
        replaced = {name: tensor.to(**like, copy=True) for name, tensor in tensors.items()}
        model = _checked(sharing(base, {**own, **replaced}), base, folder)
        model.language_model.fuse()
        return model


def as_served(model: VLA, dtype: str) -> VLA:
    """What a server that computes in `dtype` makes of the model: cast, laid out for decoding, adapters beside it."""
    adapters = dict(adapted_layers(model))
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    served = sharing(model, {name: tensor.to(DTYPES[dtype]) for name, tensor in own.items()})
    layers = linears(served)
    for name, adapter in adapters.items():
        put(served, name, adapter.over(layers[name]))
    if not adapters:
        served.language_model.fuse()
    return served.eval()


@contextmanager
def beside_decoding(device: torch.device) -> Iterator[None]:
    """On CUDA the block's work goes beside the passes under way, not before them, and is done when the block ends.

    So does a capture: whatever device the thread computes on otherwise, in the block it is this one.
    """
    if device.type != "cuda":
        yield
        return
    stream = _second_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all versions: memory that a dropped one leaves is used by the next one of the same stream.
    return torch.cuda.Stream(device)


def sharing(base: VLA, tensors: Mapping[str, torch.Tensor]) -> VLA:
    """A model with parameters of its own, which lie where the tensors lie."""
    with torch.device("meta"):
        model = VLA(base.config)
    model.load_state_dict(tensors, assign=True)
    model.pixel_mean, model.pixel_std = base.pixel_mean, base.pixel_std
    return model.to(base.device).eval().requires_grad_(False)


def _checked(model: VLA, base: VLA, folder: Path) -> VLA:
    """The model, whose own tensors are finite on the device too."""
    shared = base.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() != shared[name].data_ptr() and not tensor.isfinite().all():
            raise CheckpointError(f"{folder}: tensor {name} is not finite in {tensor.dtype}")
    return model
