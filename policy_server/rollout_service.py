"""The Rollouts service: work goes out as leases, experience comes back as episodes.

Everything but the disk happens on the event loop's thread.  Calls that wait for work are served together, so that a
rollout goes to a worker that holds its task, not to the one that happened to ask first.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from policy_server.episode_store import EpisodeStore, Stored
from policy_server.errors import BadRequest, OutOfOrder, Overloaded, TooSlow, Unavailable
from policy_server.observation import check_name, check_names, check_sampling
from policy_server.refusals import DRAINING, RETRY_SOON_MS, STOPPING, Door, refusing
from policy_server.rollout_queue import Lease, RolloutQueue, run_of
from policy_server.sessions import NO_SESSIONS, Sessions
from policy_server.versions import Versions
from protos import episode_pb2, rollout_pb2, rollout_pb2_grpc
from protos.episode_file import DamagedEpisode

MAX_WAIT_S = 30.0
"""A call waits no longer for work, whatever it asks: a worker is heard of between calls."""
TICK_S = 1.0
"""How soon work that has come back is handed to a call that waits."""
MAX_OUTSTANDING = 100_000
"""Rollouts that have not ended, of all runs together."""
MAX_TASKS = 1000
"""Tasks that a worker may name."""
MAX_READERS = 16
"""Streams of episodes at once: each holds an episode in memory."""
READ_S = 30.0
"""How long a part of a stream may wait for its reader to take it."""
FULL_RETRY_MS = 10_000
PURPOSES = (episode_pb2.PURPOSE_TRAIN, episode_pb2.PURPOSE_EVALUATE)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call for work, which may wait for some."""

    worker: str
    can_run: frozenset[str]
    holds: frozenset[str]
    only_held: bool
    lease: asyncio.Future[Lease]


