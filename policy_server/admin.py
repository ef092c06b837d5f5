"""The Admin service: new weights in, which of them is live, proof of what is served, the server's sleep and way out.

Receiving is the event loop's and building a thread's; the engine goes on decoding beside both.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from policy_server.errors import BadRequest, Overloaded, TooSlow
from policy_server.observation import Observed, read_observation
from policy_server.refusals import disk, refusing
from policy_server.version_store import Incoming, Kind, Version, VersionStore
from policy_server.versions import Versions
from protos import admin_pb2, admin_pb2_grpc, policy_pb2
from protos.codec import CodecError, decode_tensor, encode_tensor

KINDS: Mapping[int, Kind] = {admin_pb2.WEIGHTS_KIND_FULL: "full", admin_pb2.WEIGHTS_KIND_LORA: "lora"}
CODES: Mapping[Kind, admin_pb2.WeightsKind] = {
    "first": admin_pb2.WEIGHTS_KIND_UNSPECIFIED,
    "full": admin_pb2.WEIGHTS_KIND_FULL,
    "lora": admin_pb2.WEIGHTS_KIND_LORA,
}
MAX_NOTE, MAX_ADAPTER_CONFIG = 1000, 2**18
MAX_PROBES = 64
PASS = 8
"""Probes of one pass of the model, between two batches of the engine."""
MAX_UPLOADS = 4
"""Weights that may be on their way at once: each has a part of its file in memory."""
UPLOAD_RETRY_MS = 5_000
SILENCE_S = 60.0
"""How long the next part of a file may take to come."""
MAX_WITHIN_S = 24 * 3600.0

Score = Callable[[int, list[Any], np.ndarray, float], np.ndarray]
"""float32 log-probabilities (B, N) of a version, prepared observations, int32 tokens (B, N), a temperature."""


class AdminService(admin_pb2_grpc.AdminServicer):
    """max_bytes bounds a published file; open_episodes() counts the open episodes of each version.

    needed() gives the versions that may not be deleted; status(), drain(within_s), sleep(within_s) and wake() are the
    server's own.
    """

    def __init__(
        self,
        *,
        spec: policy_pb2.PolicySpec,
        versions: Versions,
        store: VersionStore,
        prepare: Callable[[Observed], Any],
        score: Score,
        max_bytes: int,
        open_episodes: Callable[[], Mapping[int, int]],
        needed: Callable[[], Collection[int]],
        status: Callable[[], admin_pb2.ServerStatus],
        drain: Callable[[float], Awaitable[int]],
        sleep: Callable[[float], Coroutine[Any, Any, int]],
        wake: Callable[[], Coroutine[Any, Any, None]],
    ):
        self._spec, self._versions, self._store = spec, versions, store
        self._prepare, self._score = prepare, score
        self._max_bytes, self._open_episodes, self._needed = max_bytes, open_episodes, needed
        self._status, self._drain, self._sleep, self._wake = status, drain, sleep, wake
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="versions")
        self._uploads = 0
        self._scoring = asyncio.Lock()  # one at a time: robots' episodes are stored by threads of the same pool

    def close(self) -> None:
        """Returns when what was being built is there."""
        self._builder.shutdown()

    @refusing
    async def PublishWeights(
        self, requests: AsyncIterator[admin_pb2.PublishWeightsRequest], context: Any
    ) -> admin_pb2.PublishWeightsReply:
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are under way, and no more may be", retry_after_ms=UPLOAD_RETRY_MS)
        self._uploads += 1
        try:
            header, incoming = await self._received(requests)
        except BaseException:
            self._uploads -= 1
            raise
        publishing = self._in_turn(self._publish, incoming, header)
        publishing.add_done_callback(lambda _: self._upload_is_over())
        version = await asyncio.shield(publishing)  # it goes to its end, whoever still waits for it
        return admin_pb2.PublishWeightsReply(version=version.version, device_fingerprint=version.device_fingerprint)

    @refusing
    async def SetLive(self, request: admin_pb2.SetLiveRequest, context: Any) -> admin_pb2.SetLiveReply:
        self._versions.check(request.version)
        with disk("the version store"):
            return admin_pb2.SetLiveReply(previous=await self._in_turn(self._versions.set_live, request.version))

    @refusing
    async def ListVersions(self, request: admin_pb2.ListVersionsRequest, context: Any) -> admin_pb2.ListVersionsReply:
        episodes = self._open_episodes()
        return admin_pb2.ListVersionsReply(
            live=self._versions.live,
            versions=[_info(version, episodes.get(version.version, 0)) for version in self._store.versions],
        )

    @refusing
    async def ScoreProbe(self, request: admin_pb2.ScoreProbeRequest, context: Any) -> admin_pb2.ScoreProbeReply:
        self._versions.check(request.version)
        if not (math.isfinite(request.temperature) and request.temperature > 0):
            raise BadRequest(f"must be finite and positive, got {request.temperature}", field="temperature")
        if not 1 <= len(request.probes) <= MAX_PROBES:
            raise BadRequest(f"must be 1 to {MAX_PROBES} of them, got {len(request.probes)}", field="probes")
        async with self._scoring:
            logprobs_BN = await asyncio.to_thread(self._scored, request)
        return admin_pb2.ScoreProbeReply(token_logprobs=encode_tensor(logprobs_BN))

    @refusing
    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.ServerStatus:
        return self._status()

    @refusing
    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainReply:
        return admin_pb2.DrainReply(open_episodes=await self._drain(_within(request.within_s)))

    @refusing
    async def Sleep(self, request: admin_pb2.SleepRequest, context: Any) -> admin_pb2.SleepReply:
        return admin_pb2.SleepReply(bytes=await asyncio.shield(self._sleep(_within(request.within_s))))

    @refusing
    async def Wake(self, request: admin_pb2.WakeRequest, context: Any) -> admin_pb2.WakeReply:
        await asyncio.shield(self._wake())
        return admin_pb2.WakeReply()

    def _upload_is_over(self) -> None:
        self._uploads -= 1

    async def _received(
        self, requests: AsyncIterator[admin_pb2.PublishWeightsRequest]
    ) -> tuple[admin_pb2.WeightsHeader, Incoming]:
        """The whole of an upload, or nothing of it.  Raises Refused."""
        header = await self._header(requests)
        with disk("the version store"):
            incoming = self._store.receive(KINDS[header.kind], header.bytes, header.adapter_config)
        try:
            await _receive(incoming, header, requests)
        except BaseException:
            incoming.discard()
            raise
        return header, incoming

    async def _header(self, requests: AsyncIterator[admin_pb2.PublishWeightsRequest]) -> admin_pb2.WeightsHeader:
        """The first message, which says nothing that forbids the rest.  Raises Refused."""
        self._versions.check_awake()
        first = await _next(requests)
        if first is None or first.WhichOneof("part") != "header":
            raise BadRequest("the first message must be the header, got none", field="header")
        header = first.header
        if header.kind not in KINDS:
            raise BadRequest(f"must be FULL or LORA, got code {header.kind}", field="header.kind")
        if header.base_fingerprint != self._spec.base_fingerprint:
            raise BadRequest(
                f"the weights are for another base: must be {self._spec.base_fingerprint!r},"
                f" got {header.base_fingerprint!r}",
                field="header.base_fingerprint",
            )
        self._versions.check(header.parent, field="header.parent")
        if not 1 <= header.bytes <= self._max_bytes:
            raise BadRequest(f"must be in 1..{self._max_bytes}, got {header.bytes}", field="header.bytes")
        if len(header.note) > MAX_NOTE:
            raise BadRequest(f"must be at most {MAX_NOTE} characters, got {len(header.note)}", field="header.note")
        least, most = (1, MAX_ADAPTER_CONFIG) if header.kind == admin_pb2.WEIGHTS_KIND_LORA else (0, 0)
        if not least <= len(header.adapter_config) <= most:
            raise BadRequest(
                f"must be {least} to {most} characters for {KINDS[header.kind]}, got {len(header.adapter_config)}",
                field="header.adapter_config",
            )
        return header

    def _publish(self, incoming: Incoming, header: admin_pb2.WeightsHeader) -> Version:
        try:
            with disk("the version store"):
                version = self._versions.publish(
                    incoming, parent=header.parent, note=header.note, set_live=header.set_live
                )
            self._store.trim(self._needed())
            return version
        finally:
            incoming.discard()

    def _scored(self, request: admin_pb2.ScoreProbeRequest) -> np.ndarray:
        """float32 (B, N)."""
        prepared = [self._prepared(probe, i) for i, probe in enumerate(request.probes)]
        token_ids_BN = np.stack([self._token_ids(probe, i) for i, probe in enumerate(request.probes)])
        parts = [slice(begin, begin + PASS) for begin in range(0, len(prepared), PASS)]
        scored = [
            self._score(request.version, prepared[part], token_ids_BN[part], request.temperature) for part in parts
        ]
        return np.concatenate(scored)

    def _prepared(self, probe: admin_pb2.Probe, index: int) -> Any:
        try:
            return self._prepare(read_observation(probe.observation, self._spec, field="observation"))
        except BadRequest as refused:
            raise BadRequest(str(refused), field=f"probes[{index}].{refused.field}") from refused

    def _token_ids(self, probe: admin_pb2.Probe, index: int) -> np.ndarray:
        field, tokens = f"probes[{index}].token_ids", self._spec.action_tokens
        size = self._spec.chunk_length * len(self._spec.action)
        try:
            token_ids_N = decode_tensor(probe.token_ids, field, dtype="int32", shape=(size,))
        except CodecError as error:
            raise BadRequest(str(error).removeprefix(f"{error.field}: "), field=field) from error
        least, most = tokens.vocabulary - tokens.bins, tokens.vocabulary - 1
        if token_ids_N.min() < least or token_ids_N.max() > most:
            raise BadRequest(f"must be action tokens, {least} to {most}, got {token_ids_N.tolist()}", field=field)
        return token_ids_N

    def _in_turn(self, work: Callable[..., Any], *args: Any) -> asyncio.Future:
        """One at a time, in the builder's thread."""
        return asyncio.get_running_loop().run_in_executor(self._builder, work, *args)


