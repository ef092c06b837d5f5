"""The door: an Observation message as arrays, or a refusal that names the field, what was got and what is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policy_server.errors import BadRequest
from protos import codec, episode_pb2, policy_pb2


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a policy may trust."""

    images: dict[str, np.ndarray]
    """uint8 (H, W, 3) RGB, upright, for every name in PolicySpec.images; other cameras are left out."""
    state_S: np.ndarray
    """float32 (S,), finite; empty when the policy reads no state."""
    instruction: str
    """Not empty."""


def read_observation(message: episode_pb2.Observation, spec: policy_pb2.PolicySpec, *, field: str) -> Observed:
    """Raises BadRequest; `field` is the path of the message inside its request."""
    try:
        images = {image.name: _image(message, image.name, spec.max_image_bytes, field) for image in spec.images}
        state_S = _state(message, len(spec.state), field)
    except codec.CodecError as error:
        raise BadRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
    if not message.instruction.strip():
        raise BadRequest("must say what to do, got an empty instruction", field=f"{field}.instruction")
    return Observed(images=images, state_S=state_S, instruction=message.instruction)


def check_sampling(temperature: float, noise_correlation: float, *, field: str = "") -> None:
    """Raises BadRequest for what logits cannot be divided by, and for no correlation.

    field: of the message, with a dot after it.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise BadRequest(f"must be finite and not negative, got {temperature}", field=f"{field}temperature")
    if not 0 <= noise_correlation < 1:
        raise BadRequest(f"must be in [0, 1), got {noise_correlation}", field=f"{field}noise_correlation")


def _image(message: episode_pb2.Observation, name: str, max_bytes: int, field: str) -> np.ndarray:
    where = f"{field}.images[{name}]"
    if name not in message.images:
        raise BadRequest(f"the policy needs this camera, got {sorted(message.images)}", field=where)
    image = message.images[name]
    if len(image.data) > max_bytes:
        raise BadRequest(f"data must be at most {max_bytes} bytes, got {len(image.data)}", field=where)
    return codec.decode_image(image, where)


def _state(message: episode_pb2.Observation, size: int, field: str) -> np.ndarray:
    if size == 0:
        return np.empty(0, np.float32)
    where = f"{field}.state"
    state_S = codec.decode_tensor(message.state, where, dtype="float32", shape=(size,))
    if not np.isfinite(state_S).all():
        raise BadRequest(f"must be finite, got {state_S.tolist()}", field=where)
    return state_S


def check_ticks(ticks: Sequence[episode_pb2.Tick], size: int) -> None:
    """Raises BadRequest for a tick whose actions are not `size` finite numbers, or that says nothing of its source."""
    for i, tick in enumerate(ticks):
        if len(tick.action) != size or not np.isfinite(tick.action).all():
            raise BadRequest(f"must be {size} finite numbers, got {list(tick.action)}", field=f"executed[{i}].action")
        if tick.expert_action and (len(tick.expert_action) != size or not np.isfinite(tick.expert_action).all()):
            raise BadRequest(
                f"must be {size} finite numbers or none, got {list(tick.expert_action)}",
                field=f"executed[{i}].expert_action",
            )
        if tick.source == episode_pb2.SOURCE_UNSPECIFIED:
            raise BadRequest("must say who chose the action, got SOURCE_UNSPECIFIED", field=f"executed[{i}].source")
