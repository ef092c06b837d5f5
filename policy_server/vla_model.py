"""The VLA as the server's Model: its spec as a message, its errors as refusals."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.errors import BadRequest, CannotStart, Overloaded, Unavailable
from policy_server.model import share_a_pass
from policy_server.observation import Observed
from policy_server.preparer import Preparer
from policy_server.refusals import ASLEEP, RETRY_SOON_MS
from policy_server.version_store import Kind
from policy_server.vla.adapters import Adapter, Adapters
from policy_server.vla.asleep import Asleep
from policy_server.vla.checkpoint import CheckpointError, weights_fingerprint
from policy_server.vla.derived import beside_decoding, with_tensors
from policy_server.vla.graphs import PassGraphs, graph_pool
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput, PassShape
from policy_server.vla.policy import Policy
from policy_server.vla.preprocessing import RESIZE_FILTER, Prepared
from policy_server.vla.quantized import plain_parts
from policy_server.vla.scoring import score
from protos import policy_pb2
from protos.codec import encode_tensor

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 16 * 2**20
MAX_NAMES_BYTES = 2**20
GRAPH_PROMPT_TOKENS = 64
"""Longer prompts are decoded without captured passes."""
NO_ROOM = "the device has no room for the model: a smaller --max-batch, or --weights int8, takes less"
NO_ROOM_RETRY_MS = 5_000
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""OpenVLA's seven; an action of another length is numbered."""
STATE_UNITS = {"eef_x": "m", "eef_y": "m", "eef_z": "m", "eef_ax": "rad", "eef_ay": "rad", "eef_az": "rad"}
STATE_UNITS |= {"finger_left": "m", "finger_right": "m"}
DIMENSIONLESS = "1"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a version computes with: a model of its own, or an adapter of the base."""

    vla: VLA
    adapter: Adapter | None = None

    @property
    def layout(self) -> str:
        """What adapters of one pass must have in common; "" without one."""
        return self.adapter.layout.name if self.adapter is not None else ""

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All that lies on the device, some of it shared with other weights."""
        for tensor in (*self.vla.parameters(), *self.vla.buffers()):
            yield from plain_parts(tensor)
        if self.adapter is not None:
            yield self.adapter.flat