def _within(within_s: float) -> float:
    """How long others may take.  Raises BadRequest."""
    if not 0 <= within_s <= MAX_WITHIN_S:
        raise BadRequest(f"must be in 0..{MAX_WITHIN_S:g}, got {within_s}", field="within_s")
    return within_s


async def _receive(
    incoming: Incoming,
    header: admin_pb2.WeightsHeader,
    requests: AsyncIterator[admin_pb2.PublishWeightsRequest],
) -> None:
    """The whole file.  Raises BadRequest when it is not what the header says."""
    with disk("the version store"):
        while (request := await _next(requests)) is not None:
            if request.WhichOneof("part") != "data":
                raise BadRequest("only data may follow the header, got another message", field="data")
            if incoming.bytes + len(request.data) > header.bytes:
                raise BadRequest(f"must be {header.bytes} bytes as the header says, got more", field="data")
            await asyncio.to_thread(incoming.write, request.data)
        incoming.close()
    if incoming.bytes != header.bytes:
        raise BadRequest(f"must be {header.bytes} bytes as the header says, got {incoming.bytes}", field="data")
    if incoming.sha256 != header.sha256:
        raise BadRequest(f"must have the SHA-256 {header.sha256!r}, got {incoming.sha256!r}", field="data")


async def _next(requests: AsyncIterator[admin_pb2.PublishWeightsRequest]) -> admin_pb2.PublishWeightsRequest | None:
    """None at the end.  Raises TooSlow."""
    try:
        return await asyncio.wait_for(anext(requests, None), SILENCE_S)
    except asyncio.TimeoutError:
        raise TooSlow(f"the next part must come within {SILENCE_S:g} s, and did not") from None


def _info(version: Version, open_episodes: int) -> admin_pb2.VersionInfo:
    return admin_pb2.VersionInfo(
        version=version.version,
        parent=version.parent,
        kind=CODES[version.kind],
        note=version.note,
        published_unix_ns=version.published_unix_ns,
        device_fingerprint=version.device_fingerprint,
        open_episodes=open_episodes,
    )
