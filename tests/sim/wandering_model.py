"""A model without weights for the real server: it wanders, by dice thrown from (seed, decision)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from policy_server.batcher import DecodeAnswer, DecodeRequest
from tests.client.scripted_policy import BINS, VOCABULARY, action_of_tokens, spec_of

CHUNK_LENGTH, ACTION_DIM = 8, 7


class WanderingModel:
    """`on_decode` is told before each pass how many answers have been given."""

    first, lanes = None, 1

    def __init__(self, on_decode: Callable[[int], None] = lambda answers: None):
        self.spec = spec_of(chunk_length=CHUNK_LENGTH)
        self.answers = 0
        self.largest_batch = 0
        self._on_decode = on_decode

    def prepare(self, observed):
        return None

    def watch(self, gone) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def decode(self, requests: list[DecodeRequest], weights: list[None], lane: int) -> list[DecodeAnswer]:
        self._on_decode(self.answers)
        self.answers += len(requests)
        self.largest_batch = max(self.largest_batch, len(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request: DecodeRequest) -> DecodeAnswer:
        dice = np.random.default_rng([request.seed, request.decision])
        ids_KA = VOCABULARY - 1 - dice.integers(0, BINS - 1, (CHUNK_LENGTH, ACTION_DIM))
        return DecodeAnswer(
            actions_KA=np.stack([action_of_tokens(ids_A) for ids_A in ids_KA]).astype(np.float32),
            token_ids_N=ids_KA.reshape(-1).astype(np.int32),
            token_logprobs_N=np.full(ids_KA.size, -1.0, np.float32),
            vision_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )
