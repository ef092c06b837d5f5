"""How long to wait before the next try."""

from __future__ import annotations

import random


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
