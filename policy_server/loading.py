"""From a configuration to a model that can be served."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from policy_server.config import ServeConfig
from policy_server.errors import CannotStart
from policy_server.remote_model import RemoteModel

if TYPE_CHECKING:  # torch is imported where the model is: in this process, or in others
    from policy_server.vla_model import VlaModel


@contextlib.contextmanager
def opened(config: ServeConfig) -> Iterator[VlaModel | RemoteModel]:
    """The model that the config names: in this process, or in one for each of its devices while the block lasts.

    Raises CannotStart.
    """
    if not config.devices:
        yield load(config)
        return
    with contextlib.closing(RemoteModel(config, config.devices)) as model:
        yield model


def load(config: ServeConfig) -> VlaModel:
    """In this process.  Raises CannotStart."""
    import torch

    from policy_server.vla.action_tokens import UnknownStatistics
    from policy_server.vla.checkpoint import CheckpointError
    from policy_server.vla.policy import Policy
    from policy_server.vla.quantized import CannotQuantize
    from policy_server.vla_model import NO_ROOM, VlaModel

    torch.set_num_threads(config.threads)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise CannotStart(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not cuda:
        raise CannotStart(f"device {device!r} was asked for, but this machine or its torch has no CUDA")
    if device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
        raise CannotStart(f"device {device!r} was asked for, but CUDA has only {torch.cuda.device_count()} here")
    # The kernels for 4 bits are made for bfloat16.
    exact = device == "cpu" and config.weights != "int4"
    dtype = ("float32" if exact else "bfloat16") if config.dtype == "auto" else config.dtype
    bits = None if config.weights == "stored" else config.weights
    # Published weights are over the base, and quantised ones can take nothing in: an adapter stays beside them.
    beside = config.has_versions or bits is not None
    try:
        policy = Policy.load(
            config.model,
            adapter=config.adapter,
            merged=not beside,
            unnorm_key=config.unnorm_key,
            image_path=None if config.image_path == "checkpoint" else config.image_path,
            device=device,
            dtype=dtype,
            bits=bits,
            deterministic_batch=config.max_batch if config.deterministic else None,
        )
        return VlaModel(
            policy,
            name=Path(config.model).name + (f"-{bits}" if bits else ""),
            max_batch=config.max_batch,
            adapter=config.adapter if beside else None,
        )
    except (CheckpointError, UnknownStatistics, CannotQuantize) as error:
        raise CannotStart(f"cannot serve the model {config.model!r}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise CannotStart(NO_ROOM) from error
