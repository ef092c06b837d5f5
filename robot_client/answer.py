"""A policy's answer to one observation, checked before anyone acts on it.

Shapes: K actions of A numbers, N = K*A tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from protos import policy_pb2
from protos.codec import CodecError, decode_tensor
from protos.episode_pb2 import Timing
from robot_client.errors import BadAnswer
from robot_client.spec import PolicySpec

TOLERANCE = 1e-5
"""How far an action may lie from the one its tokens stand for (float32 against float64, units of the action)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """K actions and where they come from."""

    decision: int
    capture_time_ns: int
    """Of the observation that was answered, on the robot's own clock."""
    actions_KA: np.ndarray
    """float32 (K, A)"""
    token_ids_N: np.ndarray
    """int32 (N,)"""
    token_logprobs_N: np.ndarray
    """float32 (N,)"""
    version: int
    temperature: float
    timing: Timing
    arrived_s: float
    """On time.monotonic()."""

    @classmethod
    def of(cls, reply: policy_pb2.ActReply, spec: PolicySpec) -> Answer:
        """Raises BadAnswer unless the chunk has the promised shape and its actions are what its tokens stand for."""
        chunk, K, A = reply.chunk, spec.chunk_length, len(spec.action_names)
        try:
            actions_KA = decode_tensor(chunk.actions, "chunk.actions", dtype="float32", shape=(K, A))
            ids_N = decode_tensor(chunk.token_ids, "chunk.token_ids", dtype="int32", shape=(K * A,))
            logprobs_N = decode_tensor(chunk.token_logprobs, "chunk.token_logprobs", dtype="float32", shape=(K * A,))
        except CodecError as error:
            raise BadAnswer(str(error)) from error
        first, last = spec.tokens.vocabulary - spec.tokens.bins, spec.tokens.vocabulary - 1
        if ids_N.min() < first or ids_N.max() > last:
            raise BadAnswer(
                f"ids must be in [{first}, {last}], got [{ids_N.min()}, {ids_N.max()}]", field="chunk.token_ids"
            )
        expected_KA = spec.tokens.actions(ids_N)
        right_KA = np.abs(actions_KA - expected_KA) <= TOLERANCE * (1 + np.abs(expected_KA))  # never so for NaN
        if not right_KA.all():
            wrong = np.argwhere(~right_KA)
            k, a = wrong[0]
            raise BadAnswer(
                f"{len(wrong)} of {K * A} actions are not what their tokens stand for; the first is {k} "
                f"{spec.action_names[a]}: got {actions_KA[k, a]:g}, its token gives {expected_KA[k, a]:g}",
                field="chunk.actions",
            )
        return cls(
            decision=reply.decision,
            capture_time_ns=reply.capture_time_ns,
            actions_KA=actions_KA,
            token_ids_N=ids_N,
            token_logprobs_N=logprobs_N,
            version=chunk.version,
            temperature=chunk.temperature,
            timing=chunk.timing,
            arrived_s=time.monotonic(),
        )
