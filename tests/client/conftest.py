"""A scripted policy behind a real socket, and clients of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from robot_client.arm import Task
from robot_client.client import PolicyClient
from robot_client.rollout import Rollout
from tests.client.scripted_policy import Running, ScriptedPolicy


@pytest.fixture
def server() -> Iterator[Running]:
    running = Running(ScriptedPolicy())
    yield running
    running.stop()


@pytest.fixture
def policy(server: Running) -> ScriptedPolicy:
    return server.policy


@pytest.fixture(params=["unary", "stream"])
def client(server: Running, request: pytest.FixtureRequest) -> Iterator[PolicyClient]:
    """Laws about answers hold for both ways to ask."""
    with PolicyClient(server.address, stream=request.param == "stream", deadline_s=5, give_up_after_s=5) as client:
        yield client


def rollout_of(max_ticks: int = 12, name: str = "task", **options) -> Rollout:
    return Rollout(task=Task(name=name, instruction="pick up the bowl", max_ticks=max_ticks), **options)


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a package with these entry points, as far as Python's own machinery can tell."""

    def install(entry_points: str) -> None:
        package = tmp_path / "site" / "someones_things-1.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-things\nVersion: 1\n")
        (package / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(str(package.parent))

    return install


class HandClock:
    """Stands in for the module `time` where only monotonic() is asked; turned by hand."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s
