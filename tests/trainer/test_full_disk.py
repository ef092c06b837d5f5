"""A full disk, a small one mounted for the test: nothing is begun that could not be kept, and with room all goes on."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors import SafetensorError

from policy_server.episode_store import EpisodeStore
from protos import rollout_pb2
from rl_trainer.patience import ServerGone
from rl_trainer.rollouts import RolloutQueue
from rl_trainer.run_state import load_state, save_state
from tests.server import messages
from tests.server.fake_model import FakeModel
from tests.server.running import RunningServer, eventually, serving
from tests.trainer.test_rollouts import rollout, work, worker

MIB = 2**20
DISK, RESERVE = 8 * MIB, 4 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave)
    return ballast


def refusal(call, request) -> str:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=10)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return error.value.details() or ""


def status(server: RunningServer) -> rollout_pb2.QueueStatus:
    return server.rollouts.GetQueue(rollout_pb2.GetQueueRequest())


def test_a_full_disk_hands_out_no_work_keeps_what_is_under_way_and_the_run_goes_on_with_room(small_disk, capsys):
    with serving(FakeModel(), store=EpisodeStore(small_disk, reserve_bytes=RESERVE)) as server:
        queue, finished = RolloutQueue(server.address, run="run"), list[str]()
        queue.enqueue([rollout(number) for number in range(5)])
        assert work(server) == "run/0/0"
        request = rollout_pb2.LeaseRolloutRequest(worker="test", can_run=["fake/*"])
        leased = server.rollouts.LeaseRollout(request)
        under_way = server.policy.StartEpisode(messages.start(lease_id=leased.lease_id)).episode_id

        ballast = fill(small_disk, leave=RESERVE // 2)
        assert "the episode store is full: 2 MiB free, at least 4 MiB needed" in refusal(
            server.rollouts.LeaseRollout, request
        )
        asked = rollout_pb2.EnqueueRolloutsRequest(rollouts=[rollout(5)])
        assert "the episode store is full" in refusal(server.rollouts.EnqueueRollouts, asked)
        server.policy.Act(messages.act(under_way, 0))
        server.policy.EndEpisode(messages.end(under_way))
        collecting = threading.Thread(
            target=lambda: finished.extend(item.rollout.rollout_id for item in queue.finished()), daemon=True
        )
        collecting.start()
        with worker(server, refused=grpc.StatusCode.RESOURCE_EXHAUSTED):
            told = list[str]()
            eventually(
                lambda: told.append(capsys.readouterr().out) or any("is full" in line for line in told), within_s=20
            )
            assert f"waiting for {server.address}: the episode store is full: 2 MiB free" in "".join(told)
            assert (status(server).waiting, status(server).done) == (3, 2)
            ballast.unlink()
            collecting.join(30)
        assert sorted(finished) == [f"run/0/{number}" for number in range(5)]
        assert not status(server).set_aside


def test_work_that_is_waited_for_is_not_handed_out_onto_a_full_disk(small_disk):
    with serving(FakeModel(), store=EpisodeStore(small_disk, reserve_bytes=RESERVE), lease_s=1.0) as server:
        queue = RolloutQueue(server.address, run="run")
        queue.enqueue([rollout(0)])
        request = rollout_pb2.LeaseRolloutRequest(worker="patient", can_run=["fake/*"], wait_ms=20_000)
        server.rollouts.LeaseRollout(rollout_pb2.LeaseRolloutRequest(worker="dead", can_run=["fake/*"]))  # it lapses
        waiting = server.rollouts.LeaseRollout.future(request)
        eventually(lambda: "patient" in status(server).workers)
        ballast = fill(small_disk, leave=RESERVE // 2)
        eventually(lambda: status(server).waiting == 1)
        with pytest.raises(grpc.FutureTimeoutError):
            waiting.result(1.5)
        ballast.unlink()
        assert waiting.result(10).rollout == rollout(0)


def test_a_disk_that_stays_full_ends_the_run_in_one_sentence(small_disk):
    with serving(FakeModel(), store=EpisodeStore(small_disk, reserve_bytes=RESERVE)) as server:
        fill(small_disk, leave=RESERVE // 2)
        with pytest.raises(ServerGone, match="has had no room for 1 s: the episode store is full: 2 MiB free"):
            RolloutQueue(server.address, run="run", patience_s=1.0).enqueue([rollout(0)])


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    path = small_disk / "state.safetensors"
    save_state(path, {"iteration": 1}, {"weights": torch.ones(10)})
    with pytest.raises(SafetensorError, match="No space left on device"):
        save_state(path, {"iteration": 2}, {"weights": torch.ones(DISK)})
    fields, tensors = load_state(path)
    assert fields == {"iteration": 1} and torch.equal(tensors["weights"], torch.ones(10))
