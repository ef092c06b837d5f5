"""The VLA as the server's Model: its spec as a message, its errors as refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.errors import BadRequest
from policy_server.observation import Observed
from policy_server.version_store import Kind
from policy_server.vla.checkpoint import CheckpointError, weights_fingerprint
from policy_server.vla.decoding import DecodeInput
from policy_server.vla.derived import beside_decoding, with_adapter, with_tensors
from policy_server.vla.policy import Policy
from policy_server.vla.preprocessing import RESIZE_FILTER, BadInput, Prepared
from protos import policy_pb2
from protos.codec import encode_tensor

MAX_IMAGE_BYTES = 16 * 2**20
MAX_NAMES_BYTES = 2**20
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""OpenVLA's seven; an action of another length is numbered."""
STATE_UNITS = {"eef_x": "m", "eef_y": "m", "eef_z": "m", "eef_ax": "rad", "eef_ay": "rad", "eef_az": "rad"}
STATE_UNITS |= {"finger_left": "m", "finger_right": "m"}
DIMENSIONLESS = "1"


class VlaModel:
    """A loaded policy.  `name` is what GetSpec calls it; warm_up() runs passes of 1 and of max_batch requests.

    base: what published weights are over, where that is not the policy itself.
    """

    def __init__(self, policy: Policy, *, name: str, max_batch: int, base: Policy | None = None):
        self._policy = policy
        self._base = base or policy
        self._name = name
        self._max_batch = max_batch
        self.spec = _spec(policy, name)

    def prepare(self, observed: Observed) -> Prepared:
        """Raises BadRequest."""
        pixels_HW3 = observed.images[self._policy.config.camera]
        try:
            return self._policy.prepare(pixels_HW3, observed.instruction, observed.state_S)
        except BadInput as error:
            field = f"images[{self._policy.config.camera}]" if error.field == "image" else error.field
            message = str(error).removeprefix(f"{error.field}: ")
            raise BadRequest(message, field=f"observation.{field}") from error

    def decode(self, requests: list[DecodeRequest]) -> list[DecodeAnswer]:
        decoded = self._policy.decode(
            [
                DecodeInput(
                    prepared=request.prepared,
                    temperature=request.temperature,
                    noise_correlation=request.noise_correlation,
                    seed=request.seed,
                    decision=request.decision,
                )
                for request in requests
            ]
        )
        actions_BKA = self._policy.actions(decoded.token_ids_BN)
        return [
            DecodeAnswer(
                actions_KA=actions_KA,
                token_ids_N=token_ids_N,
                token_logprobs_N=token_logprobs_N,
                vision_ms=1e3 * decoded.vision_s,
                prefill_ms=1e3 * decoded.prefill_s,
                decode_ms=1e3 * decoded.decode_s,
            )
            for actions_KA, token_ids_N, token_logprobs_N in zip(
                actions_BKA, decoded.token_ids_BN, decoded.token_logprobs_BN, strict=True
            )
        ]

    def score(self, prepared: list[Prepared], token_ids_BN: np.ndarray, temperature: float) -> np.ndarray:
        return self._policy.score(prepared, token_ids_BN, temperature)

    @property
    def device_fingerprint(self) -> str:
        with beside_decoding(self._policy.model.device):
            return weights_fingerprint(self._policy.model)

    @property
    def max_weights_bytes(self) -> int:
        """The whole model in float32, and some room for the names."""
        return 4 * sum(p.numel() for p in self._policy.model.parameters()) + MAX_NAMES_BYTES

    def derive(self, folder: Path, kind: Kind) -> VlaModel:
        make = with_adapter if kind == "lora" else with_tensors
        try:
            model = make(self._base.model, folder)
        except CheckpointError as error:
            raise BadRequest(str(error).removeprefix(f"{folder}: "), field="data") from error
        with beside_decoding(model.device):
            policy = self._base.with_model(model)
        return VlaModel(policy, name=self._name, max_batch=self._max_batch, base=self._base)

    def warm_up(self) -> None:
        side = self._policy.config.sent_size
        observed = Observed(
            images={self._policy.config.camera: np.zeros((side, side, 3), np.uint8)},
            state_S=np.zeros(self._policy.config.state_dim, np.float32),
            instruction="warm up",
        )
        request = DecodeRequest(prepared=self.prepare(observed), version=0, temperature=1.0, seed=0, decision=0)
        for batch in (1, self._max_batch):
            self.decode([request] * batch)


def _spec(policy: Policy, name: str) -> policy_pb2.PolicySpec:
    config, tokens = policy.config, policy.action_tokens
    side = config.sent_size
    return policy_pb2.PolicySpec(
        model=name,
        base_fingerprint=policy.fingerprint,
        action=_action_dimensions(policy),
        action_tokens=policy_pb2.ActionTokens(
            bins=config.n_action_bins,
            vocabulary=config.vocabulary,
            low=encode_tensor(tokens.low_A),
            high=encode_tensor(tokens.high_A),
            mask=encode_tensor(tokens.mask_A.astype(np.uint8)),
        ),
        chunk_length=config.chunk_length,
        tick_rate_hz=config.tick_rate_hz,
        images=[
            policy_pb2.ImageSpec(name=config.camera, height=side, width=side, resize=RESIZE_FILTER[config.image_path])
        ],
        state=[
            policy_pb2.Dimension(name=entry, unit=STATE_UNITS.get(entry, DIMENSIONLESS))
            for entry in config.state_names or [f"state_{s}" for s in range(config.state_dim)]
        ],
        max_instruction_tokens=policy.max_prompt_tokens,
        max_image_bytes=MAX_IMAGE_BYTES,
        image_path=config.image_path,
        unnorm_key=policy.unnorm_key,
    )


def _action_dimensions(policy: Policy) -> list[policy_pb2.Dimension]:
    """Names and reach of each number; no checkpoint states units, so actions count in those of the training data."""
    config = policy.config
    width = config.action_dim
    names = ACTION_NAMES if width == len(ACTION_NAMES) else [f"action_{a}" for a in range(width)]
    extremes = np.array([[config.action_begin], [config.vocabulary - 1]]).repeat(config.action_tokens, axis=1)
    reach_2A = policy.actions(extremes)[:, 0]
    return [
        policy_pb2.Dimension(name=name, unit=DIMENSIONLESS, low=low, high=high)
        for name, low, high in zip(names, reach_2A.min(axis=0), reach_2A.max(axis=0), strict=True)
    ]
