"""A process keeps the scenes it used last, within its memory budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protos import machine
from sim.pool import Retire
from sim.scenes import SCENE_GB, Scenes, default_budget_gb


class FakeProcess:
    """Scenes of 1 GiB each on top of `base_gb`."""

    def __init__(self, base_gb: float):
        self.base_gb = base_gb
        self.open: list[str] = []
        self.built: list[str] = []

    def build(self, task_id: str) -> FakeScene:
        self.open.append(task_id)
        self.built.append(task_id)
        return FakeScene(self, task_id)

    def resident_gb(self) -> float:
        return self.base_gb + len(self.open)

    def scenes(self, budget_gb: float) -> Scenes:
        return Scenes(self.build, budget_gb=budget_gb, resident_gb=self.resident_gb)


class FakeScene:
    def __init__(self, process: FakeProcess, task_id: str):
        self.process, self.task_id = process, task_id

    def close(self) -> None:
        self.process.open.remove(self.task_id)


def test_a_scene_is_built_once():
    process = FakeProcess(1.0)
    scenes = process.scenes(10.0)
    assert scenes.of("a") is scenes.of("a")
    assert process.built == ["a"]


def test_the_least_recently_used_scene_makes_room():
    process = FakeProcess(1.0)
    scenes = process.scenes(budget_gb=2.5 + SCENE_GB)
    for task_id in ("a", "b", "a", "c"):
        scenes.of(task_id)
    assert process.open == ["a", "c"]
    assert process.built == ["a", "b", "c"]


def test_a_process_that_stays_too_large_retires():
    scenes = FakeProcess(5.0).scenes(4.0)
    scenes.of("a")
    with pytest.raises(Retire, match=r"6\.0 GiB"):
        scenes.require_budget()


GROWS = """
import time
import numpy as np
from sim.scenes import resident_gb

before = resident_gb()
block = np.ones(25 * 2**20)  # 200 MiB
time.sleep(1)  # a kernel may count with delay
print(resident_gb() - before)
"""


def test_resident_memory_is_this_processs():
    """Of one of its own: here, others come and go in the memory."""
    grown_gb = float(subprocess.run([sys.executable, "-c", GROWS], check=True, capture_output=True, text=True).stdout)
    assert 0.15 < grown_gb < 0.4


def test_the_default_budget_is_of_what_a_container_may_use(monkeypatch):
    whole = default_budget_gb(1)
    monkeypatch.setattr(machine, "memory_limits", lambda: [2**30])
    assert default_budget_gb(2) == 0.25 < whole
