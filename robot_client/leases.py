"""Work from the policy server's rollout queue: a lease is taken, kept by a thread, and let go with its episode."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import grpc

from protos import episode_pb2, rollout_pb2, rollout_pb2_grpc
from protos.channel import Credentials, dial
from robot_client.arm import Task
from robot_client.errors import PolicyError, looked_into, of_rpc
from robot_client.rollout import EpisodeResult, Purpose, Rollout

log = logging.getLogger(__name__)

RENEWALS = 3
"""How often a lease is renewed within its time: two calls may be lost."""
WAIT_S = 2.0
"""How long one call waits for work."""
PURPOSES: dict[episode_pb2.Purpose, Purpose] = {
    episode_pb2.PURPOSE_TRAIN: "train",
    episode_pb2.PURPOSE_EVALUATE: "evaluate",
}


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One rollout to run; StartEpisode is given its id, and the server then knows the rest."""

    lease_id: str
    rollout: rollout_pb2.Rollout

    @property
    def purpose(self) -> Purpose:
        return PURPOSES[self.rollout.purpose]

    def rollout_of(self, task: Task) -> Rollout:
        """The work in the client's words.  task: of the leased name and initial state, as this arm knows it."""
        return Rollout(
            task=task,
            purpose=self.purpose,
            temperature=self.rollout.temperature,
            noise_correlation=self.rollout.noise_correlation,
            lease_id=self.lease_id,
        )


def worker_name() -> str:
    """This process's own."""
    return f"{socket.gethostname()}-{os.getpid()}"


class Leases:
    """The leases of one worker at HOST:PORT.  take() may raise a PolicyError; a lease that is lost is logged.

    worker: a name of its own.  can_run: tasks, or suites as "libero_object/*".
    """

    def __init__(
        self,
        address: str,
        *,
        worker: str,
        can_run: Sequence[str],
        credentials: Credentials | None = None,
        deadline_s: float = 10.0,
    ):
        self._address, self._worker, self._can_run = address, worker, tuple(can_run)
        self._credentials, self._deadline_s = credentials, deadline_s
        self._channel = dial(address, credentials)
        self._stub = rollout_pb2_grpc.RolloutsStub(self._channel)
        self._held: set[str] = set()
        self._lease_s = 1.0
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="leases", daemon=True)
        self._keeper.start()

    def take(self, *, holds: Sequence[str] = (), only_held: bool = False, wait_s: float = 0.0) -> Lease | None:
        """A rollout, preferably of a task in `holds` (with only_held: of no other); None when none came in wait_s."""
        request = rollout_pb2.LeaseRolloutRequest(
            worker=self._worker,
            can_run=self._can_run,
            holds=holds,
            only_held=only_held,
            wait_ms=round(1e3 * wait_s),
        )
        try:
            reply = self._stub.LeaseRollout(request, timeout=self._deadline_s + wait_s)
        except grpc.RpcError as failure:
            raise looked_into(of_rpc(failure, self._address), self._address, self._credentials) from None
        if not reply.HasField("rollout"):
            return None
        self._lease_s = reply.lease_ms / 1e3
        self._held.add(reply.lease_id)
        return Lease(lease_id=reply.lease_id, rollout=reply.rollout)

    def await_one(self, *, holds: Sequence[str] = ()) -> Lease | None:
        """Like take(); None, after WAIT_S, also when the server cannot be asked, which is logged."""
        try:
            return self.take(holds=holds, wait_s=WAIT_S)
        except PolicyError as error:
            log.warning("no work: %s", error)
            time.sleep(WAIT_S)
            return None

    def rollouts(self, tasks: Sequence[Task]) -> Iterator[Rollout]:
        """Work of these tasks, one after another as it is asked for; waits for it as long as need be."""
        by_name = {task.name: task for task in tasks}
        while True:
            if (lease := self.await_one()) is not None:
                yield lease.rollout_of(replace(by_name[lease.rollout.task], initial_state=lease.rollout.initial_state))

    def settle(self, result: EpisodeResult, *, worker_failed: bool = False) -> None:
        """The rollout of a lease has ended: what never became an episode goes back to the queue.

        worker_failed: through no fault of the rollout, which is therefore not held against it.
        """
        if result.episode_id:
            self.let_go(result.rollout.lease_id)
        else:
            self.give_back(result.rollout.lease_id, "" if worker_failed else result.message)

    def let_go(self, lease_id: str) -> None:
        """Its episode has ended: it is renewed no more."""
        self._held.discard(lease_id)

    def give_back(self, lease_id: str, error: str = "") -> None:
        """No episode of it was started: it goes back to the queue, with an error as a failed attempt."""
        self.let_go(lease_id)
        request = rollout_pb2.ReturnLeaseRequest(lease_id=lease_id, error=error)
        try:
            self._stub.ReturnLease(request, timeout=self._deadline_s)
        except grpc.RpcError as failure:
            log.warning("lease %s was not given back: %s", lease_id, of_rpc(failure, self._address))

    def give_back_all(self, error: str = "") -> None:
        """Whatever is held; what an episode was started of is the server's to judge already."""
        for lease_id in list(self._held):
            self.give_back(lease_id, error)

    def close(self) -> None:
        """Renews no more leases; what is held goes back to the queue when its time is over."""
        self._closed.set()
        self._keeper.join()
        self._channel.close()

    def _keep(self) -> None:
        while not self._closed.wait(self._lease_s / RENEWALS):
            for lease_id in list(self._held):
                self._renew(lease_id)

    def _renew(self, lease_id: str) -> None:
        request = rollout_pb2.RenewLeaseRequest(lease_id=lease_id)
        try:
            held = self._stub.RenewLease(request, timeout=self._lease_s / RENEWALS).held
        except grpc.RpcError as failure:
            log.warning("lease %s was not renewed: %s", lease_id, of_rpc(failure, self._address))
            return
        if not held and lease_id in self._held:
            log.warning("lease %s was lost: its episode will not count", lease_id)
            self.let_go(lease_id)
