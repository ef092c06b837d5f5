"""Holds and clips in the log, with their reasons: a line where one begins, not at each of its ticks."""

from __future__ import annotations

import logging
import math

from protos import episode_pb2
from robot_client.arm import ArmState
from robot_client.observer import Observer
from robot_client.rollout import Rollout

log = logging.getLogger(__name__)

QUIET_TICKS = 20
"""A rule that has not spoken for so long, and speaks, is worth a line."""


class Journal(Observer):
    """A rule is what a reason says before its first colon; its figures may change with every tick."""

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self._ticks = 0
        self._spoke: dict[str, float] = {}

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        rules = [reason.partition(":")[0] for reason in tick.reason.split("; ") if reason]
        if any(self._ticks - self._spoke.get(rule, -math.inf) > QUIET_TICKS for rule in rules):
            what = "hold" if tick.source == episode_pb2.SOURCE_HOLD else "clip"
            log.warning("tick %d: %s: %s", self._ticks, what, tick.reason)
        self._spoke.update(dict.fromkeys(rules, self._ticks))
        self._ticks += 1
