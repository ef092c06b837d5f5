"""One decision after another: asked, awaited, asked again while that may help.  Never blocks.

Decision numbers have no gaps: after a lost reply or a refusal the same number is asked again, with the same executed
ticks and the newest observation, so that the server records each tick once whichever try it saw.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, wait

from protos import episode_pb2
from robot_client.answer import Answer
from robot_client.arm import Observation
from robot_client.backoff import BackOff
from robot_client.client import Client
from robot_client.errors import DeadlineExceeded, PolicyError, Superseded, TooLong


class Decisions:
    """The decisions of one episode, once it has its episode_id.

    deadline_s: for one try.
    give_up_after_s: with no answer for so long after a first failure, the failure is raised; a rest is not counted.
    most_ticks: that one request may carry; 0 for any number.
    """

    def __init__(self, client: Client, *, deadline_s: float, give_up_after_s: float, most_ticks: int = 0):
        self.episode_id = ""
        self.answer_s: list[float] = []
        self.trouble = ""
        self._client = client
        self._deadline_s = deadline_s
        self._give_up_after_s = give_up_after_s
        self._most_ticks = most_ticks
        self._backoff = BackOff()
        self._observation: Observation | None = None
        self._pending: Future[Answer] | None = None
        self._expires_s = 0.0
        self._retry_at_s = 0.0
        self._failing_since_s: float | None = None
        self._first_asked_s: float | None = None
        self._unreported: list[episode_pb2.Tick] = []
        self._carried = 0

    @property
    def answered(self) -> int:
        """How many answers came: the number of the next decision."""
        return len(self.answer_s)

    @property
    def open(self) -> bool:
        """True from the first request of a decision until its answer."""
        return self._first_asked_s is not None

    @property
    def may_ask(self) -> bool:
        return self._pending is None and time.monotonic() >= self._retry_at_s

    @property
    def pending(self) -> Future[Answer] | None:
        return self._pending

    @property
    def wake_at_s(self) -> float:
        """On time.monotonic(): when something is due even if no answer comes."""
        return self._retry_at_s if self._pending is None else self._expires_s

    @property
    def unreported(self) -> list[episode_pb2.Tick]:
        """The ticks that no answered request has carried."""
        return self._unreported

    def executed(self, tick: episode_pb2.Tick) -> None:
        """Raises TooLong when the server takes no more without a decision in between."""
        self._unreported.append(tick)
        if len(self._unreported) == self._most_ticks:
            raise TooLong(f"{self._most_ticks} ticks without a decision, the most that a request may report")

    def ask(self, observation: Observation) -> None:
        """Sends the observation for the next decision."""
        if self._first_asked_s is None:
            self._first_asked_s, self._carried = time.monotonic(), len(self._unreported)
        self._observation = observation
        self._send()

    def rest(self) -> None:
        """Nothing is asked for now: what is due is as if first asked, and never failed, when it is asked for again."""
        if self._pending is not None:
            return
        self._failing_since_s = None
        if self.open:
            self._first_asked_s = time.monotonic()

    def poll(self) -> Answer | None:
        """The answer, once.  Raises the PolicyError after which asking again is useless."""
        if self._pending is None:
            return None
        now_s = time.monotonic()
        if not self._pending.done() and now_s < self._expires_s:
            return None
        pending, self._pending = self._pending, None
        try:
            if pending.cancel():
                raise DeadlineExceeded(f"no answer in {self._deadline_s:g} s")
            answer = pending.result()
        except PolicyError as error:
            self._failed(error, now_s)
            return None
        assert self._first_asked_s is not None
        self.answer_s.append(answer.arrived_s - self._first_asked_s)
        del self._unreported[: self._carried]
        self._first_asked_s = self._failing_since_s = None
        self.trouble = ""
        self._backoff.reset()
        return answer

    def settle(self) -> None:
        """Waits, asking again as long as needed, until server and client agree on which ticks have been reported.

        Raises the PolicyError after which asking again is useless.
        """
        while self.open:
            if self._pending is None:
                time.sleep(max(0.0, self._retry_at_s - time.monotonic()))
                self._send()
            assert self._pending is not None
            wait([self._pending], timeout=max(0.0, self._expires_s - time.monotonic()))
            self.poll()

    def _send(self) -> None:
        assert self._observation is not None
        self._expires_s = time.monotonic() + self._deadline_s
        self._pending = self._client.ask(
            self.episode_id,
            self.answered,
            self._observation,
            self._unreported[: self._carried],
            deadline_s=self._deadline_s,
        )

    def _failed(self, error: PolicyError, now_s: float) -> None:
        self.trouble = str(error)
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if not error.repeatable:
            raise error
        if now_s - self._failing_since_s > self._give_up_after_s:
            raise type(error)(f"gave up after {self._give_up_after_s:g} s: {error}") from error
        wait_s = 0.0 if isinstance(error, Superseded) else self._backoff.next_s()
        self._retry_at_s = now_s + max(wait_s, error.retry_after_s)
