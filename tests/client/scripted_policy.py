"""A policy server that keeps the contract without a model, and misbehaves when told to.

Decision d of every episode answers with the action `action_of(d)` repeated over the chunk, up to the rounding of its
tokens.  `script[d]` is a list of things to do at the tries of decision d, one each; then it answers properly.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import grpc
import numpy as np

from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.codec import encode_tensor
from robot_client.arm import ACTION_NAMES, STATE_NAMES

BINS, VOCABULARY = 256, 1000
LOW_A = np.array([-1.0] * 6 + [0.0])
HIGH_A = np.array([1.0] * 6 + [1.0])
MASK_A = np.array([1] * 6 + [0], np.uint8)
LOST = "the reply was lost"
CENTRES = (np.linspace(-1, 1, BINS)[:-1] + np.linspace(-1, 1, BINS)[1:]) / 2


@dataclass(frozen=True)
class Refuse:
    code: grpc.StatusCode
    message: str = "refused"
    field: str = ""
    retry_after_ms: int = 0


@dataclass(frozen=True)
class Delay:
    """Answers properly, later."""

    seconds: float


@dataclass(frozen=True)
class LoseReply:
    """Computes and stores the answer, and fails before it arrives."""


@dataclass(frozen=True)
class Tamper:
    """Answers with a reply that has been changed."""

    change: Callable[[policy_pb2.ActReply], None]


@dataclass
class OpenEpisode:
    start: policy_pb2.StartEpisodeRequest
    answers: dict[int, policy_pb2.ActReply] = field(default_factory=dict)
    requests: list[policy_pb2.ActRequest] = field(default_factory=list)
    ticks: list[episode_pb2.Tick] = field(default_factory=list)
    end: policy_pb2.EndEpisodeRequest | None = None


def spec_of(*, chunk_length: int = 4, tick_rate_hz: float = 20.0) -> policy_pb2.PolicySpec:
    return policy_pb2.PolicySpec(
        model="scripted",
        action=[
            policy_pb2.Dimension(name=name, unit="1", low=low if mask else -1, high=high if mask else 1)
            for name, low, high, mask in zip(ACTION_NAMES, LOW_A, HIGH_A, MASK_A, strict=True)
        ],
        action_tokens=policy_pb2.ActionTokens(
            bins=BINS,
            vocabulary=VOCABULARY,
            low=encode_tensor(LOW_A),
            high=encode_tensor(HIGH_A),
            mask=encode_tensor(MASK_A),
        ),
        chunk_length=chunk_length,
        tick_rate_hz=tick_rate_hz,
        images=[policy_pb2.ImageSpec(name="agentview", height=16, width=16, resize="lanczos3")],
        state=[policy_pb2.Dimension(name=name) for name in STATE_NAMES[:3]],
        max_instruction_tokens=100,
        max_image_bytes=2**20,
        live_version=1,
        versions=[1],
    )


def tokens_of(action_A: np.ndarray) -> np.ndarray:
    """The ids whose actions lie nearest."""
    normalised_A = np.where(MASK_A, 2 * (action_A - LOW_A) / (HIGH_A - LOW_A) - 1, action_A)
    return VOCABULARY - 1 - np.abs(CENTRES[None] - normalised_A[:, None]).argmin(axis=1)


def action_of_tokens(ids_A: np.ndarray) -> np.ndarray:
    normalised_A = CENTRES[VOCABULARY - 1 - ids_A]
    return np.where(MASK_A, 0.5 * (normalised_A + 1) * (HIGH_A - LOW_A) + LOW_A, normalised_A)


def small_move(decision: int) -> np.ndarray:
    return np.array([0.1 * (decision % 5), 0, 0, 0, 0, 0, 1.0])


class ScriptedPolicy(policy_pb2_grpc.PolicyServicer):
    def __init__(self, spec: policy_pb2.PolicySpec | None = None):
        self.spec = spec or spec_of()
        self.action_of = small_move
        self.script: dict[int, list] = defaultdict(list)
        self.end_script: list = []
        self.start_script: list = []
        self.delay_s = 0.0
        self.episodes: dict[str, OpenEpisode] = {}
        self.in_flight = 0
        self.most_in_flight = 0
        self._by_request: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def only_episode(self) -> OpenEpisode:
        (episode,) = self.episodes.values()
        return episode

    def GetSpec(self, request, context):
        return self.spec

    def StartEpisode(self, request, context):
        with self._lock:
            if request.request_id not in self._by_request:
                self._by_request[request.request_id] = f"episode-{len(self.episodes)}"
                self.episodes[self._by_request[request.request_id]] = OpenEpisode(request)
            episode_id = self._by_request[request.request_id]
        if self.start_script:
            refuse(context, self.start_script.pop(0))
        return policy_pb2.StartEpisodeReply(
            episode_id=episode_id, version=1, seed=request.seed if request.HasField("seed") else 4711
        )

    def Act(self, request, context):
        reply = self._act(request)
        if reply.HasField("refusal"):
            refuse(context, reply.refusal)
        return reply

    def ActStream(self, requests, context):
        replies: SimpleQueue[policy_pb2.ActReply | Exception | None] = SimpleQueue()
        workers = ThreadPoolExecutor(8)

        def answer(request):
            reply = self._act(request)
            if reply.refusal.message == LOST:
                context.cancel()
            replies.put(reply)

        def read():
            try:
                for request in requests:
                    workers.submit(answer, request)
            except Exception:  # the client has gone
                pass
            workers.shutdown()
            replies.put(None)

        threading.Thread(target=read, daemon=True).start()
        yield from iter(replies.get, None)

    def EndEpisode(self, request, context):
        if self.end_script:
            refuse(context, self.end_script.pop(0))
        episode = self.episodes.get(request.episode_id)
        if episode is None:
            refuse(context, Refuse(grpc.StatusCode.FAILED_PRECONDITION, "unknown episode", "episode_id"))
        elif episode.end is None:
            episode.end = request
            episode.ticks.extend(request.executed)
        return policy_pb2.EndEpisodeReply()

    def _act(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self._scripted(request)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _scripted(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply:
        reply = policy_pb2.ActReply(
            episode_id=request.episode_id,
            decision=request.decision,
            capture_time_ns=request.observation.capture_time_ns,
        )
        episode = self.episodes.get(request.episode_id)
        if episode is None:
            reply.refusal.CopyFrom(
                refusal_of(Refuse(grpc.StatusCode.FAILED_PRECONDITION, "unknown episode", "episode_id"))
            )
            return reply
        episode.requests.append(request)
        if request.decision in episode.answers:
            return episode.answers[request.decision]
        todo = self.script[request.decision].pop(0) if self.script[request.decision] else None
        time.sleep(todo.seconds if isinstance(todo, Delay) else self.delay_s)
        if isinstance(todo, Refuse):
            reply.refusal.CopyFrom(refusal_of(todo))
            return reply
        reply.chunk.CopyFrom(self._chunk(request.decision))
        with self._lock:
            if request.decision not in episode.answers:
                episode.ticks.extend(request.executed)
                episode.answers[request.decision] = reply
        if isinstance(todo, LoseReply):
            lost = policy_pb2.ActReply(episode_id=request.episode_id, decision=request.decision)
            lost.refusal.CopyFrom(refusal_of(Refuse(grpc.StatusCode.UNAVAILABLE, LOST)))
            return lost
        if isinstance(todo, Tamper):
            changed = policy_pb2.ActReply()
            changed.CopyFrom(reply)
            todo.change(changed)
            return changed
        return reply

    def _chunk(self, decision: int) -> episode_pb2.Chunk:
        ids_A, K = tokens_of(self.action_of(decision)), self.spec.chunk_length
        actions_KA = np.tile(action_of_tokens(ids_A), (K, 1)).astype(np.float32)
        ids_N = np.tile(ids_A, K).astype(np.int32)
        return episode_pb2.Chunk(
            actions=encode_tensor(actions_KA),
            token_ids=encode_tensor(ids_N),
            token_logprobs=encode_tensor(np.full(len(ids_N), -0.5, np.float32)),
            version=1,
        )


def refusal_of(refuse: Refuse) -> policy_pb2.Refusal:
    return policy_pb2.Refusal(
        code=refuse.code.value[0], message=refuse.message, field=refuse.field, retry_after_ms=refuse.retry_after_ms
    )


def refuse(context: grpc.ServicerContext, why: Refuse | policy_pb2.Refusal) -> None:
    refusal = refusal_of(why) if isinstance(why, Refuse) else why
    context.set_trailing_metadata((("vla-rl-refusal-bin", refusal.SerializeToString()),))
    code = next(code for code in grpc.StatusCode if code.value[0] == refusal.code)
    context.abort(code, refusal.message)


class Running:
    """The policy behind a real socket, which can be taken away and given back."""

    def __init__(self, policy: ScriptedPolicy):
        self.policy = policy
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        policy_pb2_grpc.add_PolicyServicer_to_server(self.policy, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()


def actions_of(ticks: Sequence[episode_pb2.Tick]) -> np.ndarray:
    return np.array([tick.action for tick in ticks], np.float32)