class VlaModel:
    """A loaded policy, the base of all weights.  `name` is what GetSpec calls it.

    adapter: of the weights it begins with.  warm_up() runs passes of 1 and of max_batch requests.
    Raises CheckpointError.
    """

    lanes = 1

    def __init__(self, policy: Policy, *, name: str, max_batch: int, adapter: Path | None = None):
        self._policy = policy
        self._max_batch = max_batch
        self._adapters = Adapters(policy.model)
        self._passing = threading.Lock()
        self._graphs: MutableMapping[VLA, PassGraphs] = weakref.WeakKeyDictionary()
        self._pool = graph_pool(policy.model.device)
        self._built = weakref.WeakSet[Weights]()
        self._asleep: Asleep | None = None
        self.first = Weights(vla=policy.model, adapter=adapter and self._adapters.load(adapter))
        self.spec = _spec(policy, name)
        self.prepare = Preparer(preprocessor=policy.preprocessor, camera=policy.config.camera)

    def together(self, weights: Sequence[Weights]) -> bool:
        return share_a_pass(weights)

    def decode(
        self, requests: Sequence[DecodeRequest], weights: Sequence[Weights], lane: int = 0
    ) -> list[DecodeAnswer]:
        inputs = [
            DecodeInput(
                prepared=request.prepared,
                temperature=request.temperature,
                noise_correlation=request.noise_correlation,
                seed=request.seed,
                decision=request.decision,
                adapter=own.adapter,
            )
            for request, own in zip(requests, weights, strict=True)
        ]
        vla = weights[0].vla
        with self._one_pass():
            decoded = self._policy.decode(inputs, model=vla, graphs=self._graphs.get(vla))
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

    def score(
        self, prepared: Sequence[Prepared], token_ids_BN: np.ndarray, temperature: float, weights: Weights
    ) -> np.ndarray:
        with self._one_pass():
            return score(weights.vla, prepared, token_ids_BN, temperature, adapter=weights.adapter)

    def fingerprint(self, weights: Weights) -> str:
        with beside_decoding(weights.vla.device):
            return weights.adapter.fingerprint if weights.adapter is not None else weights_fingerprint(weights.vla)

    @property
    def max_weights_bytes(self) -> int:
        """The whole model in float32, and some room for the names."""
        return 4 * sum(p.numel() for p in self._policy.model.parameters()) + MAX_NAMES_BYTES

    def build(self, folder: Path, kind: Kind) -> Weights:
        base = self._policy.model
        try:
            if kind == "lora":
                weights = Weights(vla=base, adapter=self._adapters.load(folder))
            else:
                weights = Weights(vla=with_tensors(base, folder))
            self._capture(weights)
        except CheckpointError as error:
            said = str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
            raise BadRequest(said, field="data") from error
        except torch.OutOfMemoryError as error:
            raise Overloaded("the device has no room for more weights", retry_after_ms=NO_ROOM_RETRY_MS) from error
        self._built.add(weights)
        return weights

    def warm_up(self) -> None:
        try:
            self._capture(self.first)
            request = self._example()
            for batch in (1, self._max_batch):
                self.decode([request] * batch, [self.first] * batch)
        except torch.OutOfMemoryError as error:
            raise CannotStart(NO_ROOM) from error

    def watch(self, gone: Callable[[], object]) -> None:
        """It is lost with this process only."""

    def sleep(self) -> int:
        with self._passing:
            if self._asleep is None:
                asleep = Asleep(tensor for weights in (self.first, *self._built) for tensor in weights.tensors)
                self._asleep = asleep
                self._lie_down(asleep)
            return self._asleep.bytes

    def wake(self) -> None:
        with self._passing:
            asleep = self._asleep
            if asleep is None:
                return
            try:
                asleep.get_up()
                for weights in (self.first, *self._built):
                    self._capture(weights)
                self._asleep = None
                return
            except Exception:  # CUDA says in many ways that there is no room
                log.exception("the weights cannot be woken")
            # Out there, what has failed no longer holds its part of the device.
            self._lie_down(asleep)
        raise Overloaded(
            "the device has no room for the weights, or cannot be used: the server's log says why",
            retry_after_ms=NO_ROOM_RETRY_MS,
        )

    def _lie_down(self, asleep: Asleep) -> None:
        self._graphs.clear()
        self._adapters.forget()
        asleep.lie_down()

    @contextmanager
    def _one_pass(self) -> Iterator[None]:
        """One at a time.  Raises Unavailable while there is nothing to compute with."""
        with self._passing:
            if self._asleep is not None:
                raise Unavailable(ASLEEP, retry_after_ms=RETRY_SOON_MS)
            yield

    def _capture(self, weights: Weights) -> None:
        """On CUDA, the passes with these weights."""
        vla = weights.vla
        if vla.device.type != "cuda":
            return
        if vla not in self._graphs:
            example = DecodeInput(prepared=self._example().prepared, temperature=1.0)
            deterministic = self._policy.shape is not None
            self._graphs[vla] = PassGraphs(vla, self._shapes(), example, pool=self._pool, row_by_row=deterministic)
        if weights.adapter is not None:
            self._graphs[vla].admit(weights.adapter)

    def _shapes(self) -> list[PassShape]:
        """Of the captured passes: powers of two, and the largest batch."""
        if self._policy.shape is not None:
            return [self._policy.shape]
        sizes = [size for size in (1 << n for n in range(16)) if size < self._max_batch]
        length = min(GRAPH_PROMPT_TOKENS, self._policy.max_prompt_tokens)
        return [PassShape(batch=size, prompt_length=length) for size in (*sizes, self._max_batch)]

    def _example(self) -> DecodeRequest:
        side = self._policy.config.sent_size
        observed = Observed(
            images={self._policy.config.camera: np.zeros((side, side, 3), np.uint8)},
            state_S=np.zeros(self._policy.config.state_dim, np.float32),
            instruction="warm up",
        )
        return DecodeRequest(prepared=self.prepare(observed), version=0, temperature=1.0, seed=0, decision=0)


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
