"""Processes of a run: what a child is told, and that it is started again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from policy_server.access import ADMINS, ROBOTS, TRAINERS, Access, Guard
from policy_server.errors import Forbidden
from rl_trainer.launch import Child, own_tokens

SHOW = "import os; print(os.environ['TOLD'], os.environ['KEPT'], flush=True)"
PARENT = """
import sys
import time
from pathlib import Path

from rl_trainer.launch import Child

child = Child("child", ["sleep", "600"], Path(sys.argv[1]), on_loss=print)
print(child.pid, flush=True)
time.sleep(600)
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    while child.name() != "sleep":
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


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
