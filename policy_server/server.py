"""One policy server: the service, its engine, health and reflection, from warm-up to a clean stop."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest
from policy_server.engine import Engine
from policy_server.episode_store import EpisodeStore
from policy_server.episodes import Episodes
from policy_server.errors import CannotStart
from policy_server.observation import Observed
from policy_server.rollout_queue import DEFAULT_LEASE_S, RolloutQueue
from policy_server.rollout_service import RolloutService
from policy_server.service import PolicyService
from policy_server.versions import Versions
from protos import policy_pb2, policy_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from protos.channel import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

POLICY = policy_pb2.DESCRIPTOR.services_by_name["Policy"].full_name
ROLLOUTS = rollout_pb2.DESCRIPTOR.services_by_name["Rollouts"].full_name
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


class PolicyServer:
    """Built cold; start() listens, warm_up() serves, stop() finishes what is in flight.

    port 0 takes a free one.  `store` None keeps no episodes.  Episodes that are silent for episode_idle_s are closed
    as errors; a lease that is not renewed for lease_s is lost.
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
    ):
        self._address = (host, port)
        self._model = model
        self._store = store
        self._idle_s = episode_idle_s
        rollouts = RolloutQueue(done=store.counted_rollouts() if store is not None else (), lease_s=lease_s)
        episodes = Episodes(store, rollouts)
        versions = Versions(model)
        self._batcher = Batcher(max_batch=max_batch, max_wait_ms=max_wait_ms, capacity=queue, expected=episodes.at_work)
        self._engine = Engine(self._batcher, lambda requests: versions.model(requests[0].version).decode(requests))
        self._service = PolicyService(
            spec=model.spec, versions=versions, prepare=model.prepare, batcher=self._batcher, episodes=episodes
        )
        self._rollouts = RolloutService(queue=rollouts, store=store, versions=versions)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] (set at run time)
        self._server: grpc.aio.Server
        self._expiry: asyncio.Task

    async def start(self) -> int:
        """Listens, NOT_SERVING yet; gives the port.  Raises CannotStart when the address is taken."""
        host, port = self._address
        self._server = grpc.aio.server(options=OPTIONS)
        policy_pb2_grpc.add_PolicyServicer_to_server(self._service, self._server)
        rollout_pb2_grpc.add_RolloutsServicer_to_server(self._rollouts, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = [POLICY, ROLLOUTS, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(services, self._server)
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise CannotStart(f"cannot listen on {host}:{port}: is another server running there?") from error
        await self._server.start()
        return port

    async def warm_up(self) -> None:
        """Warms the model, then takes decisions."""
        await asyncio.to_thread(self._model.warm_up)
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
        await self._server.stop(grace=FLUSH_S)
        if self._store is not None:
            self._store.close()

    @property
    def waiting(self) -> int:
        """Requests that are being prepared or queued."""
        return self._batcher.waiting

    async def _expire(self) -> None:
        await asyncio.gather(self._service.expire(self._idle_s), self._rollouts.expire())

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", POLICY, ROLLOUTS):
            await self._health.set(service, status)
