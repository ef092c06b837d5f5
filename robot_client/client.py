"""PolicyClient: the policy server as seen from a robot.  A deadline on every call, a typed error for every failure."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from protos import episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import Credentials, dial
from protos.codec import ImageFormat
from robot_client.act_stream import ActStream, Key
from robot_client.answer import Answer
from robot_client.arm import ArmSpec, Observation, Outcome
from robot_client.backoff import persist
from robot_client.errors import BadAnswer, DeadlineExceeded, PolicyError, ServerLost, looked_into, of_refusal, of_rpc
from robot_client.rollout import Rollout
from robot_client.spec import PolicySpec
from robot_client.wire import deciding, encode_observation, encode_request

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An episode that the server has opened."""

    episode_id: str
    version: int
    seed: int


class Client(Protocol):
    """What an episode asks of a policy server, whatever that speaks.  Every method may raise a PolicyError."""

    image_format: ImageFormat
    deadline_s: float
    give_up_after_s: float

    def spec(self) -> PolicySpec: ...

    def start_episode(self, rollout: Rollout, arm: ArmSpec) -> Opened: ...

    def ask(
        self,
        episode_id: str,
        decision: int,
        observation: Observation,
        executed: Sequence[episode_pb2.Tick] = (),
        *,
        deadline_s: float | None = None,
    ) -> Future[Answer]: ...

    def end_episode(
        self,
        episode_id: str,
        outcome: Outcome,
        *,
        terminal: bool = False,
        executed: Sequence[episode_pb2.Tick] = (),
        final_observation: Observation | None = None,
        message: str = "",
        give_up_after_s: float | None = None,
    ) -> None: ...

    def close(self) -> None: ...


