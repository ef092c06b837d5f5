"""A policy server on a real socket without a model: its answers are a function of (seed, decision) alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np

from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.codec import encode_tensor
from robot_client.arm import ACTION_NAMES, STATE_NAMES

BINS, VOCABULARY, CHUNK_LENGTH, SIZE_PX = 256, 1000, 8, 32
LOW = np.array([-1.0] * 6 + [0.0])
HIGH = np.ones(7)


class ScriptedPolicy(policy_pb2_grpc.PolicyServicer):
    """Wanders about by chance; keeps how every episode began and ended.  An answer takes thinking_s."""

    def __init__(self, thinking_s: float = 0.0) -> None:
        self._thinking_s = thinking_s
        self.started: dict[str, policy_pb2.StartEpisodeRequest] = {}
        self.ended: dict[str, policy_pb2.EndEpisodeRequest] = {}
        self.in_flight = self.most_in_flight = 0
        self._ids = itertools.count()
        self._lock = threading.Lock()

    def GetSpec(self, request, context):
        return policy_pb2.PolicySpec(
            model="scripted",
            base_fingerprint="5c" * 32,
            action=[
                policy_pb2.Dimension(name=name, unit="1", low=low, high=high)
                for name, low, high in zip(ACTION_NAMES, LOW, HIGH, strict=True)
            ],
            action_tokens=policy_pb2.ActionTokens(
                bins=BINS,
                vocabulary=VOCABULARY,
                low=encode_tensor(LOW),
                high=encode_tensor(HIGH),
                mask=encode_tensor(np.ones(7, np.uint8)),
            ),
            chunk_length=CHUNK_LENGTH,
            tick_rate_hz=20.0,
            images=[policy_pb2.ImageSpec(name="agentview", height=SIZE_PX, width=SIZE_PX, resize="lanczos3")],
            state=[policy_pb2.Dimension(name=name, unit="1") for name in STATE_NAMES],
            live_version=4,
            versions=[4],
            image_path="libero",
            unnorm_key="scripted",
        )

    def StartEpisode(self, request, context):
        with self._lock:
            episode_id = f"episode-{next(self._ids)}"
            self.started[episode_id] = request
        return policy_pb2.StartEpisodeReply(episode_id=episode_id, version=request.version, seed=request.seed)

    def Act(self, request, context):
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            time.sleep(self._thinking_s)
            return self._answer(request)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _answer(self, request) -> policy_pb2.ActReply:
        start = self.started[request.episode_id]
        dice = np.random.default_rng([start.seed, request.decision])
        ids_N = VOCABULARY - 1 - dice.integers(0, BINS - 1, CHUNK_LENGTH * 7)
        edges = np.linspace(-1.0, 1.0, BINS)
        centres_N = ((edges[:-1] + edges[1:]) / 2)[VOCABULARY - 1 - ids_N]
        actions_KA = 0.5 * (centres_N.reshape(CHUNK_LENGTH, 7) + 1) * (HIGH - LOW) + LOW
        return policy_pb2.ActReply(
            episode_id=request.episode_id,
            decision=request.decision,
            capture_time_ns=request.observation.capture_time_ns,
            chunk=episode_pb2.Chunk(
                actions=encode_tensor(actions_KA.astype(np.float32)),
                token_ids=encode_tensor(ids_N.astype(np.int32)),
                token_logprobs=encode_tensor(np.full(len(ids_N), -1.0, np.float32)),
                version=start.version,
                temperature=start.temperature,
            ),
        )

    def EndEpisode(self, request, context):
        self.ended.setdefault(request.episode_id, request)
        return policy_pb2.EndEpisodeReply()


@contextmanager
def served(policy: ScriptedPolicy) -> Iterator[str]:
    """The policy's address, HOST:PORT."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    policy_pb2_grpc.add_PolicyServicer_to_server(policy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)
