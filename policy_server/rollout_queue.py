"""Work and who has it: a rollout waits, is leased to a worker, and ends once, as done or set aside.

    waiting ──lease──▶ leased ──claim──▶ closing ──complete──▶ done
       ▲                  │                 │
       ╰─────expiry, error┴────────────error┴──third error──▶ set aside

Delivery is at least once: a lease that is not renewed in time goes back to the queue, and its worker may yet finish.  A
rollout counts once: the first episode of it that ends well claims it, from the queue or from whoever has it by then.
Nothing here knows the network or the disk.  Lives on the event loop's thread.
"""

from __future__ import annotations

import bisect
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from protos.rollout_pb2 import QueueStatus, Rollout, SetAside

ATTEMPTS = 3
"""So many episodes of a rollout may end as errors before it is set aside."""
DEFAULT_LEASE_S = 30.0
HEARD_S = 60.0
"""A worker that was silent for longer is not counted, nor is what it holds."""
MAX_WORKERS = 500
"""So many are remembered; of more, those that were heard last."""
MAX_ERROR = 1000
"""Characters that are remembered of what went wrong."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lease:
    """A rollout in a worker's hands.  Its episode keeps the lease to the end, even when it is lost."""

    lease_id: str
    rollout: Rollout
    worker: str


@dataclass(eq=False, kw_only=True)
class _Outstanding:
    """A rollout that has not ended.  It waits while it has no holder."""

    rollout: Rollout
    order: int
    """of enqueueing; kept when it comes back"""
    holder: Lease | None = None
    closing: bool = False
    """the holder's episode ended well and is being stored"""
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Worker:
    heard_s: float
    holds: frozenset[str]


