"""Requests at random, valid and not, for every method of the server, and what is wrong with an answer to one.

    valid       what a well-behaved client asks                   must be answered
    spoiled     a valid one with something known to be wrong      must be refused for that, by field
    mutated     a valid one with any field set to anything        answered, or refused for that field or one in it
    arbitrary   a message of any fields                           answered, or refused by a field that there is
    corrupted   bytes near a valid one's, or any                  answered, or refused
    noise       bytes to the port itself                          nothing is asked of the answer

A refusal has a code of the contract and its Refusal in the metadata.  The neighbour plays the same episode over and
over, and has to get the same tokens as when it was alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st

from protos import admin_pb2, episode_pb2, policy_pb2, policy_pb2_grpc, rollout_pb2, session_pb2, session_pb2_grpc
from protos.codec import encode_image, encode_tensor

REFUSAL_KEY = "vla-rl-refusal-bin"
DEADLINE_S = 60.0
CONTRACT = {
    code.value[0]
    for code in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
    )
}
"""What a server that serves may refuse a request with, here where nobody is slow."""
AT_FAULT = {grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.NOT_FOUND.value[0]}
"""Of those, the ones that have to name a field."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HERE = "the-open-episode-of-test"
"""Stands for the id of an episode that is opened for the request, and is as long as one."""

SESSION = session_pb2.StartSessionRequest(session_id="fuzz", task="fuzz", temperature=0.5)
"""There from the beginning on."""

SERVICES = {
    name: module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (policy_pb2, "Policy"),
        (rollout_pb2, "Rollouts"),
        (admin_pb2, "Admin"),
        (session_pb2, "Sessions"),
    )
}
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in SERVICES.values()
    for method in service.methods
    if method.name not in ("Drain", "Sleep")  # they would be obeyed
}
ON_ADMIN_PORT = ("/vla_rl.Admin/", "/vla_rl.Sessions/")
UNSURE = ("/PublishWeights", "/OfferCandidate", "/ControlSession")
"""What a valid one gets is another's doing too."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One call, or bytes."""

    kind: str
    method: str = ""
    """empty: bytes to a port"""
    admin: bool = False
    requests: Sequence[Message | bytes] = field(default=(), repr=False)
    """more than one where the method takes a stream"""
    blame: tuple[str, ...] = ()
    """Fields that a refusal may name, or that lie in one, or that one lies in; empty: any."""


def shots(spec: policy_pb2.PolicySpec) -> st.SearchStrategy[Shot]:
    """Everything, for a server of this spec."""
    bases, spoiled = valid_requests(spec), len(spoiled_requests(spec))
    with_fields = [method for method in bases if METHODS[method].input_type.fields]
    numbers = st.integers(0, 2**32 - 1)
    return st.one_of(
        st.builds(lambda method, n: _shot("valid", method, valid_requests(spec, n)[method]), _one_of(bases), numbers),
        st.builds(lambda i, n: _shot("spoiled", *spoiled_requests(spec, n)[i]), st.integers(0, spoiled - 1), numbers),
        _one_of(with_fields).flatmap(lambda method: _mutated(method, bases[method])),
        _one_of(METHODS).flatmap(_arbitrary),
        _one_of(bases).flatmap(lambda method: _corrupted(method, bases[method])),
        st.builds(_noise, st.booleans(), st.booleans(), st.binary(max_size=300)),
    )


def _one_of(methods: Iterable[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(methods))


def _shot(kind: str, method: str, requests: Sequence[Message | bytes], blame: tuple[str, ...] = ()) -> Shot:
    return Shot(kind=kind, method=method, admin=method.startswith(ON_ADMIN_PORT), requests=requests, blame=blame)


def _mutated(method: str, base: Sequence[Message]) -> st.SearchStrategy[Shot]:
    @st.composite
    def mutate(draw: Callable[..., Any]) -> Shot:
        requests = [_copy(message) for message in base]
        blame = ["data", "header"] if method.endswith("/PublishWeights") else []  # what the parts are together
        for _ in range(draw(st.integers(1, 2))):
            slots = [slot for request in requests for slot in _slots(request)]
            message, descriptor, path = slots[draw(st.integers(0, len(slots) - 1))]
            _overwrite(message, descriptor, draw)
            blame.append(path)
        return _shot("mutated", method, requests, tuple(blame))

    return mutate()


def _arbitrary(method: str) -> st.SearchStrategy[Shot]:
    called = METHODS[method]
    size = {"min_size": 1, "max_size": 3 if called.client_streaming else 1}
    return st.lists(messages(called.input_type), **size).map(lambda requests: _shot("arbitrary", method, requests))


def _corrupted(method: str, base: Sequence[Message]) -> st.SearchStrategy[Shot]:
    data = base[0].SerializeToString()

    def corrupt(at: int, drop: int, add: bytes) -> Shot:
        at %= len(data) + 1
        return _shot("corrupted", method, [data[:at] + add + data[at + drop :]])

    near = st.builds(corrupt, st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8))
    return near | st.binary(max_size=100).map(lambda any_bytes: _shot("corrupted", method, [any_bytes]))


