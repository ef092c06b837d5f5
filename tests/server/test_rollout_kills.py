"""SIGKILL of the server at random moments: nothing acknowledged is lost, nothing counts twice."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc

from protos import episode_pb2, policy_pb2, policy_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from tests.server import messages
from tests.server.running import eventually

KILLS = 4
ROLLOUTS = 40
SERVER = """
import sys, threading
from pathlib import Path
from tests.server.fake_model import FakeModel
from tests.server.running import serving
with serving(FakeModel(pass_s=0.005), episodes=Path(sys.argv[1]), lease_s=1.0) as server:
    print(server.address, flush=True)
    threading.Event().wait()
"""


class Stage:
    """A server that is killed now and then, and clients that go on with whichever there is."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._over = threading.Event()
        self._process = self._start()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._process = self._start()

    def close(self) -> None:
        self._over.set()
        self._process.kill()
        self._process.wait(10)

    def play(self, act: Callable[[grpc.Channel], None]) -> threading.Thread:
        """Calls act again and again; whenever the server is lost, with a channel to the next one."""

        def go() -> None:
            while not self._over.is_set():
                with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(self._address) as channel:
                    while not self._over.is_set():
                        act(channel)
                time.sleep(0.02)

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        return thread

    def _start(self) -> subprocess.Popen:
        line = [sys.executable, "-c", SERVER, str(self._folder)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        self._address = process.stdout.readline().strip()
        return process


class Workers:
    """Lease, run and end; an end is repeated until a server has answered it.  Every seventh rollout fails once."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, int] = {}
        self._to_end: dict[int, policy_pb2.EndEpisodeRequest] = {}
        self._failed: set[str] = set()

    def act(self, channel: grpc.Channel) -> None:
        name = threading.get_ident()
        policy = policy_pb2_grpc.PolicyStub(channel)
        if name not in self._to_end:
            wish = rollout_pb2.LeaseRolloutRequest(worker=f"{name}", can_run=["fake/*"], wait_ms=200)
            leased = rollout_pb2_grpc.RolloutsStub(channel).LeaseRollout(wish, timeout=5)
            if not leased.HasField("rollout"):
                return
            episode_id = policy.StartEpisode(messages.start(lease_id=leased.lease_id), timeout=5).episode_id
            policy.Act(messages.act(episode_id, 0), timeout=5)
            self._to_end[name] = messages.end(episode_id, outcome=self._outcome(leased.rollout.rollout_id))
        end = self._to_end[name]
        try:
            self.acknowledged[end.episode_id] = policy.EndEpisode(end, timeout=5).sequence
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise  # ask the next server
        del self._to_end[name]

    def _outcome(self, rollout_id: str) -> episode_pb2.Outcome:
        if int(rollout_id.rpartition("/")[2]) % 7 or rollout_id in self._failed:
            return episode_pb2.OUTCOME_SUCCESS
        self._failed.add(rollout_id)
        return episode_pb2.OUTCOME_ERROR


class Trainer:
    """Asks again for everything whenever it meets a server; reads on from its cursor."""

    def __init__(self, work: list[rollout_pb2.Rollout]):
        self.read: list[tuple[int, str, str]] = []
        self.counted: list[str] = []
        self._work = work
        self._cursor = 0

    def act(self, channel: grpc.Channel) -> None:
        stub = rollout_pb2_grpc.RolloutsStub(channel)
        stub.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=self._work), timeout=5)
        start = episode_pb2.EpisodeStart()
        for part in stub.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(cursor=self._cursor, follow=True)):
            if part.record.HasField("start"):
                start = part.record.start
            elif part.record.HasField("end"):
                self.read.append((part.sequence, start.episode_id, start.rollout_id))
                if part.record.end.outcome != episode_pb2.OUTCOME_ERROR:
                    self.counted.append(start.rollout_id)
                self._cursor = part.sequence
                if part.sequence % 5:
                    continue
                stub.CommitCursor(rollout_pb2.CommitCursorRequest(reader="r", cursor=part.sequence), timeout=5)


def test_a_server_that_is_killed_at_random_loses_nothing_it_acknowledged_and_counts_nothing_twice(tmp_path):
    chance = random.Random(0)
    work = [messages.rollout(f"r/0/{n}", f"fake/{n % 3}") for n in range(ROLLOUTS)]
    stage, workers, trainer = Stage(tmp_path), Workers(), Trainer(work)
    try:
        stage.play(trainer.act)
        for _ in range(3):
            stage.play(workers.act)
        for kill in range(KILLS):
            come_in = (kill + 0.5) / KILLS * ROLLOUTS
            eventually(lambda: len(trainer.counted) >= come_in, within_s=60)  # noqa: B023 (called at once)
            time.sleep(chance.uniform(0.0, 0.02))  # anywhere in the few milliseconds that an episode takes
            stage.kill()
        eventually(lambda: len(set(trainer.counted)) == ROLLOUTS, within_s=60)
        acknowledged = dict(workers.acknowledged)
        eventually(lambda: len(trainer.read) >= max(acknowledged.values()))
    finally:
        stage.close()
    assert Counter(trainer.counted) == Counter(rollout.rollout_id for rollout in work)
    assert [sequence for sequence, _, _ in trainer.read] == list(range(1, len(trainer.read) + 1))
    assert acknowledged.items() <= {episode_id: sequence for sequence, episode_id, _ in trainer.read}.items()
