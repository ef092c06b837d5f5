"""Processes of a run: what a child is told, and that it is started again."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from policy_server.access import ADMINS, ROBOTS, TRAINERS, Access, Guard
from policy_server.errors import Forbidden
from rl_trainer.launch import Child, own_tokens

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


def test_a_server_of_the_runs_own_takes_tokens_that_only_this_user_can_read_and_that_are_new_each_time(
    tmp_path: Path,
) -> None:
    known, shown = own_tokens(tmp_path / "access")
    assert known.parent.stat().st_mode & 0o077 == 0
    guard = Guard(Access(tokens=known))
    for role, roles in {"robot": ROBOTS, "trainer": TRAINERS, "admin": ADMINS}.items():
        guard.check(f"Bearer {shown[role].token()}", roles)
    with pytest.raises(Forbidden):
        guard.check(f"Bearer {shown['robot'].token()}", TRAINERS)
    before = {role: credentials.token() for role, credentials in shown.items()}
    _, shown = own_tokens(tmp_path / "access")
    assert len({*before.values(), *(credentials.token() for credentials in shown.values())}) == 6
