"""What a policy needs and promises (GetSpec), with its arrays decoded, and whether an arm fits it.

Shapes: A numbers an action, K actions an answer, N = K*A tokens, S state entries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from protos import image, policy_pb2
from protos.codec import CodecError, decode_tensor
from robot_client.arm import ArmSpec, Observation
from robot_client.errors import BadAnswer, SpecMismatch

TICK_RATE_TOLERANCE = 0.01
"""An arm's tick rate may differ from the policy's by this fraction."""


@dataclass(frozen=True, kw_only=True)
class ActionTokens:
    """How token ids become actions."""

    bins: int
    """Number of action tokens and of bin edges."""
    vocabulary: int
    """Action ids are [vocabulary - bins, vocabulary - 1]."""
    low_A: np.ndarray
    """float64, 1 % quantiles of the training data."""
    high_A: np.ndarray
    """float64, 99 % quantiles."""
    mask_A: np.ndarray
    """bool, True where the dimension is un-normalised."""

    def actions(self, token_ids_N: np.ndarray) -> np.ndarray:
        """float64 (K, A): the actions that the ids stand for, by the formula in policy.proto."""
        normalised = self._centres[np.clip(self.vocabulary - token_ids_N.astype(np.int64) - 1, 0, self.bins - 2)]
        normalised_KA = normalised.reshape(-1, len(self.low_A))
        scaled_KA = 0.5 * (normalised_KA + 1) * (self.high_A - self.low_A) + self.low_A
        return np.where(self.mask_A, scaled_KA, normalised_KA)

    @functools.cached_property
    def _centres(self) -> np.ndarray:
        edges = np.linspace(-1.0, 1.0, self.bins)
        return (edges[:-1] + edges[1:]) / 2


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """PolicySpec of policy.proto, as a client uses it."""

    message: policy_pb2.PolicySpec
    """As it came, with the fields that nobody here computes with."""
    action_names: tuple[str, ...]
    low_A: np.ndarray
    """float32, the least the policy can answer."""
    high_A: np.ndarray
    tokens: ActionTokens
    chunk_length: int
    """K"""
    tick_rate_hz: float
    """0 when the checkpoint does not say."""
    image_names: tuple[str, ...]
    state_names: tuple[str, ...]
    resize: bool = False
    """Frames are brought to the policy's size here, with its own filter, and not by the server."""

    @classmethod
    def of(cls, message: policy_pb2.PolicySpec, *, resize: bool = False) -> PolicySpec:
        """Raises BadAnswer when the message contradicts itself, or asks to resize as nobody here can."""
        width = len(message.action)
        tokens = message.action_tokens
        if width == 0 or message.chunk_length == 0:
            raise BadAnswer(f"action and chunk_length must not be empty, got {width} and {message.chunk_length}")
        if not 2 <= tokens.bins <= tokens.vocabulary:
            raise BadAnswer(
                f"bins must be in [2, vocabulary], got {tokens.bins} of {tokens.vocabulary}", field="action_tokens"
            )
        if resize and (unknown := {said.resize for said in message.images} - set(image.FILTERS)):
            raise BadAnswer(f"resize must be one of {list(image.FILTERS)}, got {sorted(unknown)}", field="images")
        try:
            low_A = decode_tensor(tokens.low, "action_tokens.low", dtype="float64", shape=(width,))
            high_A = decode_tensor(tokens.high, "action_tokens.high", dtype="float64", shape=(width,))
            mask_A = decode_tensor(tokens.mask, "action_tokens.mask", dtype="uint8", shape=(width,)).astype(bool)
        except CodecError as error:
            raise BadAnswer(str(error)) from error
        return cls(
            message=message,
            action_names=tuple(dimension.name for dimension in message.action),
            low_A=np.array([dimension.low for dimension in message.action], np.float32),
            high_A=np.array([dimension.high for dimension in message.action], np.float32),
            tokens=ActionTokens(
                bins=tokens.bins, vocabulary=tokens.vocabulary, low_A=low_A, high_A=high_A, mask_A=mask_A
            ),
            chunk_length=message.chunk_length,
            tick_rate_hz=message.tick_rate_hz,
            image_names=tuple(image.name for image in message.images),
            state_names=tuple(entry.name for entry in message.state),
            resize=resize,
        )

    def read_of(self, observation: Observation, arm: ArmSpec) -> Observation:
        """What the policy reads of an observation by an arm that fits it."""
        return replace(
            observation,
            images={said.name: self._sent(observation.images[said.name], said) for said in self.message.images},
            state_S=observation.state_S[[arm.state_names.index(name) for name in self.state_names]],
        )

    def _sent(self, pixels_HW3: np.ndarray, said: policy_pb2.ImageSpec) -> np.ndarray:
        if not self.resize:
            return pixels_HW3
        return image.resize(pixels_HW3, (said.height, said.width), said.resize)  # pyright: ignore[reportArgumentType]

    def require_fit(self, arm: ArmSpec) -> None:
        """Raises SpecMismatch, which names every difference, unless this policy can drive this arm.

        Actions must be the same, in the same order; the arm must have the images and the state entries that the policy
        reads (it may have more), and must tick at the policy's rate where that is known.
        """
        mismatches = []
        if self.action_names != arm.action_names:
            mismatches.append(
                f"actions: the policy answers {len(self.action_names)} {list(self.action_names)}, "
                f"{arm.name} expects {len(arm.action_names)} {list(arm.action_names)}"
            )
        for what, needed, available in (
            ("images", self.image_names, arm.image_names),
            ("state", self.state_names, arm.state_names),
        ):
            missing = [name for name in needed if name not in available]
            if missing:
                mismatches.append(f"{what}: the policy reads {missing}, {arm.name} offers {list(available)}")
        rate = self.tick_rate_hz
        if rate and abs(arm.tick_rate_hz - rate) > TICK_RATE_TOLERANCE * rate:
            mismatches.append(
                f"tick rate: the policy was trained at {rate:g} Hz, {arm.name} ticks at {arm.tick_rate_hz:g} Hz"
            )
        if len(arm.limits.low) != len(arm.action_names):
            mismatches.append(
                f"limits: {arm.name} bounds {len(arm.limits.low)} numbers of {len(arm.action_names)} in its actions"
            )
        if mismatches:
            raise SpecMismatch(mismatches)
