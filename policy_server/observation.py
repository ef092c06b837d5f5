"""The door: an Observation message as arrays, or a refusal that names the field, what was got and what is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message

from policy_server.errors import BadRequest
from protos import codec, episode_pb2, policy_pb2

MAX_TICKS = 10_000
"""Executed ticks of one request: minutes without an answer, at any arm's rate."""
MAX_CAMERAS = 16
"""Those that the policy does not read are recorded too."""
MAX_NAME = 500
"""Characters of a name that a client chooses, and the server remembers."""
LONGEST_TOKEN = 32
"""Characters: an instruction is not worth a tokenizer's time when it is longer than so many for each token."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = float(np.float32(1e-6)), 1000.0
"""Beyond them logits divided by it are no numbers any more, or all the same."""
MAX_SHOWN = 32
"""Numbers that a sentence has room for."""
SOURCES = {*episode_pb2.Source.values()} - {episode_pb2.SOURCE_UNSPECIFIED}
BESIDE_IMAGES_BYTES = 2 * 2**20
"""Of a request, for everything that is no image."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a policy may trust."""

    images: dict[str, np.ndarray]
    """uint8 (H, W, 3) RGB, upright, for every name in PolicySpec.images; other cameras are left out."""
    state_S: np.ndarray
    """float32 (S,), finite; empty when the policy reads no state."""
    instruction: str
    """Not empty."""


def max_request_bytes(spec: policy_pb2.PolicySpec) -> int:
    """Of the largest request that makes sense: every image that the policy reads at its largest, and the rest."""
    return len(spec.images) * spec.max_image_bytes + BESIDE_IMAGES_BYTES


def read_observation(message: episode_pb2.Observation, spec: policy_pb2.PolicySpec, *, field: str) -> Observed:
    """Raises BadRequest; `field` is the path of the message inside its request."""
    check_cameras(message, field=field)
    try:
        images = {image.name: _image(message, image.name, spec.max_image_bytes, field) for image in spec.images}
        state_S = _state(message, len(spec.state), field)
    except codec.CodecError as error:
        raise BadRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
    if not message.instruction.strip():
        raise BadRequest("must say what to do, got an empty instruction", field=f"{field}.instruction")
    if len(message.instruction) > LONGEST_TOKEN * spec.max_instruction_tokens:
        raise BadRequest(
            f"must be at most {spec.max_instruction_tokens} tokens, got {len(message.instruction)} characters",
            field=f"{field}.instruction",
        )
    return Observed(images=images, state_S=state_S, instruction=message.instruction)


def check_cameras(message: episode_pb2.Observation, *, field: str) -> None:
    """Raises BadRequest for more than can be recorded, which would take many times the memory that they came in."""
    if len(message.images) > MAX_CAMERAS:
        raise BadRequest(f"must be at most {MAX_CAMERAS} of them, got {len(message.images)}", field=f"{field}.images")


def check_sampling(temperature: float, noise_correlation: float, *, field: str = "") -> None:
    """Raises BadRequest for what logits cannot be divided by, and for no correlation.

    field: of the message, with a dot after it.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise BadRequest(
            f"must be 0, or in {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, got {temperature:g}",
            field=f"{field}temperature",
        )
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
    """Raises BadRequest for too many, and for one whose action is not `size` finite numbers, or that has no source."""
    if len(ticks) > MAX_TICKS:
        raise BadRequest(f"must be at most {MAX_TICKS} ticks, got {len(ticks)}", field="executed")
    for i, tick in enumerate(ticks):
        if not _are_numbers(tick.action, size):
            raise BadRequest(f"must be {size} finite numbers, got {_few(tick.action)}", field=f"executed[{i}].action")
        if tick.expert_action and not _are_numbers(tick.expert_action, size):
            raise BadRequest(
                f"must be {size} finite numbers or none, got {_few(tick.expert_action)}",
                field=f"executed[{i}].expert_action",
            )
        if tick.source not in SOURCES:
            field = f"executed[{i}].source"
            check_choice(tick.source, episode_pb2.Source, "must say who chose the action", field=field)


def check_choice(code: int, choices: Any, what: str, *, field: str) -> None:
    """Raises BadRequest for what is unspecified, or none of an enum's values.  what: a sentence's beginning."""
    if code == 0:
        raise BadRequest(f"{what}, got {choices.Name(0)}", field=field)
    if code not in choices.values():
        raise BadRequest(f"{what}: {' or '.join(choices.keys()[1:])}, got code {code}", field=field)


def check_names(message: Message, *names: str, field: str = "") -> None:
    """Raises BadRequest for a text of the message that is longer than a name.  field: of the message, with a dot."""
    for name in names:
        check_name(getattr(message, name), field=f"{field}{name}")


def check_name(text: str, *, field: str) -> None:
    """Raises BadRequest for one that is too long."""
    if len(text) > MAX_NAME:
        raise BadRequest(f"must be at most {MAX_NAME} characters, got {len(text)}", field=field)


def _are_numbers(values: Sequence[float], size: int) -> bool:
    return len(values) == size and all(map(math.isfinite, values))


def _few(values: Sequence[float]) -> str:
    return f"{list(values)}" if len(values) <= MAX_SHOWN else f"{len(values)} of them"
