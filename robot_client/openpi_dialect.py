"""What the observations and answers of one openpi server are like, which its protocol does not say.

A server of ours says it in its metadata (policy_server/openpi.py).  Any other is taken to have one of openpi's policies
for LIBERO: two cameras, eight numbers of state, seven of an action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict, ParseError

from protos import policy_pb2
from protos.openpi_codec import LIBERO_KEYS, gripper_opening
from robot_client.arm import ACTION_NAMES, STATE_NAMES, Observation
from robot_client.errors import BadAnswer
from robot_client.spec import ActionTokens, PolicySpec

LIBERO_PX = 256
"""Side of the frames that openpi's LIBERO policies were trained on; their servers resize what they get."""
STATED = ("model", "base_fingerprint", "action", "chunk_length", "tick_rate_hz", "images", "state")
STATED += ("max_instruction_tokens", "max_image_bytes", "image_path", "unnorm_key")
"""What of PolicySpec holds through this door as well."""
NO_TOKENS = ActionTokens(bins=0, vocabulary=0, low_A=np.empty(0), high_A=np.empty(0), mask_A=np.empty(0, bool))


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """From our words to one server's and back."""

    spec: PolicySpec
    """chunk_length is 0 while nobody knows it."""
    keys: Mapping[str, str]
    """Camera, state or prompt -> its key in an observation, for all that the policy reads."""
    gripper: int | None
    """Which number of an action is a gripper that LIBERO's -1 opens and 1 closes."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any], given: Mapping[str, str]) -> Dialect:
        """given: what the user says, which has the last word: keys, and "gripper".  Raises BadAnswer."""
        stated = {name.removeprefix("keys/"): key for name, key in metadata.items() if name.startswith("keys/")}
        keys = {what: key for what, key in {**(stated or LIBERO_KEYS), **given}.items() if key and what != "gripper"}
        message = _stated(metadata) if stated else _libero(keys)
        names = [dimension.name for dimension in message.action]
        is_libero = given.get("gripper", metadata.get("gripper", "libero")) == "libero"
        gripper = names.index("gripper") if is_libero and "gripper" in names else None
        if gripper is not None:
            message.action[gripper].low, message.action[gripper].high = 0, 1
        spec = _spec(message)
        reads = [*spec.image_names, *["state"] * bool(spec.state_names), "prompt"]
        if missing := sorted({*reads} - {*keys}):
            raise BadAnswer(f"must say where an observation has {missing}, got keys for {sorted(keys)}", field="keys")
        return cls(spec=spec, keys={what: keys[what] for what in reads}, gripper=gripper)

    def agrees_with(self, other: Dialect) -> bool:
        """Whether both servers state the same; how long a chunk is, some do not."""
        return (self.spec.message, self.keys, self.gripper) == (other.spec.message, other.keys, other.gripper)

    def observation(self, seen: Observation) -> dict[str, Any]:
        """What travels."""
        values = {**seen.images, "state": seen.state_S.astype(np.float32), "prompt": seen.instruction}
        return {key: values[what] for what, key in self.keys.items()}

    def black(self) -> dict[str, Any]:
        """An observation of nothing, to see what an answer is like."""
        images = {said.name: np.zeros((said.height, said.width, 3), np.uint8) for said in self.spec.message.images}
        state_S = np.zeros(len(self.spec.state_names), np.float32)
        return self.observation(Observation(images=images, state_S=state_S, instruction="wait"))

    def with_chunks_like(self, answer: Mapping[str, Any]) -> Dialect:
        """The same server, now that it has answered.  Raises BadAnswer."""
        return replace(self, spec=replace(self.spec, chunk_length=len(self.actions(answer))))

    def actions(self, answer: Mapping[str, Any]) -> np.ndarray:
        """float32 (K, A), in our words.  Raises BadAnswer unless they are finite and as many as they should be."""
        said_KA, K, A = answer.get("actions"), self.spec.chunk_length, len(self.spec.action_names)
        if not isinstance(said_KA, np.ndarray) or said_KA.dtype.kind not in "fiu":
            raise BadAnswer(f"must be an array of numbers, got {type(said_KA).__name__}", field="actions")
        if said_KA.shape != (K or max(1, said_KA.size // A), A):
            raise BadAnswer(f"shape must be ({K or 'any'}, {A}), got {said_KA.shape}", field="actions")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused for it
            actions_KA = said_KA.astype(np.float32)
        if not np.isfinite(actions_KA).all():
            first = int(np.argmin(np.isfinite(actions_KA).all(axis=1)))
            raise BadAnswer(f"must be finite, got {actions_KA[first].tolist()} for tick {first}", field="actions")
        if self.gripper is not None:
            actions_KA[:, self.gripper] = gripper_opening(actions_KA[:, self.gripper])
        return actions_KA


def _stated(metadata: Mapping[str, Any]) -> policy_pb2.PolicySpec:
    try:
        message = ParseDict({name: metadata[name] for name in STATED if name in metadata}, policy_pb2.PolicySpec())
    except ParseError as error:
        raise BadAnswer(f"must be as GetSpec tells, got something else: {error}", field="metadata") from error
    if not message.action or not message.chunk_length:
        raise BadAnswer("action and chunk_length must not be empty", field="metadata")
    message.versions.append(0)
    return message


def _libero(keys: Mapping[str, str]) -> policy_pb2.PolicySpec:
    """What the keys leave of one of openpi's policies for LIBERO; what it can answer has no known bounds."""
    return policy_pb2.PolicySpec(
        model="openpi",
        action=[policy_pb2.Dimension(name=name, unit="1", low=-np.inf, high=np.inf) for name in ACTION_NAMES],
        images=[
            policy_pb2.ImageSpec(name=what, height=LIBERO_PX, width=LIBERO_PX)
            for what in keys
            if what not in ("state", "prompt")
        ],
        state=[policy_pb2.Dimension(name=name) for name in STATE_NAMES if "state" in keys],
        versions=[0],
    )


def _spec(message: policy_pb2.PolicySpec) -> PolicySpec:
    return PolicySpec(
        message=message,
        action_names=tuple(dimension.name for dimension in message.action),
        low_A=np.array([dimension.low for dimension in message.action], np.float32),
        high_A=np.array([dimension.high for dimension in message.action], np.float32),
        tokens=NO_TOKENS,
        chunk_length=message.chunk_length,
        tick_rate_hz=message.tick_rate_hz,
        image_names=tuple(image.name for image in message.images),
        state_names=tuple(entry.name for entry in message.state),
    )
