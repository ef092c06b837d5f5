"""From single requests to batches: a bounded queue between the network and the engine.

A ticket holds one place in the queue from admission, through preparation, to its answer:

    admit -> (prepare) -> submit -> next_batch -> resolve
                 └────────────┴─> withdraw: superseded, abandoned, or found bad
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from policy_server.errors import NoNumber, Overloaded, Refused


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One decision for the model: nothing of the network is left in it."""

    prepared: Any
    """What the policy's prepare() made of the observation."""
    version: int
    temperature: float
    """0 is greedy."""
    noise_correlation: float = 0.0
    """Between the ticks of a chunk, in [0, 1)."""
    seed: int
    decision: int
    """The random stream of the answer is a function of (seed, decision)."""


@dataclass(frozen=True, kw_only=True)
class DecodeAnswer:
    """The model's answer to one DecodeRequest."""

    actions_KA: np.ndarray
    """float32 (K, A), in the units of PolicySpec.action."""
    token_ids_N: np.ndarray
    """int32 (N,), N = K * A."""
    token_logprobs_N: np.ndarray
    """float32 (N,), natural logarithms."""
    vision_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer and how it was served."""

    answer: DecodeAnswer
    version: int
    """The weights that computed it."""
    queue_ms: float
    batch_size: int


@dataclass(eq=False)
class Ticket:
    """One place in the queue.  `answer` resolves to Answered, or to the Refused that took the place away.

    Who waits for it may be cancelled; the answer cannot be, withdraw() takes it back.
    """

    answer: Future[Answered] = field(default_factory=Future)
    request: DecodeRequest = field(init=False)
    """Set by submit()."""
    submitted_s: float = field(init=False)
    """time.monotonic() at submit()."""
    state: Literal["preparing", "queued", "decoding", "left"] = "preparing"

    def __post_init__(self) -> None:
        self.answer.set_running_or_notify_cancel()

    @property
    def refused(self) -> bool:
        return self.answer.done() and self.answer.exception() is not None


class Batcher:
    """Thread-safe.  `capacity` bounds the tickets that are being prepared or queued.

    expected() gives how many episodes may have a request for the next batch, together(versions) whether they can share
    a pass of the model.  lanes: how many passes run beside each other.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait_ms: float,
        capacity: int,
        expected: Callable[[], int],
        together: Callable[[Collection[int]], bool],
        lanes: int = 1,
    ):
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1e3
        self._capacity = capacity
        self._expected = expected
        self._together = together
        self._lanes = lanes
        self._queue: list[Ticket] = []
        self._preparing = self._decoding = 0
        self._batch_s = 0.0
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Tickets that are being prepared or queued."""
        return self._preparing + len(self._queue)

    def admit(self) -> Ticket:
        """A place for a request that is about to be prepared.  Raises Overloaded at once when there is none."""
        with self._changed:
            waiting = self.waiting
            if waiting >= self._capacity:
                passes = waiting / self._max_batch
                raise Overloaded(
                    f"the queue is full: {waiting} requests wait, at most {self._capacity} may",
                    retry_after_ms=max(1, round(1e3 * self._batch_s * passes)),
                )
            self._preparing += 1
            return Ticket()

    def submit(self, ticket: Ticket, request: DecodeRequest) -> None:
        """Queues a prepared request; does nothing when the ticket was withdrawn meanwhile."""
        with self._changed:
            if ticket.state != "preparing":
                return
            ticket.request, ticket.submitted_s, ticket.state = request, time.monotonic(), "queued"
            self._preparing -= 1
            self._queue.append(ticket)
            self._changed.notify_all()

    def withdraw(self, ticket: Ticket, why: Refused) -> bool:
        """Takes a ticket out before the model sees it and refuses it; False when that is too late."""
        with self._changed:
            if ticket.state == "preparing":
                self._preparing -= 1
            elif ticket.state == "queued":
                self._queue.remove(ticket)
            else:
                return False
            ticket.state = "left"
        ticket.answer.set_exception(why)
        return True

    def next_batch(self) -> list[Ticket]:
        """Up to max_batch queued tickets for one pass, oldest first; blocks for the first; empty after stop()."""
        with self._changed:
            while not self._ready():
                self._changed.wait(self._patience_s() if self._queue else None)
            batch = self._matching()
            for ticket in batch:
                ticket.state = "decoding"
                self._queue.remove(ticket)
            self._decoding += len(batch)
            return batch

    def resolve(self, batch: list[Ticket], answers: list[DecodeAnswer], *, started_s: float) -> None:
        """Hands out the answers of one pass that began at started_s (time.monotonic).

        One that is no number, of weights that overflow, moves no arm: it is refused.
        """
        if len(answers) != len(batch):
            raise ValueError(f"a pass must give {len(batch)} answers, got {len(answers)}")
        sound = [bool(np.isfinite(answer.token_logprobs_N).all()) for answer in answers]
        self._batch_s = time.monotonic() - started_s
        self._left(batch)
        for ticket, answer, is_sound in zip(batch, answers, sound, strict=True):
            version, queue_ms = ticket.request.version, 1e3 * (started_s - ticket.submitted_s)
            if is_sound:
                ticket.answer.set_result(
                    Answered(answer=answer, version=version, queue_ms=queue_ms, batch_size=len(batch))
                )
            else:
                why = f"version {version} does not compute: the log-probabilities of its answer are no numbers"
                ticket.answer.set_exception(NoNumber(why))

    def fail(self, batch: list[Ticket], why: Refused) -> None:
        """Refuses what has no answer yet of a pass that failed."""
        left = [ticket for ticket in batch if ticket.state == "decoding"]
        self._left(left)
        for ticket in left:
            ticket.answer.set_exception(why)

    def stop(self) -> None:
        """No more batches once the queue is empty."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _left(self, batch: list[Ticket]) -> None:
        with self._changed:
            self._decoding -= len(batch)
            for ticket in batch:
                ticket.state = "left"

    def _matching(self) -> list[Ticket]:
        """The oldest ticket and those that can share its pass; each lane gets its part."""
        batch: list[Ticket] = []
        versions: set[int] = set()
        for ticket in self._queue:
            version = ticket.request.version
            if version in versions or not versions or self._together(versions | {version}):
                versions.add(version)
                batch.append(ticket)
        return batch[: self._share]

    @property
    def _share(self) -> int:
        """Most requests of the next pass."""
        asking = max(self._expected(), self._decoding + len(self._queue))
        return min(self._max_batch, -(-asking // self._lanes))

    def _ready(self) -> bool:
        # A batch goes when it is full, when its oldest request has waited long enough, or when everyone who could
        # still join has: a robot has one request at a time, so there are never more to come than episodes at work.
        # One robot alone therefore never waits, and eight in step share one pass.
        if not self._queue:
            return self._stopped
        everyone = self._decoding + len(self._queue) >= self._expected()
        return everyone or self._stopped or self._patience_s() <= 0 or len(self._matching()) >= self._share

    def _patience_s(self) -> float:
        """How much longer the oldest request may wait."""
        return self._queue[0].submitted_s + self._max_wait_s - time.monotonic()
