"""How long to wait before the next try."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from robot_client.errors import PolicyError

T = TypeVar("T")


class BackOff:
    """Doubles from `first_s` to `ceiling_s`.  Each wait is drawn from its upper half: robots do not return in step."""

    def __init__(self, *, first_s: float = 0.1, ceiling_s: float = 2.0):
        self.first_s = first_s
        self.ceiling_s = ceiling_s
        self._wait_s = first_s

    def next_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, min(2 * self._wait_s, self.ceiling_s)
        return wait_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._wait_s = self.first_s


def persist(attempt: Callable[[], T], *, give_up_after_s: float) -> T:
    """What the attempt gives, tried again with back-off while its PolicyError says that this may help."""
    give_up_at, backoff = time.monotonic() + give_up_after_s, BackOff()
    while True:
        try:
            return attempt()
        except PolicyError as error:
            wait_s = max(error.retry_after_s, backoff.next_s())
            if not error.repeatable or time.monotonic() + wait_s > give_up_at:
                raise
        time.sleep(wait_s)
