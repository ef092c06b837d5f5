"""The scenes that one process keeps: built once, the least recently used dropped when memory runs short."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import psutil

from protos.machine import memory_gb
from sim.pool import Retire

logger = logging.getLogger(__name__)

SCENE_GB = 0.6
"""Room to make for a scene before it is built: model, renderer and its meshes."""
MACHINE_SHARE = 0.5
"""Part of the machine's memory that simulator workers may fill together unless told otherwise."""


class Closable(Protocol):
    def close(self) -> None: ...


def resident_gb() -> float:
    """Memory that this process holds now, GiB."""
    return psutil.Process().memory_info().rss / 2**30


def default_budget_gb(processes: int) -> float:
    """A worker's share of the memory that there is, GiB."""
    return MACHINE_SHARE * memory_gb() / processes


class Scenes:
    """Scenes by task id.  The process is meant to stay below budget_gb; one scene is kept however small that is."""

    def __init__(
        self,
        build: Callable[[str], Closable],
        *,
        budget_gb: float,
        resident_gb: Callable[[], float] = resident_gb,
    ):
        self._build = build
        self._budget_gb = budget_gb
        self._resident_gb = resident_gb
        self._scenes: OrderedDict[str, Closable] = OrderedDict()

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._scenes

    @property
    def held(self) -> tuple[str, ...]:
        """Task ids of the scenes in memory."""
        return tuple(self._scenes)

    def of(self, task_id: str) -> Closable:
        """The task's scene, built when it is not held."""
        if task_id not in self._scenes:
            self._drop_until(self._budget_gb - SCENE_GB)
            self._scenes[task_id] = self._build(task_id)
        self._scenes.move_to_end(task_id)
        return self._scenes[task_id]

    def require_budget(self) -> None:
        """Drops old scenes while the process is too large; raises Retire when that does not help."""
        self._drop_until(self._budget_gb, keep=1)
        if (resident := self._resident_gb()) > self._budget_gb:
            raise Retire(f"{resident:.1f} GiB with {len(self._scenes)} scene(s), the budget is {self._budget_gb:.1f}")

    def _drop_until(self, limit_gb: float, keep: int = 0) -> None:
        while len(self._scenes) > keep and (resident := self._resident_gb()) > limit_gb:
            task_id, scene = self._scenes.popitem(last=False)
            scene.close()
            logger.info("dropped the scene of %s: %.1f GiB resident, %.1f allowed", task_id, resident, limit_gb)