class RolloutService(rollout_pb2_grpc.RolloutsServicer):
    """Without a store there is nowhere to keep what a rollout gives, and so no work."""

    def __init__(
        self,
        *,
        queue: RolloutQueue,
        store: EpisodeStore | None,
        versions: Versions,
        sessions: Sessions | None = None,
    ):
        self._queue = queue
        self._store = store
        self._versions = versions
        self._sessions = sessions
        self._door = Door()
        self._asleep = False
        self._stopping = asyncio.Event()
        self._readers = 0
        self._waiting: list[_Call] = []

    def open(self) -> None:
        """From now on work is taken and handed out."""
        self._door.open()
        self._asleep = False
        self._hand_out()

    def sleep(self) -> None:
        """Work is taken, but none is handed out until open()."""
        self._asleep = True

    def drain(self, because: str = DRAINING) -> None:
        """No more work, neither in nor out."""
        self._door.close(because)
        for call in self._waiting:
            if not call.lease.done():
                call.lease.set_exception(Unavailable(because, retry_after_ms=RETRY_SOON_MS))

    def stop(self) -> None:
        """Streams end when they have sent what is finished by now."""
        self.drain(STOPPING)
        self._stopping.set()

    async def expire(self) -> None:
        """Takes back what is not renewed in time and hands it to those that wait; runs until cancelled."""
        while True:
            await asyncio.sleep(min(TICK_S, self._queue.lease_s / 4))
            self._queue.expire()
            self._queue.forget_silent()
            self._hand_out()

    @refusing
    async def EnqueueRollouts(
        self, request: rollout_pb2.EnqueueRolloutsRequest, context: Any
    ) -> rollout_pb2.EnqueueRolloutsReply:
        self._door.check()
        self._need_store().check_room()
        if self._queue.outstanding + len(request.rollouts) > MAX_OUTSTANDING:
            raise Overloaded(
                f"at most {MAX_OUTSTANDING} rollouts may be outstanding; {self._queue.outstanding} are, and"
                f" {len(request.rollouts)} more were asked for",
                retry_after_ms=FULL_RETRY_MS,
            )
        for index, rollout in enumerate(request.rollouts):
            self._check(rollout, f"rollouts[{index}]")
        added = self._queue.enqueue(request.rollouts)
        self._hand_out()
        return rollout_pb2.EnqueueRolloutsReply(added=added)

    @refusing
    async def CancelRollouts(
        self, request: rollout_pb2.CancelRolloutsRequest, context: Any
    ) -> rollout_pb2.CancelRolloutsReply:
        if not request.run:
            raise BadRequest("must name a run, got ''", field="run")
        return rollout_pb2.CancelRolloutsReply(cancelled=self._queue.cancel(request.run))

    @refusing
    async def GetQueue(self, request: rollout_pb2.GetQueueRequest, context: Any) -> rollout_pb2.QueueStatus:
        return self._queue.status(request.run)

    @refusing
    async def LeaseRollout(
        self, request: rollout_pb2.LeaseRolloutRequest, context: Any
    ) -> rollout_pb2.LeaseRolloutReply:
        self._door.check()
        self._need_store().check_room()
        if not request.worker:
            raise BadRequest("must be the worker's name, got ''", field="worker")
        if not request.can_run:
            raise BadRequest('must name tasks, or suites as "libero_object/*", got none', field="can_run")
        check_names(request, "worker")
        for name, tasks in (("can_run", request.can_run), ("holds", request.holds)):
            if len(tasks) > MAX_TASKS:
                raise BadRequest(f"must be at most {MAX_TASKS}, got {len(tasks)}", field=name)
            for index, task in enumerate(tasks):
                check_name(task, field=f"{name}[{index}]")
        call = _Call(
            request.worker,
            frozenset(request.can_run),
            frozenset(request.holds),
            request.only_held,
            asyncio.get_running_loop().create_future(),
        )
        lease = self._lease(call) or await self._wait(call, min(request.wait_ms / 1e3, MAX_WAIT_S))
        if lease is None:
            return rollout_pb2.LeaseRolloutReply()
        return rollout_pb2.LeaseRolloutReply(
            rollout=lease.rollout, lease_id=lease.lease_id, lease_ms=round(1e3 * self._queue.lease_s)
        )

    @refusing
    async def RenewLease(self, request: rollout_pb2.RenewLeaseRequest, context: Any) -> rollout_pb2.RenewLeaseReply:
        return rollout_pb2.RenewLeaseReply(held=self._queue.renew(request.lease_id))

    @refusing
    async def ReturnLease(self, request: rollout_pb2.ReturnLeaseRequest, context: Any) -> rollout_pb2.ReturnLeaseReply:
        self._queue.give_back(request.lease_id, request.error)
        self._hand_out()
        return rollout_pb2.ReturnLeaseReply()

    @refusing
    async def StreamEpisodes(self, request: rollout_pb2.StreamEpisodesRequest, context: Any) -> None:
        store = self._need_store()
        if self._readers >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} streams of episodes are open, the most", retry_after_ms=FULL_RETRY_MS)
        cursor = request.cursor
        stopping = asyncio.create_task(self._stopping.wait())
        self._readers += 1
        try:
            while True:
                for stored in store.after(cursor):
                    if stored.damaged or _is_asked_for(stored, request):
                        await self._send(store, stored, context)
                    cursor = stored.sequence
                await _write(context, rollout_pb2.EpisodePart(sequence=cursor))
                if not request.follow or stopping.done():
                    return
                newer = asyncio.wrap_future(store.beyond(cursor))
                try:
                    await asyncio.wait({newer, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    newer.cancel()
        finally:
            self._readers -= 1
            stopping.cancel()

    @refusing
    async def CommitCursor(
        self, request: rollout_pb2.CommitCursorRequest, context: Any
    ) -> rollout_pb2.CommitCursorReply:
        store = self._need_store()
        if not request.reader:
            raise BadRequest("must be the reader's name, got ''", field="reader")
        check_names(request, "reader")
        if request.leave:
            await asyncio.to_thread(store.leave, request.reader)
        else:
            await asyncio.to_thread(store.commit, request.reader, request.cursor)
        return rollout_pb2.CommitCursorReply()

    async def _send(self, store: EpisodeStore, stored: Stored, context: Any) -> None:
        """One episode, record by record; one that cannot be read may be asked for again."""
        try:
            records = await asyncio.to_thread(store.records, stored)
        except DamagedEpisode as error:
            self._queue.uncount(stored.rollout_id)
            await _write(context, rollout_pb2.EpisodePart(sequence=stored.sequence, damaged=str(error)))
            return
        while (record := await asyncio.to_thread(next, records, None)) is not None:
            await _write(context, rollout_pb2.EpisodePart(sequence=stored.sequence, record=record))

    def _lease(self, call: _Call, *, only_held: bool = False) -> Lease | None:
        if self._asleep:
            return None
        return self._queue.lease(call.worker, call.can_run, holds=call.holds, only_held=only_held or call.only_held)

    async def _wait(self, call: _Call, within_s: float) -> Lease | None:
        """Work as soon as there is some; None when there is none within_s."""
        self._waiting.append(call)
        try:
            return await asyncio.wait_for(call.lease, within_s)
        except asyncio.TimeoutError:
            return None
        finally:
            self._waiting.remove(call)

    def _hand_out(self) -> None:
        """Gives what waits in the queue to the calls that wait for it, first to workers that hold its task."""
        if not self._waiting:
            return
        try:
            self._need_store().check_room()
        except Overloaded:  # an episode that could not be stored would be an attempt of its rollout
            return
        for only_held in (True, False):
            for call in self._waiting:
                if not call.lease.done() and (lease := self._lease(call, only_held=only_held)):
                    call.lease.set_result(lease)

    def _need_store(self) -> EpisodeStore:
        if self._store is None:
            raise OutOfOrder("this server keeps no episodes, so it takes no work: start it with --episodes DIR")
        return self._store

    def _check(self, rollout: rollout_pb2.Rollout, field: str) -> None:
        for name in ("rollout_id", "task"):
            if not getattr(rollout, name):
                raise BadRequest("must not be empty, got ''", field=f"{field}.{name}")
        check_names(rollout, "rollout_id", "task", "initial_state", "session_id", field=f"{field}.")
        if rollout.session_id and (rollout.purpose != episode_pb2.PURPOSE_TRAIN or rollout.HasField("version")):
            raise BadRequest(
                "practice for a session must be PURPOSE_TRAIN and name no version, the session does",
                field=f"{field}.session_id",
            )
        if rollout.session_id:
            if self._sessions is None:
                raise OutOfOrder(NO_SESSIONS, field=f"{field}.session_id")
            self._sessions.check(rollout.session_id, field=f"{field}.session_id")
        if rollout.purpose not in PURPOSES:
            raise BadRequest(
                f"must be PURPOSE_TRAIN or PURPOSE_EVALUATE, got code {rollout.purpose}", field=f"{field}.purpose"
            )
        check_sampling(rollout.temperature, rollout.noise_correlation, field=f"{field}.")
        if rollout.HasField("version"):
            self._versions.check(rollout.version, field=f"{field}.version")


def _is_asked_for(stored: Stored, request: rollout_pb2.StreamEpisodesRequest) -> bool:
    return request.run in ("", run_of(stored.rollout_id)) and request.session_id in ("", stored.session_id)


async def _write(context: Any, part: rollout_pb2.EpisodePart) -> None:
    """Returns when the connection has taken the part.  Raises TooSlow when that takes too long."""
    writing = asyncio.ensure_future(context.write(part))
    try:
        if not (await asyncio.wait({writing}, timeout=READ_S))[0]:
            raise TooSlow(f"parts must be read within {READ_S:g} s, and were not")
        writing.result()
    finally:
        writing.cancel()