class PolicyClient:
    """A policy server at HOST:PORT.

    credentials: what it is shown, and whether calls are encrypted.  Raises ValueError where they are of no use.
    image_format: how frames travel; "raw" and "png" keep every pixel, "jpeg" takes a tenth of the bytes.
    resize: the policy's size is all that travels.  A server that stores frames as JPEG before its own resize, as the
        policies fine-tuned on LIBERO expect, then does so after it: the two differ by a few levels.
    stream: asks over one ActStream instead of a call for each decision.
    deadline_s: for one try of any call.
    give_up_after_s: how long a lost or overloaded server is tried again before its error is raised.

    Safe to share between threads.  Every method may raise a PolicyError.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        image_format: ImageFormat = "raw",
        resize: bool = False,
        stream: bool = False,
        deadline_s: float = 10.0,
        give_up_after_s: float = 60.0,
    ):
        self.address = address
        self.image_format: ImageFormat = image_format
        self.resize = resize
        self.deadline_s = deadline_s
        self.give_up_after_s = give_up_after_s
        self._credentials = credentials
        self._channel = dial(address, credentials)
        self._stub = policy_pb2_grpc.PolicyStub(self._channel)
        self._act, act_stream = deciding(self._channel)
        self._stream = ActStream(act_stream, address) if stream else None
        self._spec: PolicySpec | None = None

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._channel.close()

    def spec(self) -> PolicySpec:
        """What the server says about its policy now; answers are checked against the latest one."""
        self._spec = PolicySpec.of(self._persist(self._stub.GetSpec, policy_pb2.GetSpecRequest()), resize=self.resize)
        return self._spec

    def start_episode(self, rollout: Rollout, arm: ArmSpec) -> Opened:
        """Opens an episode.  A retry after a lost reply opens no second one."""
        reply = self._persist(
            self._stub.StartEpisode,
            policy_pb2.StartEpisodeRequest(
                task=rollout.task.name,
                initial_state=rollout.task.initial_state,
                purpose=f"PURPOSE_{rollout.purpose.upper()}",
                version=rollout.version,
                follow_live=rollout.follow_live,
                temperature=rollout.temperature,
                noise_correlation=rollout.noise_correlation,
                seed=rollout.seed,
                arm=arm.name,
                asset_tree=arm.asset_tree,
                tick_rate_hz=arm.tick_rate_hz,
                request_id=uuid.uuid4().hex,
                lease_id=rollout.lease_id,
                session_id=rollout.session_id,
            ),
        )
        return Opened(episode_id=reply.episode_id, version=reply.version, seed=reply.seed)

    def act(
        self, episode_id: str, decision: int, observation: Observation, executed: Sequence[episode_pb2.Tick] = ()
    ) -> Answer:
        """One decision, waited for."""
        pending = self.ask(episode_id, decision, observation, executed)
        try:
            return pending.result(self.deadline_s)
        except FutureTimeoutError:
            pending.cancel()
            raise DeadlineExceeded(f"{self.address}: no answer in {self.deadline_s:g} s") from None

    def ask(
        self,
        episode_id: str,
        decision: int,
        observation: Observation,
        executed: Sequence[episode_pb2.Tick] = (),
        *,
        deadline_s: float | None = None,
    ) -> Future[Answer]:
        """One decision, not waited for; a failure is the future's PolicyError.  Cancel it when it comes too late."""
        spec = self._spec or self.spec()
        request = encode_request(episode_id, decision, observation, executed, self.image_format)
        answer: Future[Answer] = Future()
        if self._stream is not None:
            reply = self._stream.ask((episode_id, decision), request)
        else:
            reply = self._act.future(request, timeout=self.deadline_s if deadline_s is None else deadline_s)
        answer.add_done_callback(lambda answer: reply.cancel() if answer.cancelled() else None)
        reply.add_done_callback(lambda reply: self._settle(answer, reply, (episode_id, decision), spec))
        return answer

    def end_episode(
        self,
        episode_id: str,
        outcome: Outcome,
        *,
        terminal: bool = False,
        executed: Sequence[episode_pb2.Tick] = (),
        final_observation: Observation | None = None,
        message: str = "",
        give_up_after_s: float | None = None,
    ) -> None:
        """Closes an episode; returns once the server has it safe.  A second call does nothing."""
        request = policy_pb2.EndEpisodeRequest(
            episode_id=episode_id,
            outcome=f"OUTCOME_{outcome.upper()}",
            terminal=terminal,
            executed=executed,
            message=message,
        )
        if final_observation is not None:
            request.final_observation.CopyFrom(encode_observation(final_observation, self.image_format))
        self._persist(self._stub.EndEpisode, request, give_up_after_s)

    def _settle(self, answer: Future[Answer], reply, asked: Key, spec: PolicySpec) -> None:
        """Hands the outcome of the call over to whoever waits for the answer."""
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(self._check(reply.result(), asked, spec))
        except PolicyError as error:
            answer.set_exception(error)
        except grpc.RpcError as error:
            answer.set_exception(of_rpc(error, self.address))
        except grpc.FutureCancelledError:
            answer.set_exception(ServerLost(f"{self.address}: the client was closed"))

    @staticmethod
    def _check(reply: policy_pb2.ActReply, asked: Key, spec: PolicySpec) -> Answer:
        if reply.HasField("refusal"):
            raise of_refusal(reply.refusal)
        answered = (reply.episode_id, reply.decision)
        if asked != answered:
            raise BadAnswer(f"(episode, decision) must be {asked}, got {answered}")
        return Answer.of(reply, spec)

    def _persist(self, call: Callable[..., T], request: object, give_up_after_s: float | None = None) -> T:
        """The reply to an idempotent request, tried again with back-off while that may help."""

        def attempt() -> T:
            try:
                return call(request, timeout=self.deadline_s)
            except grpc.RpcError as failure:
                raise looked_into(of_rpc(failure, self.address), self.address, self._credentials) from None

        return persist(attempt, give_up_after_s=self.give_up_after_s if give_up_after_s is None else give_up_after_s)
