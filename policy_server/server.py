"""One policy server: the service, its engine, health and reflection, from warm-up to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from policy_server.access import ADMIN_PORT, POLICY_PORT, Access, Guard, Roles
from policy_server.admin import AdminService
from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest, Ticket
from policy_server.calls import DEFAULT_CALLS, Calls
from policy_server.engine import Engine
from policy_server.episode_store import EpisodeStore
from policy_server.episodes import DEFAULT_CLIENT_EPISODES, Episodes
from policy_server.errors import Abandoned, CannotStart, Overloaded, Unavailable
from policy_server.http import HttpDoor, cannot_listen
from policy_server.metrics import Metrics, ServerState
from policy_server.model import Model
from policy_server.observation import max_request_bytes
from policy_server.openpi import OpenpiDoor
from policy_server.refusals import DRAINING, RETRY_SOON_MS, WARMING
from policy_server.rollout_queue import DEFAULT_LEASE_S, RolloutQueue
from policy_server.rollout_service import RolloutService
from policy_server.service import PolicyService
from policy_server.session_service import SessionService
from policy_server.sessions import DEFAULT_EPISODE_S, Sessions
from policy_server.version_store import Kind, VersionStore
from policy_server.versions import DEFAULT_ADAPTER_SLOTS, Versions
from policy_server.watch import Watch
from protos import (
    admin_pb2,
    admin_pb2_grpc,
    episode_pb2,
    policy_pb2,
    policy_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from protos.channel import MAX_MESSAGE_BYTES, address_of
from protos.openpi_codec import Gripper

log = logging.getLogger(__name__)

POLICY = policy_pb2.DESCRIPTOR.services_by_name["Policy"].full_name
ROLLOUTS = rollout_pb2.DESCRIPTOR.services_by_name["Rollouts"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
SESSIONS = session_pb2.DESCRIPTOR.services_by_name["Sessions"].full_name
FLUSH_S = 2.0
"""How long the last answers may take to leave when the server stops."""
LOOK_S = 0.05
"""How soon it is noticed that the last episode has ended."""
REPORT_S = 1.0
"""How long a change of health may take to reach those who watch it: one who does not read holds up nobody."""

OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Nothing compressed is taken (bit 0: as it is): older gRPC inflates a message before it looks at its length.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Two servers on one port would share its robots between them.
    ("grpc.so_reuseport", 0),
    # Robots ping every 10 s while a stream is quiet; the default takes that for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that is gone without a word is noticed within 30 s, and its calls end.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # newer gRPC waits for the longer of the two, by default a minute
    ("grpc.http2.max_pings_without_data", 0),
    # A connection over which nothing is asked is closed; a robot connects again when it asks.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
]


class PolicyServer:
    """Built cold; start() listens, warm_up() serves, drain() lets episodes end, stop() finishes what is in flight.

    port 0 takes a free one.  `store` None keeps no episodes.  Episodes that are silent for episode_idle_s are closed
    as errors; a session waits for none longer than session_episode_s; a lease that is not renewed for lease_s is lost.
    `versions` None knows only the version it starts with, and has no admin service; admin_port None has none either.
    `guard` None lets everybody in.  openpi_keys: camera, state or prompt -> where an openpi robot's observation has
    it, if elsewhere than LIBERO's.
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
        session_episode_s: float = DEFAULT_EPISODE_S,
        lease_s: float = DEFAULT_LEASE_S,
        client_episodes: int = DEFAULT_CLIENT_EPISODES,
        client_calls: int = DEFAULT_CALLS,
        versions: VersionStore | None = None,
        adapter_slots: int = DEFAULT_ADAPTER_SLOTS,
        admin_port: int | None = None,
        guard: Guard | None = None,
        openpi_port: int | None = None,
        openpi_keys: Mapping[str, str] | None = None,
        openpi_gripper: Gripper = "libero",
        http_port: int | None = None,
    ):
        self._host, self._port = host, port
        self._guard = guard or Guard(Access())
        self._model = model
        self._store, self._version_store = store, versions
        self._idle_s, self._session_episode_s = episode_idle_s, session_episode_s
        rollouts = RolloutQueue(done=store.counted_rollouts() if store is not None else (), lease_s=lease_s)
        self._work = rollouts
        self._sessions = None
        if store is not None and versions is not None:
            self._sessions = Sessions(versions.folder / "sessions", store)
        self._episodes = Episodes(
            store,
            rollouts,
            self._sessions,
            per_client=client_episodes,
            watched=model.spec.images[0].name if http_port is not None else "",
        )
        self.metrics = Metrics()
        self._calls = Calls(self.metrics, most=client_calls)
        self._versions = Versions(
            model.first,
            store=versions,
            build=self._build,
            pinned=self._pinned_versions,
            adapter_slots=adapter_slots,
        )
        self._capacity = queue
        self._batcher = Batcher(
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            capacity=queue,
            expected=self._episodes.at_work,
            together=self._together,
            lanes=model.lanes,
        )
        self.metrics.registry.register(
            ServerState(
                batcher=self._batcher,
                episodes=self._episodes,
                store=store,
                versions=self._versions,
                version_store=versions,
                adapter_slots=adapter_slots,
            )
        )
        self._engine = Engine(self._batcher, self._decode, lanes=model.lanes, observe=self.metrics.passed)
        self.engine_is_gone = False
        self._service = PolicyService(
            spec=model.spec,
            versions=self._versions,
            prepare=model.prepare,
            batcher=self._batcher,
            episodes=self._episodes,
            metrics=self.metrics,
            sessions=self._sessions,
        )
        self._rollouts = RolloutService(queue=rollouts, store=store, versions=self._versions, sessions=self._sessions)
        self._admin = self._admin_service() if admin_port is not None else None
        self.admin_port = admin_port
        """The real one once start() has returned."""
        self._openpi: OpenpiDoor | None = None
        if openpi_port is not None:
            keys = openpi_keys or {}
            self._openpi = OpenpiDoor(
                self._service, model.spec, keys=keys, gripper=openpi_gripper, guard=self._guard, calls=self._calls
            )
        self.openpi_port = openpi_port
        """The real one once start() has returned."""
        self._http = self._http_door() if http_port is not None else None
        self.http_port = http_port
        """The real one once start() has returned."""
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] (set at run time)
        self._servers: list[grpc.aio.Server] = []
        self._expiry: asyncio.Task
        self._started_s = time.monotonic()
        self._warm = self._is_asleep = False
        self._slept_bytes = 0
        self._bedtime = asyncio.Lock()
        self._draining = asyncio.Event()
        self._drain_ends_s = 0.0

    async def start(self) -> int:
        """Listens, NOT_SERVING yet; gives the port.  Raises CannotStart when one cannot be had."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            return await self._open_ports()
        except CannotStart:
            await asyncio.gather(*(server.stop(None) for server in self._servers))
            raise

    async def _open_ports(self) -> int:
        server = self._server(POLICY_PORT, max_request_bytes(self._model.spec))
        policy_pb2_grpc.add_PolicyServicer_to_server(self._service, server)
        rollout_pb2_grpc.add_RolloutsServicer_to_server(self._rollouts, server)
        port = await self._listen(server, self._port, POLICY, ROLLOUTS)
        if self._admin is not None and self.admin_port is not None:
            server = self._server(ADMIN_PORT, MAX_MESSAGE_BYTES)
            admin_pb2_grpc.add_AdminServicer_to_server(self._admin, server)
            session_pb2_grpc.add_SessionsServicer_to_server(self._session_service(), server)
            self.admin_port = await self._listen(server, self.admin_port, ADMIN, SESSIONS)
        if self._openpi is not None and self.openpi_port is not None:
            self.openpi_port = await self._openpi.start(self._host, self.openpi_port)
        if self._http is not None and self.http_port is not None:
            self.http_port = await self._http.start(self._host, self.http_port)
        return port

    async def warm_up(self) -> None:
        """Warms the model, then takes decisions.  Raises CannotStart when the live version cannot be built."""
        self._loop = asyncio.get_running_loop()
        self._model.watch(self._engine_gone)
        await asyncio.to_thread(self._model.warm_up)
        await asyncio.to_thread(self._versions.open)
        self._engine.start()
        self._expiry = asyncio.create_task(self._expire())
        self._warm = True
        await self._open()

    async def _open(self) -> None:
        self._service.open()
        self._rollouts.open()
        if not self._draining.is_set():
            await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def sleep(self, within_s: float) -> int:
        """NOT_SERVING, and all weights off the device, until wake(); gives how many bytes they are.

        Those at work may take within_s to end.  Raises Overloaded when that does not do, Unavailable before it is warm
        and when it drains, and then serves on.
        """
        async with self._bedtime:
            if self._is_asleep:
                return self._slept_bytes
            if not self._warm:
                raise Unavailable(WARMING, retry_after_ms=RETRY_SOON_MS)
            self._service.turn_in()
            self._rollouts.sleep()
            try:
                await self._quiet(within_s)
                self._service.sleep()
                self._is_asleep = True
                await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
                self._slept_bytes = await asyncio.to_thread(self._versions.sleep, self._model.sleep)
            except BaseException:
                self._is_asleep = False
                await self._open()
                raise
        log.info("asleep: %.1f GB of weights are off the device", self._slept_bytes / 1e9)
        return self._slept_bytes

    async def _quiet(self, within_s: float) -> None:
        """Returns when nobody is at work.  Raises Overloaded when that takes longer, Unavailable when it drains."""
        ends_s = time.monotonic() + within_s
        while not self._draining.is_set():
            at_work = self._work.leased + sum(episode.lease is None for episode in self._episodes.open)
            if not at_work:
                return
            if time.monotonic() >= ends_s:
                raise Overloaded(f"{at_work} episodes are at work, and must end first", retry_after_ms=RETRY_SOON_MS)
            await asyncio.sleep(LOOK_S)
        raise Unavailable(DRAINING)

    async def wake(self) -> None:
        """Serves again.  Raises Overloaded where the device has no room for the weights."""
        async with self._bedtime:
            if self._is_asleep:
                await asyncio.to_thread(self._versions.wake, self._model.wake)
                self._is_asleep = False
                await self._open()
                log.info("awake")

    async def drain(self, within_s: float) -> int:
        """NOT_SERVING, and no new episodes, from this moment on; gives how many are open.

        They may run to their end for so long, which a later call sets anew.
        """
        self._service.drain()
        self._rollouts.drain()
        self._drain_ends_s = time.monotonic() + within_s
        self._draining.set()
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        left = len(self._episodes.open)
        log.info("draining: %d episodes are open, and may end within %g s", left, within_s)
        return left

    async def drained(self) -> None:
        """Returns once a drain has come to its end: no episode is open, or its time is over."""
        await self._draining.wait()
        while self._episodes.open and time.monotonic() < self._drain_ends_s:
            await asyncio.sleep(LOOK_S)

    async def stop(self) -> None:
        """NOT_SERVING at once; decisions under way are answered, open episodes are closed as errors, then all ends."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._expiry.cancel()
        await self._service.stop()
        if self._openpi is not None:
            await self._openpi.stop()
        self._rollouts.stop()
        self._batcher.stop()
        await asyncio.to_thread(self._engine.join)
        await asyncio.gather(*(server.stop(grace=FLUSH_S) for server in self._servers))
        if self._http is not None:
            await self._http.stop()
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

    def status(self) -> admin_pb2.ServerStatus:
        """How the server is now."""
        state, ended, now_s = admin_pb2.SERVER_STATE_WARMING, self._episodes.ended, time.monotonic()
        if self._draining.is_set():
            state = admin_pb2.SERVER_STATE_DRAINING
        elif self._is_asleep:
            state = admin_pb2.SERVER_STATE_ASLEEP
        elif self._warm:
            state = admin_pb2.SERVER_STATE_SERVING
        return admin_pb2.ServerStatus(
            state=state,
            model=self._model.spec.model,
            live_version=self._versions.live,
            uptime_s=now_s - self._started_s,
            open_episodes=len(self._episodes.open),
            waiting=self._batcher.waiting,
            queue=self._capacity,
            successes=ended[episode_pb2.OUTCOME_SUCCESS],
            failures=ended[episode_pb2.OUTCOME_FAILURE],
            errors=ended[episode_pb2.OUTCOME_ERROR],
            drain_left_s=max(0.0, self._drain_ends_s - now_s) if self._draining.is_set() else None,
        )

    async def _expire(self) -> None:
        await asyncio.gather(self._service.expire(self._idle_s), self._rollouts.expire(), self._give_up())

    async def _give_up(self) -> None:
        """Sessions wait for no episode for ever."""
        while self._sessions is not None:
            await asyncio.sleep(min(5.0, self._session_episode_s / 4))
            await asyncio.to_thread(self._sessions.give_up, self._session_episode_s)

    def _server(self, roles: Mapping[str, Roles], most_bytes: int) -> grpc.aio.Server:
        return grpc.aio.server(
            options=[*OPTIONS, ("grpc.max_receive_message_length", most_bytes)],
            interceptors=[self._calls, *self._guard.doorkeepers(roles)],
        )

    async def _listen(self, server: grpc.aio.Server, port: int, *services: str) -> int:
        """Adds health and reflection, and gives the port."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        address, credentials = address_of(self._host, port), self._guard.server_credentials
        try:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError as error:
            raise cannot_listen(self._host, port) from error
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
            needed=self._needed_versions,
            status=self.status,
            drain=self.drain,
            sleep=self.sleep,
            wake=self.wake,
        )

    def _session_service(self) -> SessionService:
        assert self._version_store is not None
        return SessionService(
            self._sessions,
            spec=self._model.spec,
            versions=self._versions,
            version_store=self._version_store,
            store=self._store,
            prepare=self._model.prepare,
            answer=self._answer,
        )

    def _http_door(self) -> HttpDoor:
        watch = Watch(
            model=self._model.spec.model,
            camera=self._model.spec.images[0].name,
            check=self._service.check,
            batcher=self._batcher,
            episodes=self._episodes,
            store=self._store,
            versions=self._versions,
            version_store=self._version_store,
            sessions=self._sessions,
            metrics=self.metrics,
        )
        return HttpDoor(watch, self._sessions, self.metrics, guard=self._guard)

    def _together(self, versions: Collection[int]) -> bool:
        held = self._versions.held(versions)  # others come one at a time
        return held is not None and self._model.together(held)

    async def _answer(self, version: int, prepared: Any) -> DecodeAnswer:
        """A version's greedy answer, in a pass with whatever robots ask then.  Raises Refused."""
        while (ticket := self._place()) is None:
            await asyncio.sleep(LOOK_S)
        request = DecodeRequest(prepared=prepared, version=version, temperature=0.0, seed=0, decision=0)
        self._batcher.submit(ticket, request)
        try:
            return (await asyncio.wrap_future(ticket.answer)).answer
        finally:
            self._batcher.withdraw(ticket, Abandoned("nobody waits for this answer"))

    def _place(self) -> Ticket | None:
        """In the queue, where robots have left one."""
        with contextlib.suppress(Overloaded):
            return self._batcher.admit()
        return None

    def _decode(self, requests: list[DecodeRequest], lane: int) -> list[DecodeAnswer]:
        weights = [self._versions.weights(request.version) for request in requests]
        return self._model.decode(requests, weights, lane)

    def _engine_gone(self) -> None:
        self.engine_is_gone = True
        log.critical("the process that runs the model died: the server stops")
        asyncio.run_coroutine_threadsafe(self.drain(0.0), self._loop)

    def _score(self, version: int, prepared: list[Any], token_ids_BN: np.ndarray, temperature: float) -> np.ndarray:
        return self._model.score(prepared, token_ids_BN, temperature, self._versions.weights(version))

    def _build(self, folder: Path, kind: Kind) -> tuple[Any, str]:
        weights = self._model.build(folder, kind)
        return weights, self._model.fingerprint(weights)

    def _open_episodes(self) -> Counter[int]:
        """How many open episodes each version has."""
        live = self._versions.live
        return Counter(live if e.start.follow_live else e.start.version for e in self._episodes.open)

    def _pinned_versions(self) -> set[int]:
        """Those of open episodes, and of decisions under way: one that follows live may wait longer than live lasts."""
        tickets = [flight.ticket for episode in self._episodes.open for flight in list(episode.flights.values())]
        submitted = {ticket.request.version for ticket in tickets if ticket.state in ("queued", "decoding")}
        promised = self._sessions.served() if self._sessions is not None else ()
        return submitted.union(self._open_episodes(), promised)

    def _needed_versions(self) -> set[int]:
        """Those in memory, which all of open episodes are, and those that work names."""
        held = {version for version in self._versions.known if self._versions.holds(version)}
        return held.union(self._work.versions(), self._sessions.versions() if self._sessions is not None else ())

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        services = ("", POLICY, ROLLOUTS, *[ADMIN, SESSIONS] * (self._admin is not None))
        reports = [asyncio.create_task(self._health.set(service, status)) for service in services]
        await asyncio.wait(reports, timeout=REPORT_S)
