"""Jobs that each end exactly once, whoever dies on the way: what to hand out, what to try again, what to set aside.

Jobs of one group (a task, whose scene costs seconds to build) go to few workers.  When a worker is lost, every job it
held is a suspect: it is tried again alone, so that a job that kills its worker takes no neighbour with it.  A job that
has failed `attempts` times ends as an error; a group in which `attempts + 1` failures follow each other without one
job finishing is quarantined: its waiting jobs end as errors too.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work for a worker process."""

    key: str
    """unique among the jobs of a run"""
    group: str
    """what a worker must hold to do it; jobs of one group are handed out together"""
    payload: Any
    """what the worker's runner needs (picklable, small)"""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a job ended: with a value, or with an error after its last attempt."""

    job: Job
    value: Any = None
    """what the runner answered; None for an error"""
    error: str | None = None
    """why it could not be done; None when it was"""
    attempts: int
    """how often it was handed out"""


class JobQueue:
    """The jobs of one run.  Workers are named by an integer that is never used again for another process."""

    def __init__(self, jobs: Iterable[Job], *, attempts: int = 3, worth_joining: int = 4):
        """worth_joining: how many jobs must wait in a group for a second worker to join the one that holds it."""
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[str, deque[str]] = defaultdict(deque)
        self._suspects: dict[str, deque[str]] = defaultdict(deque)
        for job in jobs:
            if job.key in self._jobs:
                raise ValueError(f"keys of jobs must be unique, got {job.key!r} twice")
            self._jobs[job.key] = job
            self._waiting[job.group].append(job.key)
        self._held: dict[int, list[str]] = defaultdict(list)
        self._group: dict[int, str] = {}
        self._failures: Counter[str] = Counter()
        self._failures_in_a_row: Counter[str] = Counter()
        self._attempts = attempts
        self._worth_joining = worth_joining
        self.unfinished = len(self._jobs)
        self.quarantined: list[str] = []

    def take(self, worker: int, group: str | None = None) -> Job | None:
        """The worker's next job in the group; without a group, of the one it held last or of the best other one.

        None: nothing for it there now.  A worker that holds a suspect gets nothing beside it.
        """
        held = self._held[worker]
        if any(self._failures[key] for key in held):
            return None
        group = group or self._best_group(worker)
        if group is None:
            return None
        if self._suspects[group] and not held:
            key = self._suspects[group].popleft()
        elif self._waiting[group]:
            key = self._waiting[group].popleft()
        else:
            return None
        held.append(key)
        self._group[worker] = group
        return self._jobs[key]

    def finish(self, worker: int, key: str, value: Any) -> Finished:
        """The worker did the job.  Raises KeyError when it does not hold it."""
        job = self._release(worker, key)
        self._failures_in_a_row[job.group] = 0
        self.unfinished -= 1
        return Finished(job=job, value=value, attempts=self._failures[key] + 1)

    def fail(self, worker: int, key: str, why: str) -> list[Finished]:
        """The worker could not do the job: it is tried again, or ends as an error.  Raises KeyError as finish does."""
        job = self._release(worker, key)
        ended = self._strike(job, why, self._waiting)
        if ended:
            self._failures_in_a_row[job.group] += 1
        return ended + self._quarantine(job.group, why)

    def lose(self, worker: int, why: str) -> list[Finished]:
        """The worker is gone: what it held is tried again, each job alone, or ends as an error."""
        keys = self._held.pop(worker, [])
        self._group.pop(worker, None)
        ended = [item for key in keys for item in self._strike(self._jobs[key], why, self._suspects)]
        if not keys:
            return ended
        group = self._jobs[keys[0]].group
        self._failures_in_a_row[group] += 1
        return ended + self._quarantine(group, why)

    def held(self, worker: int) -> tuple[str, ...]:
        """Keys of the jobs that the worker has been given and not yet returned."""
        return tuple(self._held[worker])

    def _best_group(self, worker: int) -> str | None:
        pending = {group: self._pending(group) for group in self._waiting if self._pending(group)}
        own = self._group.get(worker)
        if own in pending:
            return own
        taken = {self._group[other] for other, keys in self._held.items() if keys and other != worker}
        free = {group: count for group, count in pending.items() if group not in taken}
        shared = {group: count for group, count in pending.items() if count >= self._worth_joining}
        choices = free or shared
        return max(choices, key=choices.__getitem__, default=None)

    def _pending(self, group: str) -> int:
        return len(self._waiting[group]) + len(self._suspects[group])

    def _release(self, worker: int, key: str) -> Job:
        if key not in self._held[worker]:
            raise KeyError(f"worker {worker} returned job {key!r}, it holds {self._held[worker]}")
        self._held[worker].remove(key)
        return self._jobs[key]

    def _strike(self, job: Job, why: str, again: dict[str, deque[str]]) -> list[Finished]:
        self._failures[job.key] += 1
        if self._failures[job.key] < self._attempts and job.group not in self.quarantined:
            again[job.group].append(job.key)
            return []
        return [self._error(job, why)]

    def _quarantine(self, group: str, why: str) -> list[Finished]:
        if self._failures_in_a_row[group] <= self._attempts or group in self.quarantined:
            return []
        self.quarantined.append(group)
        keys = [*self._waiting[group], *self._suspects[group]]
        self._waiting[group].clear()
        self._suspects[group].clear()
        why = f"{group} is quarantined after {self._failures_in_a_row[group]} failures in a row, the last: {why}"
        return [self._error(self._jobs[key], why) for key in keys]

    def _error(self, job: Job, why: str) -> Finished:
        self.unfinished -= 1
        return Finished(job=job, error=why, attempts=self._failures[job.key])
