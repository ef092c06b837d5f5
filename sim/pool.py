"""A pool of supervised worker processes: started, watched, and replaced when they die or stand still.

A worker asks for one job at a time over its pipe and may have several under way.  It reports progress from the thread
that works; when none comes within the phase's deadline (a native deadlock, a stopped process), it is killed.  What a
lost worker held goes back to the queue (sim/job_queue.py), so that every job ends exactly once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from sim.job_queue import Finished, Job, JobQueue

logger = logging.getLogger(__name__)

Phase = Literal["start", "build", "step"]
Progress = Callable[[Phase], None]
BEAT_INTERVAL_S = 0.5
FALSE_STARTS = 3
DUMP_TIME_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a runner yields for a job: a value, or why it could not be done this time."""

    key: str
    value: Any = None
    error: str | None = None


Runner = Callable[[Iterator[Job], Progress], Iterable[Answer]]
"""Does the jobs of one group: draws the next one when it has room for it, calls progress often, yields each answer."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long a worker may go without progress, in seconds, before it is killed."""

    start: float = 180.0
    """from its start to its first request for work"""
    build: float = 180.0
    """while it builds what a group needs"""
    step: float = 60.0
    """between two steps of its work"""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker that was replaced."""

    pid: int
    why: str
    jobs: tuple[str, ...]
    """keys of the jobs it held"""


class PoolError(RuntimeError):
    """The pool cannot work at all: its workers die before they ask for work."""


class Retire(Exception):
    """Raised by a runner that has no job under way: this process wants to be replaced (its memory has grown)."""


class Pool:
    """`processes` workers, each with the runner that make_runner returns in its own process (spawned, so picklable).

    env is set in the children only.  A pool may run several lists of jobs one after the other; its workers live on.
    setup_s is how long it took until the first of them made a step; losses and quarantined say what went wrong.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        processes: int,
        deadlines: Deadlines | None = None,
        env: Mapping[str, str] | None = None,
        attempts: int = 3,
    ):
        self._make_runner = make_runner
        self._deadlines = deadlines or Deadlines()
        self._env = dict(env or {})
        self._attempts = attempts
        self._names = iter(range(1_000_000_000))
        self._false_starts = 0
        self.losses: list[Loss] = []
        self.quarantined: list[str] = []
        self._started = time.monotonic()
        self.setup_s = 0.0
        self._workers = [self._start() for _ in range(processes)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers as they are now."""
        return [worker.pid for worker in self._workers]

    @property
    def age_s(self) -> float:
        """Seconds since the first worker was started."""
        return time.monotonic() - self._started

    def run(self, jobs: Iterable[Job]) -> Iterator[Finished]:
        """Every job once, as it ends.  Raises PoolError when workers cannot even start."""
        queue = JobQueue(jobs, attempts=self._attempts)
        self.quarantined = queue.quarantined
        try:
            while queue.unfinished:
                self._serve_idle(queue)
                ready = set(wait([worker.pipe for worker in self._workers], timeout=self._patience_s()))
                for worker in list(self._workers):
                    if worker.pipe in ready:
                        yield from self._listen(worker, queue)
                    elif worker.overdue_s(self._deadlines) > 0:
                        yield from self._replace_silent(worker, queue)
        finally:
            if queue.unfinished:
                self.close()

    def close(self) -> None:
        """Stops the idle workers, kills the others."""
        for worker in self._workers:
            worker.dismiss()
        self._workers = []

    def _start(self) -> _Worker:
        with _environment(self._env):
            return _Worker(next(self._names), self._make_runner)

    def _patience_s(self) -> float:
        return max(0.0, min((-worker.overdue_s(self._deadlines) for worker in self._workers), default=1.0))

    def _serve_idle(self, queue: JobQueue) -> None:
        for worker in self._workers:
            if worker.idle and (job := queue.take(worker.name)):
                worker.give(job)

    def _listen(self, worker: _Worker, queue: JobQueue) -> Iterator[Finished]:
        """Handles all that the worker has said by now; its end of the pipe closes when it dies."""
        try:
            while worker.pipe.poll():
                kind, *what = worker.pipe.recv()
                worker.heard()
                if kind == "retired":
                    yield from self._replace(worker, f"retired: {what[0]}", queue)
                    return
                yield from self._handle(worker, queue, kind, *what)
        except (EOFError, OSError):
            yield from self._replace(worker, worker.cause_of_death(), queue)

    def _handle(self, worker: _Worker, queue: JobQueue, kind: str, *what: Any) -> Iterator[Finished]:
        if kind == "progress":
            worker.phase = what[0]
            if worker.phase == "step":
                self.setup_s = self.setup_s or self.age_s
        elif kind == "want" and what[0] is None:
            self._false_starts = 0
            worker.idle = True
        elif kind == "want":
            worker.give(queue.take(worker.name, what[0]))
        elif kind == "raised":
            worker.last_words = what[0]
        elif kind == "answer":
            answer: Answer = what[0]
            if answer.error is None:
                yield queue.finish(worker.name, answer.key, answer.value)
            else:
                logger.warning("%s: %s", answer.key, answer.error)
                yield from self._loudly(queue, queue.fail(worker.name, answer.key, answer.error))

    def _replace_silent(self, worker: _Worker, queue: JobQueue) -> Iterator[Finished]:
        why = f"no progress for {worker.silent_s():.0f} s in phase {worker.phase!r}"
        worker.dump_stacks()
        yield from self._replace(worker, why, queue)

    def _replace(self, worker: _Worker, why: str, queue: JobQueue) -> Iterator[Finished]:
        """Kills what is left of the worker, starts another in its place and returns its jobs to the queue."""
        worker.kill()
        held = queue.held(worker.name)
        if why.startswith("retired"):
            logger.info("worker %d %s", worker.pid, why)
        else:
            self.losses.append(Loss(pid=worker.pid, why=why, jobs=held))
            logger.error("worker %d lost: %s; it held %s", worker.pid, why, ", ".join(held) or "nothing")
        if worker.phase == "start":
            self._false_starts += 1
        if self._false_starts >= FALSE_STARTS:
            raise PoolError(f"{FALSE_STARTS} workers in a row were lost before they asked for work, the last: {why}")
        self._workers[self._workers.index(worker)] = self._start()
        yield from self._loudly(queue, queue.lose(worker.name, f"worker lost: {why}"))

    def _loudly(self, queue: JobQueue, ended: list[Finished]) -> list[Finished]:
        for item in ended:
            logger.error("ERROR %s after %d attempts: %s", item.job.key, item.attempts, item.error)
        return ended


@dataclass(eq=False)
class _Worker:
    """The parent's view of one process."""

    name: int
    make_runner: Callable[[], Runner]
    phase: Phase = "start"
    idle: bool = False
    """it waits for a job and may wait for ever"""
    last_words: str = ""
    last_heard: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.make_runner), name=f"sim-worker-{self.name}", daemon=True
        )
        self.process.start()
        theirs.close()  # so that the worker's death closes the pipe
        assert self.process.pid is not None
        self.pid = self.process.pid

    def heard(self) -> None:
        self.last_heard = time.monotonic()

    def silent_s(self) -> float:
        return time.monotonic() - self.last_heard

    def overdue_s(self, deadlines: Deadlines) -> float:
        """Seconds past its deadline; negative while there is time."""
        allowed = 3600.0 if self.idle else getattr(deadlines, self.phase)
        return (0.0 if self.idle else self.silent_s()) - allowed

    def give(self, job: Job | None) -> None:
        """Answers its request; None ends its group."""
        if self.idle:
            self.idle, self.phase = False, "build"
        self.heard()
        with contextlib.suppress(OSError):  # it died meanwhile: the next look at its pipe finds out
            self.pipe.send(job)

    def dump_stacks(self) -> None:
        """Has the hung process write where it stands to stderr, if it still can."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
        self.process.join(DUMP_TIME_S)

    def cause_of_death(self) -> str:
        self.process.join(5.0)
        code = self.process.exitcode
        if self.last_words:
            return self.last_words
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def dismiss(self) -> None:
        """Lets an idle worker end by itself; kills any other."""
        if self.idle:
            self.give(None)
            self.process.join(5.0)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside; libraries read them at import, before any code of ours runs."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(pipe: Connection, make_runner: Callable[[], Runner]) -> None:
    """A worker's life: ask for a job, run its group, ask again; ends when the parent says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_die_with_parent, name="parent", daemon=True).start()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    line = _Line(pipe)
    try:
        runner = make_runner()
        while (first := line.ask(None)) is not None:
            for answer in runner(line.jobs(first), line.progress):
                line.say("answer", answer)
    except Retire as reason:
        line.say("retired", str(reason))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException as error:
        line.say("raised", f"{type(error).__name__}: {error}")
        raise


def _die_with_parent() -> None:
    """Ends this process when its parent is gone, however it went and whatever is waited for here."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Line:
    """The worker's end of its pipe."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._phase: Phase = "start"
        self._said_at = 0.0

    def say(self, *message: Any) -> None:
        self._pipe.send(message)
        self._said_at = time.monotonic()

    def ask(self, group: str | None) -> Job | None:
        self.say("want", group)
        return self._pipe.recv()

    def jobs(self, first: Job) -> Iterator[Job]:
        self._phase = "build"
        job: Job | None = first
        while job is not None:
            yield job
            job = self.ask(first.group)

    def progress(self, phase: Phase) -> None:
        """Says that the work goes on; cheap enough to be called at every step."""
        if phase != self._phase or time.monotonic() - self._said_at > BEAT_INTERVAL_S:
            self._phase = phase
            self.say("progress", phase)
