"""A worker in a network namespace of its own loses its link in the middle of an episode, and finds it again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from protos import episode_pb2
from protos.episode_file import read_episode
from tests.server.running import eventually

ROLLOUTS = 10
SERVER, FAR = "10.200.77.1", "10.200.77.2"
ADDRESS = f"{SERVER}:50051"

SERVE = f"""
import sys, threading
from pathlib import Path
from tests.client.test_real_server import ScriptedModel
from tests.server.running import serving
with serving(ScriptedModel(), host="{SERVER}", port=50051, episodes=Path(sys.argv[1]), lease_s=2.0):
    print("serving", flush=True)
    threading.Event().wait()
"""
WORK = f"""
import time
from robot_client.arm import Task
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.errors import PolicyError
from robot_client.leases import Leases
from robot_client.rollout import Rollout
from tests.client.fake_arm import FakeArm
arm, client = FakeArm(tick_s=0.05), PolicyClient("{ADDRESS}", deadline_s=2.0, give_up_after_s=2.0)
leases = Leases("{ADDRESS}", worker=str(time.monotonic_ns()), can_run=["fake/*"], deadline_s=2.0)
while True:
    try:
        lease = leases.take(wait_s=0.5)
        if lease is None:
            continue
        print(lease.rollout.rollout_id, flush=True)
        task = Task(name="fake/0", instruction="pick up the bowl", max_ticks=20)
        rollout = Rollout(task=task, purpose="train", temperature=1.0, lease_id=lease.lease_id)
        for result in run_lockstep([arm], [rollout], client):
            leases.let_go(lease.lease_id)
    except PolicyError:
        time.sleep(0.2)
"""
TRAIN = f"""
from rl_trainer.rollouts import RolloutQueue
from tests.trainer.test_rollouts import rollout
queue = RolloutQueue("{ADDRESS}", run="run")
queue.enqueue([rollout(number) for number in range({ROLLOUTS})])
for item in queue.finished():
    print(item.rollout.rollout_id, flush=True)
"""


class Place:
    """A network namespace; what is started in it is killed with it."""

    def __init__(self, name: str):
        self.name = name
        self._started: list[subprocess.Popen] = []

    def start(self, script: str, *args: str) -> Told:
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", script, *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._started.append(process)
        return Told(process)

    def ip(self, *args: str) -> None:
        subprocess.run(["ip", "-n", self.name, *args], check=True)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(10)
        subprocess.run(["ip", "netns", "del", self.name], check=True)


class Told:
    """The lines that a process has written by now."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.lines = process, list[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.strip() for line in self.process.stdout)


@pytest.fixture
def places() -> Iterator[tuple[Place, Place]]:
    """Two namespaces and a link between them; nothing of the machine's own network is touched."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a namespace with a link needs root and the ip command")
    with ExitStack() as stack:
        both = []
        for suffix in ("near", "far"):
            name = f"vla-{os.getpid()}-{suffix}"
            try_to("ip", "netns", "add", name)
            both.append(Place(name))
            stack.callback(both[-1].close)
        near, far = both
        try_to("ip", "-n", near.name, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", far.name)
        for place, address in ((near, SERVER), (far, FAR)):
            place.ip("addr", "add", f"{address}/24", "dev", "wire")
            place.ip("link", "set", "wire", "up")
            place.ip("link", "set", "lo", "up")
        yield near, far


def try_to(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces are not to be had here: {done.stderr.strip()}")


def test_a_worker_that_loses_its_link_loses_its_lease_not_the_rollout_and_works_again_when_it_is_back(places, tmp_path):
    near, far = places
    server = near.start(SERVE, str(tmp_path))
    eventually(lambda: server.lines, within_s=60)
    trainer, cut_off = near.start(TRAIN), far.start(WORK)
    eventually(lambda: len(cut_off.lines) >= 2, within_s=60)
    time.sleep(0.3)  # an episode takes a second
    far.ip("link", "set", "wire", "down")
    lost, had = cut_off.lines[-1], len(cut_off.lines)
    assert lost not in trainer.lines

    helper = near.start(WORK)
    eventually(lambda: lost in trainer.lines, within_s=60)
    assert lost in helper.lines and len(trainer.lines) < ROLLOUTS
    helper.process.kill()

    far.ip("link", "set", "wire", "up")
    assert trainer.process.wait(60) == 0
    assert len(cut_off.lines) > had
    assert sorted(trainer.lines) == sorted(f"run/0/{number}" for number in range(ROLLOUTS))
    episodes = [read_episode(path) for path in tmp_path.glob("*.episode")]
    counted = Counter(e.start.rollout_id for e in episodes if e.end.outcome != episode_pb2.OUTCOME_ERROR)
    assert counted == Counter(trainer.lines)
