"""One policy server: the service, its engine, health and reflection, from warm-up to a clean stop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from policy_server.admin import AdminService
from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest
from policy_server.engine import Engine
from policy_server.episode_store import EpisodeStore
from policy_server.episodes import Episodes
from policy_server.errors import CannotStart
from policy_server.observation import Observed
from policy_server.rollout_queue import DEFAULT_LEASE_S, RolloutQueue
from policy_server.rollout_service import RolloutService
from policy_server.service import PolicyService
from policy_server.version_store import Kind, VersionStore
from policy_server.versions import Versions
from protos import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from protos.channel import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

POLICY = policy_pb2.DESCRIPTOR.services_by_name["Policy"].full_name
ROLLOUTS = rollout_pb2.DESCRIPTOR.services_by_name["Rollouts"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
FLUSH_S = 2.0
"""How long the last answers may take to leave when the server stops."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its robots between them.
    ("grpc.so_reuseport", 0),
    # Robots ping every 10 s while a stream is quiet; the default takes that for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Model(Protocol):
    """What the server needs of a policy."""

    @property
    def spec(self) -> policy_pb2.PolicySpec:
        """All of PolicySpec but the versions and whether episodes are stored."""
        ...

    def prepare(self, observed: Observed) -> Any:
        """An observation as decode() wants it; runs in any thread.  Raises BadRequest."""
        ...

    def decode(self, requests: list[DecodeRequest]) -> list[DecodeAnswer]:
        """One pass; runs in one thread only."""
        ...

    def warm_up(self) -> None:
        """Everything that makes the first answers slow."""
        ...

    def derive(self, folder: Path, kind: Kind) -> Model:
        """The same policy with the weights of a folder; nothing of this one changes.  Raises BadRequest."""
        ...

    def score(self, prepared: list[Any], token_ids_BN: np.ndarray, temperature: float) -> np.ndarray:
        """float32 log-probabilities (B, N) of given tokens in one pass."""
        ...

    @property
    def device_fingerprint(self) -> str:
        """SHA-256 over the effective tensors as they lie on the device."""
        ...

    @property
    def max_weights_bytes(self) -> int:
        """The largest file that derive() could have a use for."""
        ...


class PolicyServer:
    """Built cold; start() listens, warm_up() serves, stop() finishes what is in flight.

    port 0 takes a free one.  `store` None keeps no episodes.  Episodes that are silent for episode_idle_s are closed
    as errors; a lease that is not renewed for lease_s is lost.  `versions` None knows only the version it starts with,
    and has no admin service; admin_port None has none either.
    """

    def __init__(
        self,
        model: Model,
        *,
        host: str,
        port: int,
        max_batch: int,
        max_wait_ms: float,
        queue: int,
        store: EpisodeStore | None,
        episode_idle_s: float,
        lease_s: float = DEFAULT_LEASE_S,
        versions: VersionStore | None = None,
        admin_port: int | None = None,
    ):
        self._host, self._port = host, port
        self._model = model
        self._store, self._version_store = store, versions
        self._idle_s = episode_idle_s
        rollouts = RolloutQueue(done=store.counted_rollouts() if store is not None else (), lease_s=lease_s)
        self._episodes = Episodes(store, rollouts)
        self._versions = Versions(model, store=versions, build=self._build, pinned=self._open_episodes)
        self._passes = threading.Lock()
        self._batcher = Batcher(
            max_batch=max_batch, max_wait_ms=max_wait_ms, capacity=queue, expected=self._episodes.at_work
        )
        self._engine = Engine(self._batcher, self._decode)
        self._service = PolicyService(
            spec=model.spec,
            versions=self._versions,
            prepare=model.prepare,
            batcher=self._batcher,
            episodes=self._episodes,
        )
        self._rollouts = RolloutService(queue=rollouts, store=store, versions=self._versions)
        self._admin = self._admin_service() if admin_port is not None else None
        self.admin_port = admin_port
        """The real one once start() has returned."""
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] (set at run time)
        self._servers: list[grpc.aio.Server] = []
        self._expiry: asyncio.Task

    async def start(self) -> int:
        """Listens, NOT_SERVING yet; gives the port.  Raises CannotStart when an address is taken."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        server = grpc.aio.server(options=OPTIONS)
        policy_pb2_grpc.add_PolicyServicer_to_server(self._service, server)
        rollout_pb2_grpc.add_RolloutsServicer_to_server(self._rollouts, server)
        port = await self._listen(server, self._port, POLICY, ROLLOUTS)
        if self._admin is not None and self.admin_port is not None:
            server = grpc.aio.server(options=OPTIONS)
            admin_pb2_grpc.add_AdminServicer_to_server(self._admin, server)
            self.admin_port = await self._listen(server, self.admin_port, ADMIN)
        return port

    async def warm_up(self) -> None:
        """Warms the model, then takes decisions.  Raises CannotStart when the live version cannot be built."""
        await asyncio.to_thread(self._model.warm_up)
        await asyncio.to_thread(self._versions.open)
        self._engine.start()
        self._service.open()
        self._rollouts.open()
        self._expiry = asyncio.create_task(self._expire())
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """NOT_SERVING at once; decisions under way are answered, open episodes are closed as errors, then all ends."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._expiry.cancel()
        await self._service.drain()
        self._rollouts.drain()
        self._batcher.stop()
        await asyncio.to_thread(self._engine.join)
        await asyncio.gather(*(server.stop(grace=FLUSH_S) for server in self._servers))
        if self._admin is not None:
            await asyncio.to_thread(self._admin.close)
        for store in (self._store, self._version_store):
            if store is not None:
                store.close()

    @property
    def live_version(self) -> int:
        """What new episodes get."""
        return self._versions.live

    @property
    def waiting(self) -> int:
        """Requests that are being prepared or queued."""
        return self._batcher.waiting

    async def _expire(self) -> None:
        await asyncio.gather(self._service.expire(self._idle_s), self._rollouts.expire())

    async def _listen(self, server: grpc.aio.Server, port: int, *services: str) -> int:
        """Adds health and reflection, and gives the port."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            port = server.add_insecure_port(f"{self._host}:{port}")
        except RuntimeError as error:
            raise CannotStart(f"cannot listen on {self._host}:{port}: is another server running there?") from error
        await server.start()
        self._servers.append(server)
        return port

    def _admin_service(self) -> AdminService:
        if self._version_store is None:
            raise CannotStart("an admin service needs a store for the versions that it publishes")
        return AdminService(
            spec=self._model.spec,
            versions=self._versions,
            store=self._version_store,
            prepare=self._model.prepare,
            score=self._score,
            max_bytes=self._model.max_weights_bytes,
            open_episodes=self._open_episodes,
        )

    def _decode(self, requests: list[DecodeRequest]) -> list[DecodeAnswer]:
        model = self._versions.model(requests[0].version)
        with self._passes:
            return model.decode(requests)

    def _score(self, version: int, prepared: list[Any], token_ids_BN: np.ndarray, temperature: float) -> np.ndarray:
        model = self._versions.model(version)
        with self._passes:
            return model.score(prepared, token_ids_BN, temperature)

    def _build(self, folder: Path, kind: Kind) -> tuple[Model, str]:
        model = self._model.derive(folder, kind)
        return model, model.device_fingerprint

    def _open_episodes(self) -> Counter[int]:
        """How many open episodes each version has."""
        live = self._versions.live
        return Counter(live if e.start.follow_live else e.start.version for e in self._episodes.open)

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", POLICY, ROLLOUTS, *[ADMIN] * (self._admin is not None)):
            await self._health.set(service, status)