class RolloutQueue:
    """done: rollouts that were counted before.  A lease lasts lease_s, by now(), from when it was given or renewed."""

    def __init__(
        self,
        *,
        done: Iterable[str] = (),
        lease_s: float = DEFAULT_LEASE_S,
        now: Callable[[], float] = time.monotonic,
    ):
        self.lease_s = lease_s
        self._now = now
        self._orders = itertools.count()
        self._outstanding: dict[str, _Outstanding] = {}
        self._waiting: dict[str, list[_Outstanding]] = {}
        """by task, in order of enqueueing; no task without a rollout"""
        self._held: dict[str, tuple[Lease, float]] = {}
        """by lease id: when it expires, the next one first"""
        self._done: dict[str, set[str]] = {}
        """by run: rollout ids"""
        self._set_aside: dict[str, SetAside] = {}
        self._workers: dict[str, _Worker] = {}
        """by name, who was heard last comes last"""
        for rollout_id in done:
            self._count(rollout_id)

    def enqueue(self, rollouts: Iterable[Rollout]) -> int:
        """How many were new; what is known already, whatever became of it, is left as it is."""
        new = 0
        for rollout in rollouts:
            if not self._knows(rollout.rollout_id):
                entry = _Outstanding(rollout=rollout, order=next(self._orders))
                self._outstanding[rollout.rollout_id] = entry
                self._put_back(entry)
                new += 1
        return new

    def lease(
        self, worker: str, can_run: Iterable[str], *, holds: Iterable[str] = (), only_held: bool = False
    ) -> Lease | None:
        """Work for a worker; None when there is none that it can run.

        First of the tasks it holds, then of those with the fewest other workers on them, then in order of enqueueing.
        """
        self.expire()
        able, held = frozenset(can_run), frozenset(holds)
        self._hear(worker, held)
        tasks = {task for task in self._waiting if _fits(task, able) and (task in held or not only_held)}
        if not tasks:
            return None
        elsewhere = self._elsewhere(worker, tasks)
        task = min(tasks, key=lambda task: (task not in held, elsewhere[task], self._waiting[task][0].order))
        entry = self._waiting[task][0]
        self._take_out(entry)
        lease = Lease(lease_id=secrets.token_hex(8), rollout=entry.rollout, worker=worker)
        entry.holder = lease
        self._held[lease.lease_id] = lease, self._now() + self.lease_s
        return lease

    @property
    def outstanding(self) -> int:
        """Rollouts that have not ended."""
        return len(self._outstanding)

    @property
    def leased(self) -> int:
        """Rollouts that workers hold."""
        self.expire()
        return len(self._held)

    def versions(self) -> set[int]:
        """The weights that those have named.  May be called from any thread."""
        entries = list(self._outstanding.values())
        return {entry.rollout.version for entry in entries if entry.rollout.HasField("version")}

    def find(self, lease_id: str) -> Lease | None:
        """The lease, while it is held."""
        self.expire()
        lease, _ = self._held.get(lease_id, (None, 0.0))
        return lease

    def renew(self, lease_id: str) -> bool:
        """False when the lease was lost."""
        lease = self.find(lease_id)
        if lease is None:
            return False
        del self._held[lease_id]  # it expires last now
        self._held[lease_id] = lease, self._now() + self.lease_s
        known = self._workers.get(lease.worker)
        self._hear(lease.worker, known.holds if known is not None else frozenset())
        return True

    def give_back(self, lease_id: str, error: str) -> None:
        """The worker will not run it; with an error, that was an attempt.  A lease that is lost is nobody's to give."""
        lease = self.find(lease_id)
        if lease is None:
            return
        if error:
            self.fail(lease, error)
        else:
            entry = self._outstanding[lease.rollout.rollout_id]
            self._take_out(entry)
            self._put_back(entry)

    def forget_silent(self) -> None:
        """Drops what is known of workers that are not heard of any more."""
        self._heard()

    def expire(self) -> None:
        """Takes back what was not renewed in time."""
        while self._held:
            lease, expires_s = next(iter(self._held.values()))
            if self._now() < expires_s:
                return
            entry = self._outstanding[lease.rollout.rollout_id]
            self._take_out(entry)
            self._put_back(entry)

    def claim(self, lease: Lease) -> bool:
        """Whether the lease's episode, which ended well, is the one that counts; complete() or fail() must follow then.

        A lost lease may claim what is waiting, or what another worker has: that one loses its lease.
        """
        entry = self._entry(lease)
        if entry is None or entry.closing:
            return False
        self._take_out(entry)
        entry.holder, entry.closing = lease, True
        return True

    def complete(self, lease: Lease) -> None:
        """The claimed rollout's episode is stored: it is done."""
        del self._outstanding[lease.rollout.rollout_id]
        self._count(lease.rollout.rollout_id)

    def fail(self, lease: Lease, why: str) -> None:
        """An episode of the rollout ended as an error.  Another worker that has the rollout by now keeps it."""
        entry = self._entry(lease)
        if entry is None:
            return
        entry.errors.append(why[:MAX_ERROR])
        if entry.holder is lease or entry.holder is None:
            self._take_out(entry)
            self._put_back(entry)

    def cancel(self, run: str) -> int:
        """Forgets the run's rollouts but those that are done (they count once, for ever); how many had not ended."""
        entries = [entry for entry in self._of(run) if not entry.closing]
        for entry in entries:
            self._take_out(entry)
            del self._outstanding[entry.rollout.rollout_id]
        self._set_aside = {name: aside for name, aside in self._set_aside.items() if run_of(name) != run}
        return len(entries)

    def uncount(self, rollout_id: str) -> None:
        """The episode that counted cannot be read: its rollout may be enqueued again."""
        self._done.get(run_of(rollout_id), set()).discard(rollout_id)

    def status(self, run: str = "") -> QueueStatus:
        """What became of a run's rollouts, or of all."""
        self.expire()
        entries = self._of(run)
        waiting = sum(entry.holder is None for entry in entries)
        return QueueStatus(
            waiting=waiting,
            leased=len(entries) - waiting,
            done=sum(len(ids) for name, ids in self._done.items() if run in ("", name)),
            set_aside=[aside for name, aside in self._set_aside.items() if run in ("", run_of(name))],
            workers=sorted(self._heard()),
        )

    def _knows(self, rollout_id: str) -> bool:
        done = self._done.get(run_of(rollout_id), ())
        return rollout_id in self._outstanding or rollout_id in self._set_aside or rollout_id in done

    def _of(self, run: str) -> list[_Outstanding]:
        return [entry for name, entry in self._outstanding.items() if run in ("", run_of(name))]

    def _entry(self, lease: Lease) -> _Outstanding | None:
        entry = self._outstanding.get(lease.rollout.rollout_id)
        # One of the same name that was enqueued after a cancel is another rollout.
        return entry if entry is not None and entry.rollout is lease.rollout else None

    def _take_out(self, entry: _Outstanding) -> None:
        if entry.holder is not None:
            self._held.pop(entry.holder.lease_id, None)
            return
        task = entry.rollout.task
        self._waiting[task].remove(entry)
        if not self._waiting[task]:
            del self._waiting[task]

    def _put_back(self, entry: _Outstanding) -> None:
        entry.holder, entry.closing = None, False
        if len(entry.errors) < ATTEMPTS:
            bisect.insort(self._waiting.setdefault(entry.rollout.task, []), entry, key=lambda entry: entry.order)
            return
        del self._outstanding[entry.rollout.rollout_id]
        self._set_aside[entry.rollout.rollout_id] = SetAside(rollout=entry.rollout, errors=entry.errors)

    def _count(self, rollout_id: str) -> None:
        self._done.setdefault(run_of(rollout_id), set()).add(rollout_id)

    def _hear(self, worker: str, holds: frozenset[str]) -> None:
        self._workers.pop(worker, None)
        self._workers[worker] = _Worker(self._now(), holds)
        if len(self._workers) > MAX_WORKERS:
            del self._workers[next(iter(self._workers))]

    def _heard(self) -> dict[str, _Worker]:
        since_s = self._now() - HEARD_S
        self._workers = {name: worker for name, worker in self._workers.items() if worker.heard_s >= since_s}
        return self._workers

    def _elsewhere(self, worker: str, tasks: Set[str]) -> Counter[str]:
        """How many other workers are on each of the tasks: they hold its scene, or run a rollout of it."""
        on = {name: {*other.holds & tasks} for name, other in self._heard().items()}
        for lease, _ in self._held.values():
            on.setdefault(lease.worker, set()).add(lease.rollout.task)
        on.pop(worker, None)
        return Counter(itertools.chain.from_iterable(on.values()))


def run_of(rollout_id: str) -> str:
    """The run that a rollout belongs to."""
    return rollout_id.partition("/")[0]


def _fits(task: str, able: frozenset[str]) -> bool:
    """Whether the task is named, or its suite, which is what comes before its first "/", as "suite/*"."""
    suite, slash, _ = task.partition("/")
    return task in able or (slash != "" and f"{suite}/*" in able)
