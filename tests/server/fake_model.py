"""A policy without a network inside: answers are a function of the request, batches are remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.errors import BadRequest, Overloaded
from policy_server.observation import Observed
from protos import policy_pb2
from protos.codec import encode_tensor

ACTIONS, CHUNK, SIDE_PX, MAX_WORDS = 2, 3, 8, 6


class FakeModel:
    """Each action is (mean pixel, decision).  The gate, when closed, holds decode(); with no_room it does not wake.

    An instruction with "explode" makes decode() raise, one with "stumble" makes prepare() raise.
    """

    def __init__(self, *, pass_s: float = 0.0, warm_s: float = 0.0):
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[DecodeRequest]] = []
        self._pass_s = pass_s
        self._warm_s = warm_s

    first, lanes = None, 1
    asleep = no_room = False

    @property
    def spec(self) -> policy_pb2.PolicySpec:
        return policy_pb2.PolicySpec(
            model="fake",
            base_fingerprint="f" * 64,
            action=[policy_pb2.Dimension(name=name, unit="m", low=-1, high=1) for name in ("x", "y")],
            action_tokens=policy_pb2.ActionTokens(
                bins=256,
                vocabulary=1000,
                low=encode_tensor(-np.ones(ACTIONS)),
                high=encode_tensor(np.ones(ACTIONS)),
                mask=encode_tensor(np.ones(ACTIONS, np.uint8)),
            ),
            chunk_length=CHUNK,
            tick_rate_hz=20,
            images=[policy_pb2.ImageSpec(name="agentview", height=SIDE_PX, width=SIDE_PX, resize="lanczos3")],
            state=[policy_pb2.Dimension(name=name, unit="m") for name in ("px", "py", "pz")],
            max_instruction_tokens=MAX_WORDS,
            max_image_bytes=2**20,
            image_path="plain",
            unnorm_key="fake",
        )

    def prepare(self, observed: Observed) -> tuple[float, str]:
        words = observed.instruction.split()
        if len(words) > MAX_WORDS:
            raise BadRequest(f"must be at most {MAX_WORDS} tokens, got {len(words)}", field="observation.instruction")
        if "stumble" in words:
            raise RuntimeError("the fake model stumbled")
        return float(observed.images["agentview"].mean()), observed.instruction

    def decode(self, requests: list[DecodeRequest], weights: list[None], lane: int) -> list[DecodeAnswer]:
        self.batches.append(list(requests))
        self.gate.wait()
        time.sleep(self._pass_s)
        if any("explode" in request.prepared[1] for request in requests):
            raise RuntimeError("the fake model exploded")
        return [_answer(request) for request in requests]

    def warm_up(self) -> None:
        time.sleep(self._warm_s)

    def watch(self, gone: Callable[[], object]) -> None:
        pass

    def sleep(self) -> int:
        self.asleep = True
        return 0

    def wake(self) -> None:
        if self.no_room:
            raise Overloaded("the device has no room for the weights", retry_after_ms=1)
        self.asleep = False


def _answer(request: DecodeRequest) -> DecodeAnswer:
    size = CHUNK * ACTIONS
    return DecodeAnswer(
        actions_KA=np.tile(np.float32([request.prepared[0], request.decision]), (CHUNK, 1)),
        token_ids_N=np.arange(size, dtype=np.int32) + np.int32(request.seed % 100),
        token_logprobs_N=np.full(size, -0.5, np.float32),
        vision_ms=1.0,
        prefill_ms=2.0,
        decode_ms=3.0,
    )
