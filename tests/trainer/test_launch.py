"""Processes of a run: what a child is told, and that it is started again."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from rl_trainer.launch import Child

SHOW = "import os; print(os.environ['TOLD'], os.environ['KEPT'], flush=True)"


def test_a_child_is_told_its_environment_over_our_own_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "ours")
    monkeypatch.setenv("TOLD", "ours")
    log, lost = tmp_path / "log", list[str]()
    child = Child("child", [sys.executable, "-c", SHOW], log, environment={"TOLD": "its own"}, on_loss=lost.append)
    give_up_s = time.monotonic() + 60
    while len(lost) < 2 and time.monotonic() < give_up_s:
        child.watch()
        time.sleep(0.01)
    child.stop()
    assert len(lost) == 2 and log.read_text().splitlines()[:2] == ["its own ours"] * 2