def _noise(admin: bool, preface: bool, data: bytes) -> Shot:
    return Shot(kind="noise", admin=admin, requests=[PREFACE * preface + data])


def messages(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Message]:
    """Any message of that type; what it holds goes `depth` deep."""

    @st.composite
    def build(draw: Callable[..., Any]) -> Message:
        message = GetMessageClass(descriptor)()
        for entry in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=6)) if descriptor.fields else ():
            _overwrite(message, entry, draw, depth)
        return message

    return build()


SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 3),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1) | st.integers(0, 3),
}


def _values(descriptor: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Of a field that is no message."""
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return st.text(max_size=40) | st.just("x" * 600)
    if descriptor.enum_type is not None:
        return st.sampled_from([*descriptor.enum_type.values_by_number, 99, -1])
    return SCALARS[descriptor.cpp_type]


def _overwrite(message: Message, descriptor: FieldDescriptor, draw: Callable[..., Any], depth: int = 3) -> None:
    """Sets a field of the message to anything."""
    name, inner = descriptor.name, descriptor.message_type
    message.ClearField(name)
    if inner is not None and depth == 0:
        return
    if inner is not None and inner.GetOptions().map_entry:
        entries = getattr(message, name)
        for key in draw(st.lists(st.sampled_from(["agentview", "wrist", ""]), max_size=3)):
            entries[key].CopyFrom(draw(messages(inner.fields_by_name["value"].message_type, depth - 1)))
    elif descriptor.is_repeated:
        values = messages(inner, depth - 1) if inner is not None else _values(descriptor)
        getattr(message, name).extend(draw(st.lists(values, max_size=4)))
    elif inner is not None:
        getattr(message, name).CopyFrom(draw(messages(inner, depth - 1)))
    else:
        setattr(message, name, draw(_values(descriptor)))


def _slots(message: Message, path: str = "") -> Iterator[tuple[Message, FieldDescriptor, str]]:
    """Every field of a message and of what it holds, with its path as a refusal would name it."""
    for descriptor in message.DESCRIPTOR.fields:
        here = f"{path}{descriptor.name}"
        yield message, descriptor, here
        if descriptor.message_type is None:
            continue
        value = getattr(message, descriptor.name)
        if descriptor.message_type.GetOptions().map_entry:
            inside = [(f"[{key}]", value[key]) for key in sorted(value)]
        elif descriptor.is_repeated:
            inside = [(f"[{index}]", one) for index, one in enumerate(value)]
        else:
            inside = [("", value)] if message.HasField(descriptor.name) else []
        for where, one in inside:
            yield from _slots(one, f"{here}{where}.")


def observation(spec: policy_pb2.PolicySpec, number: int = 0) -> episode_pb2.Observation:
    generator = np.random.default_rng(number)
    return episode_pb2.Observation(
        images={
            image.name: encode_image(generator.integers(0, 255, (image.height, image.width, 3), dtype=np.uint8))
            for image in spec.images
        },
        state=encode_tensor(generator.normal(size=len(spec.state)).astype(np.float32)) if spec.state else None,
        instruction="pick up the bowl",
        capture_time_ns=number,
    )


def valid_requests(spec: policy_pb2.PolicySpec, number: int = 0) -> dict[str, Sequence[Message]]:
    """By method: requests that are answered, whenever they come.  What they show and ask for differs by number."""
    size, seen = len(spec.action), observation(spec, number)
    temperature = (0.0, 0.5, 1.0)[number % 3]
    ticks = [episode_pb2.Tick(action=[0.0] * size, source=episode_pb2.SOURCE_HOLD, index=index) for index in range(2)]
    act = policy_pb2.ActRequest(episode_id=HERE, observation=seen, executed=ticks)
    end = policy_pb2.EndEpisodeRequest(episode_id=HERE, outcome=1, executed=ticks, final_observation=seen)
    start = policy_pb2.StartEpisodeRequest(task="fuzz/0", purpose=3, temperature=temperature, seed=number)
    rollout = rollout_pb2.Rollout(rollout_id="fuzz/0", task="fuzz/0", purpose=1, temperature=temperature, seed=number)
    tokens = np.full(spec.chunk_length * size, spec.action_tokens.vocabulary - 1, np.int32)
    probe = admin_pb2.Probe(observation=seen, token_ids=encode_tensor(tokens))
    data = b"no safetensors"
    header = admin_pb2.WeightsHeader(
        kind=1, base_fingerprint=spec.base_fingerprint, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    return {
        "/vla_rl.Policy/GetSpec": [policy_pb2.GetSpecRequest()],
        "/vla_rl.Policy/StartEpisode": [start],
        "/vla_rl.Policy/Act": [act],
        "/vla_rl.Policy/ActStream": [act],
        "/vla_rl.Policy/EndEpisode": [end],
        "/vla_rl.Rollouts/EnqueueRollouts": [rollout_pb2.EnqueueRolloutsRequest(rollouts=[rollout])],
        "/vla_rl.Rollouts/CancelRollouts": [rollout_pb2.CancelRolloutsRequest(run="fuzz")],
        "/vla_rl.Rollouts/GetQueue": [rollout_pb2.GetQueueRequest()],
        "/vla_rl.Rollouts/LeaseRollout": [rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fuzz/*"])],
        "/vla_rl.Rollouts/RenewLease": [rollout_pb2.RenewLeaseRequest(lease_id="none")],
        "/vla_rl.Rollouts/ReturnLease": [rollout_pb2.ReturnLeaseRequest(lease_id="none")],
        "/vla_rl.Rollouts/StreamEpisodes": [rollout_pb2.StreamEpisodesRequest()],
        "/vla_rl.Rollouts/CommitCursor": [rollout_pb2.CommitCursorRequest(reader="fuzz")],
        "/vla_rl.Admin/SetLive": [admin_pb2.SetLiveRequest(version=0)],
        "/vla_rl.Admin/ListVersions": [admin_pb2.ListVersionsRequest()],
        "/vla_rl.Admin/ScoreProbe": [admin_pb2.ScoreProbeRequest(probes=[probe], temperature=1.0)],
        "/vla_rl.Admin/GetStatus": [admin_pb2.GetStatusRequest()],
        "/vla_rl.Admin/Wake": [admin_pb2.WakeRequest()],
        "/vla_rl.Admin/PublishWeights": [
            admin_pb2.PublishWeightsRequest(header=header),
            admin_pb2.PublishWeightsRequest(data=data),
        ],
        "/vla_rl.Sessions/StartSession": [SESSION],
        "/vla_rl.Sessions/ListSessions": [session_pb2.ListSessionsRequest()],
        "/vla_rl.Sessions/GetSession": [session_pb2.GetSessionRequest(session_id=SESSION.session_id)],
        "/vla_rl.Sessions/OfferCandidate": [session_pb2.OfferCandidateRequest(session_id=SESSION.session_id)],
        "/vla_rl.Sessions/ControlSession": [
            session_pb2.ControlSessionRequest(session_id=SESSION.session_id, control=session_pb2.CONTROL_PAUSE)
        ],
    }


Spoiled = tuple[str, Sequence[Message], tuple[str, ...]]
"""Method, requests, and the fields that are to blame."""


def spoiled_requests(spec: policy_pb2.PolicySpec, number: int = 0) -> list[Spoiled]:
    """Requests that may not be answered."""
    bases, camera = valid_requests(spec, number), spec.images[0].name
    image, nan = f"observation.images[{camera}]", float("nan")
    spoilers: list[tuple[str, str, Callable[[Any], object]]] = [
        ("Policy/StartEpisode", "purpose", lambda r: r.ClearField("purpose")),
        ("Policy/StartEpisode", "purpose", lambda r: setattr(r, "purpose", 99)),
        ("Policy/StartEpisode", "temperature", lambda r: setattr(r, "temperature", nan)),
        ("Policy/StartEpisode", "noise_correlation", lambda r: setattr(r, "noise_correlation", 1.0)),
        ("Policy/StartEpisode", "version", lambda r: setattr(r, "version", 2**40)),
        ("Policy/StartEpisode", "lease_id", lambda r: setattr(r, "lease_id", "x")),
        ("Policy/StartEpisode", "task", lambda r: setattr(r, "task", "x" * 501)),
        ("Policy/Act", "episode_id", lambda r: setattr(r, "episode_id", "nobody's")),
        ("Policy/Act", "decision", lambda r: setattr(r, "decision", 7)),
        ("Policy/Act", image, lambda r: r.observation.images.clear()),
        ("Policy/Act", image, lambda r: setattr(r.observation.images[camera], "data", b"12")),
        ("Policy/Act", image, lambda r: setattr(r.observation.images[camera], "encoding", 2)),
        ("Policy/Act", image, lambda r: setattr(r.observation.images[camera], "height", 2**31)),
        ("Policy/Act", "observation.instruction", lambda r: setattr(r.observation, "instruction", "")),
        ("Policy/Act", "observation.instruction", lambda r: setattr(r.observation, "instruction", "go " * 3000)),
        ("Policy/Act", "executed[1].action", lambda r: r.executed[1].action.append(nan)),
        ("Policy/Act", "executed[0].source", lambda r: setattr(r.executed[0], "source", -1)),
        ("Policy/EndEpisode", "outcome", lambda r: setattr(r, "outcome", 0)),
        ("Policy/EndEpisode", "executed[0].action", lambda r: r.executed[0].ClearField("action")),
        ("Policy/EndEpisode", f"final_{image}", lambda r: r.final_observation.images.clear()),
        ("Rollouts/EnqueueRollouts", "rollouts[0].task", lambda r: r.rollouts[0].ClearField("task")),
        ("Rollouts/EnqueueRollouts", "rollouts[0].purpose", lambda r: setattr(r.rollouts[0], "purpose", 3)),
        ("Rollouts/CancelRollouts", "run", lambda r: r.ClearField("run")),
        ("Rollouts/LeaseRollout", "worker", lambda r: r.ClearField("worker")),
        ("Rollouts/LeaseRollout", "can_run", lambda r: r.ClearField("can_run")),
        ("Rollouts/StreamEpisodes", "cursor", lambda r: setattr(r, "cursor", 2**60)),
        ("Rollouts/CommitCursor", "cursor", lambda r: setattr(r, "cursor", 2**60)),
        ("Admin/SetLive", "version", lambda r: setattr(r, "version", 2**60)),
        ("Admin/ScoreProbe", "probes", lambda r: r.ClearField("probes")),
        ("Admin/ScoreProbe", "probes[0].token_ids", lambda r: r.probes[0].token_ids.ClearField("data")),
        ("Admin/ScoreProbe", "temperature", lambda r: setattr(r, "temperature", 0.0)),
        ("Admin/PublishWeights", "header.base_fingerprint", lambda r: setattr(r.header, "base_fingerprint", "e")),
        ("Admin/PublishWeights", "header.bytes", lambda r: setattr(r.header, "bytes", 2**60)),
        ("Admin/PublishWeights", "header.parent", lambda r: setattr(r.header, "parent", 2**60)),
        ("Admin/PublishWeights", "data", lambda r: setattr(r.header, "sha256", "0" * 64)),
        ("Sessions/StartSession", "session_id", lambda r: setattr(r, "session_id", "../x")),
        ("Sessions/StartSession", "task", lambda r: setattr(r, "task", "x" * 501)),
        ("Sessions/StartSession", "temperature", lambda r: setattr(r, "temperature", nan)),
        ("Sessions/StartSession", "base_version", lambda r: setattr(r, "base_version", 2**60)),
        ("Sessions/StartSession", "rule", lambda r: setattr(r.rule, "margin", nan)),
        ("Sessions/GetSession", "session_id", lambda r: setattr(r, "session_id", "nobody's")),
        ("Sessions/OfferCandidate", "session_id", lambda r: setattr(r, "session_id", "nobody's")),
        ("Sessions/OfferCandidate", "version", lambda r: setattr(r, "version", 2**60)),
        ("Sessions/ControlSession", "session_id", lambda r: setattr(r, "session_id", "nobody's")),
        ("Sessions/ControlSession", "control", lambda r: setattr(r, "control", 99)),
    ]
    if spec.state:
        wrong = encode_tensor(np.full(len(spec.state), np.inf, np.float32))
        spoilers.append(("Policy/Act", "observation.state", lambda r: r.observation.state.CopyFrom(wrong)))
    spoiled: list[Spoiled] = [("/vla_rl.Admin/Drain", [admin_pb2.DrainRequest(within_s=nan)], ("within_s",))]
    for name, blame, spoil in spoilers:
        requests = [_copy(message) for message in bases[f"/vla_rl.{name}"]]
        spoil(requests[0])
        names = ("Policy/Act", "Policy/ActStream") if name == "Policy/Act" else (name,)
        spoiled += [(f"/vla_rl.{each}", requests, (blame,)) for each in names]
    return spoiled


def _copy(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


class Range:
    """A live server to shoot at.  fire() gives what is wrong with the answer, nothing when all is well."""

    def __init__(self, address: str, admin_address: str):
        self._addresses = (address, admin_address)
        self._channels = [grpc.insecure_channel(each) for each in self._addresses]
        self._policy = policy_pb2_grpc.PolicyStub(self._channels[0])
        self.spec = self._policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=DEADLINE_S)
        session_pb2_grpc.SessionsStub(self._channels[1]).StartSession(SESSION, timeout=DEADLINE_S)
        self.fired: Counter[str] = Counter()
        """by kind"""
        self.codes: Counter[str] = Counter()
        """by what became of them"""

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def fire(self, shot: Shot) -> str:
        self.fired[shot.kind] += 1
        if not shot.method:
            self._make_noise(shot)
            return ""
        episode_id = ""
        if any(_is_here(request) for request in shot.requests):
            episode_id = self._start()
        requests = [_in_episode(request, episode_id) for request in shot.requests]
        replies, refusal, status = self._call(shot, requests)
        self._clean_up(shot, replies, episode_id)
        refused = [reply.refusal for reply in replies if isinstance(reply, policy_pb2.ActReply) and reply.refusal.code]
        refused += [refusal] if refusal is not None else []
        self.codes[status or (_name(refused[0].code) if refused else "answered")] += 1
        if status:
            return f"the call ended with {status} and no refusal"
        return "; ".join(filter(None, [_wrong(shot, one) for one in refused] or [_unrefused(shot, replies)]))

    def alive(self) -> bool:
        """Whether both ports say that the server serves."""
        request = health_pb2.HealthCheckRequest()
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in self._channels]
        serving = health_pb2.HealthCheckResponse.SERVING
        return all(stub.Check(request, timeout=DEADLINE_S).status == serving for stub in stubs)

    def _start(self) -> str:
        request = policy_pb2.StartEpisodeRequest(purpose=episode_pb2.PURPOSE_DEPLOY, task="fuzz", temperature=1.0)
        return self._policy.StartEpisode(request, timeout=DEADLINE_S).episode_id

    def _end(self, episode_id: str) -> None:
        request = policy_pb2.EndEpisodeRequest(episode_id=episode_id, outcome=episode_pb2.OUTCOME_ERROR)
        self._policy.EndEpisode(request, timeout=DEADLINE_S)

    def _call(self, shot: Shot, requests: Sequence[bytes]) -> tuple[list[Message], policy_pb2.Refusal | None, str]:
        """The replies, the refusal that ended the call, and where that had none, how it ended."""
        method = _method(shot.method)
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        parse = GetMessageClass(method.output_type).FromString
        call = getattr(self._channels[shot.admin], kind)(shot.method, response_deserializer=parse)
        replies: list[Message] = []
        try:
            answer = call(iter(requests) if method.client_streaming else requests[0], timeout=DEADLINE_S)
            if not method.server_streaming:
                return [answer], None, ""
            for reply in answer:
                replies.append(reply)
                if method.name == "StreamEpisodes":  # it may follow for ever
                    answer.cancel()
                    break
            return replies, None, ""
        except grpc.RpcError as error:
            data = dict(error.trailing_metadata() or ()).get(REFUSAL_KEY)
            if data is None:
                return replies, None, f"{error.code().name}: {error.details()}"
            refusal = policy_pb2.Refusal.FromString(data)
            assert refusal.code == error.code().value[0]
            return replies, refusal, ""

    def _clean_up(self, shot: Shot, replies: Sequence[Message], episode_id: str) -> None:
        opened = [reply.episode_id for reply in replies if isinstance(reply, policy_pb2.StartEpisodeReply)]
        for each in filter(None, [episode_id, *opened]):
            self._end(each)

    def _make_noise(self, shot: Shot) -> None:
        host, _, port = self._addresses[shot.admin].rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=DEADLINE_S) as near:
            near.sendall(shot.requests[0])  # type: ignore[arg-type]


def _method(path: str) -> MethodDescriptor:
    _, service, name = path.split("/")
    return SERVICES[service.rpartition(".")[2]].methods_by_name[name]


def _is_here(request: Message | bytes) -> bool:
    return HERE.encode() in (request if isinstance(request, bytes) else request.SerializeToString())


def _in_episode(request: Message | bytes, episode_id: str) -> bytes:
    """As it travels.  Waits for work are short."""
    if isinstance(request, rollout_pb2.LeaseRolloutRequest):
        request = _copy(request)
        request.wait_ms %= 20
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return data.replace(HERE.encode(), episode_id.encode())


def _wrong(shot: Shot, refusal: policy_pb2.Refusal) -> str:
    """What is wrong with a refusal."""
    said = f"{_name(refusal.code)} {refusal.field!r}: {refusal.message}"
    if shot.kind == "valid" and not shot.method.endswith(UNSURE):
        return f"a valid request was refused: {said}"
    if refusal.code not in CONTRACT:
        return f"a code that is not in the contract: {said}"
    if not refusal.message or len(refusal.message.encode()) > 1100:
        return f"no sentence: {said}"
    if refusal.code not in AT_FAULT or shot.kind == "corrupted":
        return ""
    if not _exists(_method(shot.method).input_type, refusal.field):
        return f"there is no such field: {said}"
    if shot.blame and not any(_overlap(refusal.field, blamed) for blamed in shot.blame):
        return f"{shot.blame} is at fault, another is blamed: {said}"
    return ""


def _unrefused(shot: Shot, replies: Sequence[Message]) -> str:
    """What is wrong with there being no refusal."""
    if shot.kind == "spoiled":
        return f"{shot.blame} is wrong, and was not refused"
    unanswered = [reply for reply in replies if isinstance(reply, policy_pb2.ActReply) and not reply.HasField("chunk")]
    return "a reply without an answer" if unanswered else ""


def _exists(descriptor: Descriptor, path: str) -> bool:
    """Whether a refusal's field, "executed[3].action" say, is one of the message's."""
    for word in path.split("."):
        name = re.sub(r"\[.*\]$", "", word)
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        inner = descriptor.fields_by_name[name].message_type
        descriptor = inner.fields_by_name["value"].message_type if inner and inner.GetOptions().map_entry else inner
    return True


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _name(code: int) -> str:
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), f"{code}")


@dataclass
class Neighbour:
    """A robot beside all this: the same episode over and over, whose answers have to stay those it got alone."""

    address: str
    decisions: int = 5
    answers: int = 0
    disturbed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        with grpc.insecure_channel(self.address) as channel:
            self._alone = self._play(policy_pb2_grpc.PolicyStub(channel))
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(DEADLINE_S)

    def _go_on(self) -> None:
        try:
            with grpc.insecure_channel(self.address) as channel:
                policy = policy_pb2_grpc.PolicyStub(channel)
                while not self._over.is_set():
                    now = self._play(policy)
                    self.answers += len(now)
                    if now != self._alone:
                        self.disturbed.append(f"it got {now}, alone {self._alone}")
        except Exception as error:  # whatever it is, it was disturbed
            self.disturbed.append(repr(error))

    def _play(self, policy: policy_pb2_grpc.PolicyStub) -> list[tuple[int, bytes, bytes]]:
        """(version, token ids, actions) of each decision."""
        spec = policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=DEADLINE_S)
        start = policy_pb2.StartEpisodeRequest(purpose=episode_pb2.PURPOSE_DEPLOY, seed=11, temperature=1.0, version=0)
        episode_id = policy.StartEpisode(start, timeout=DEADLINE_S).episode_id
        answers = []
        for decision in range(self.decisions):
            request = policy_pb2.ActRequest(
                episode_id=episode_id, decision=decision, observation=observation(spec, decision)
            )
            chunk = policy.Act(request, timeout=DEADLINE_S).chunk
            answers.append((chunk.version, chunk.token_ids.data, chunk.actions.data))
        end = policy_pb2.EndEpisodeRequest(episode_id=episode_id, outcome=episode_pb2.OUTCOME_SUCCESS)
        policy.EndEpisode(end, timeout=DEADLINE_S)
        return answers
