"""Workers that lease their work: every rollout is run once, whoever is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from protos import episode_pb2, rollout_pb2
from protos.episode_file import read_episode
from sim.leasing import LeasingConfig, suites_here
from tests.server.running import RunningServer, eventually, serving
from tests.sim.wandering_model import WanderingModel

LEASE_S = 2.0


def rollouts(count: int, purpose: episode_pb2.Purpose = episode_pb2.PURPOSE_TRAIN) -> list[rollout_pb2.Rollout]:
    return [
        rollout_pb2.Rollout(
            rollout_id=f"run/0/{number}",
            task="robosuite/0",
            initial_state=f"seed:{number}",
            purpose=purpose,
            temperature=1.0,
            seed=number,
        )
        for number in range(count)
    ]


def status(server: RunningServer) -> rollout_pb2.QueueStatus:
    return server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(run="run"))


@contextmanager
def worker(server: RunningServer, *flags: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "sim", "worker", "--server", server.address, "--suites", "robosuite"]
    child = subprocess.Popen([*command, "--processes", "1", "--slots", "2", *flags])
    try:
        yield child
    finally:
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            process.kill()
        child.wait()


def simulator(child: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(child.pid).children() if "spawn_main" in " ".join(p.cmdline())]


def test_leased_rollouts_are_run_as_they_were_asked_for_even_when_a_worker_is_killed(tmp_path: Path) -> None:
    asked = rollouts(3)
    with serving(WanderingModel(), episodes=tmp_path, lease_s=LEASE_S, max_batch=8) as server, worker(server) as child:
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=asked))
        eventually(lambda: server.model.answers > 4, within_s=120)
        (first,) = simulator(child)
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: status(server).done == 3, within_s=200)
        assert simulator(child)[0].pid != first.pid
    episodes = [read_episode(path) for path in sorted(tmp_path.glob("*.episode"))]
    counted = [episode for episode in episodes if episode.end.outcome != episode_pb2.OUTCOME_ERROR]
    assert sorted(episode.start.rollout_id for episode in counted) == [rollout.rollout_id for rollout in asked]
    for episode in counted:
        rollout = asked[int(episode.start.rollout_id[-1])]
        assert (episode.start.task, episode.start.initial_state) == (rollout.task, rollout.initial_state)
        assert (episode.start.temperature, episode.start.seed) == (1.0, rollout.seed)
        assert episode.start.purpose == episode_pb2.PURPOSE_TRAIN
        assert len(episode.ticks) == 300 and not episode.end.terminal


def test_work_that_cannot_be_run_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    good, no_task, no_state = rollouts(3)
    no_task.task, no_state.initial_state = "robosuite/99", "17"
    with serving(WanderingModel(), episodes=tmp_path, max_batch=8) as server, worker(server):
        asked = rollout_pb2.EnqueueRolloutsRequest(rollouts=[no_task, no_state, good])
        server.rollouts.EnqueueRollouts(asked)
        eventually(lambda: status(server).done == 1 and len(status(server).set_aside) == 2, within_s=200)
        aside = {item.rollout.rollout_id: item.errors for item in status(server).set_aside}
    assert all(len(errors) == 3 for errors in aside.values())
    assert "99" in aside[no_task.rollout_id][0] and "'17'" in aside[no_state.rollout_id][0]


def test_work_for_a_policy_that_does_not_fit_is_set_aside_and_the_worker_lives(tmp_path: Path) -> None:
    model = WanderingModel()
    model.spec.tick_rate_hz = 7.0
    with serving(model, episodes=tmp_path, max_batch=8) as server, worker(server) as child:
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts(1)))
        eventually(lambda: simulator(child), within_s=60)
        (process,) = simulator(child)
        eventually(lambda: len(status(server).set_aside) == 1, within_s=200)
        (aside,) = status(server).set_aside
        assert simulator(child) == [process]
    assert len(aside.errors) == 3 and "this policy cannot drive this arm" in aside.errors[0]


def test_a_worker_in_a_shifted_world_says_so_in_its_episodes(tmp_path: Path) -> None:
    with serving(WanderingModel(), episodes=tmp_path, max_batch=8) as server, worker(server, "--shift", "camera"):
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts(1)))
        eventually(lambda: status(server).done == 1, within_s=200)
    (episode,) = (read_episode(path) for path in tmp_path.glob("*.episode"))
    assert episode.start.asset_tree == "robosuite's own+shift:camera"


def test_work_that_cannot_be_shifted_is_set_aside(tmp_path: Path) -> None:
    with serving(WanderingModel(), episodes=tmp_path, max_batch=8) as server, worker(server, "--shift", "objects"):
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts(1)))
        eventually(lambda: len(status(server).set_aside) == 1, within_s=200)
        (aside,) = status(server).set_aside
    assert len(aside.errors) == 3 and "distractors must be there" in aside.errors[0]


def test_suites_and_sizes_that_make_no_sense_are_refused() -> None:
    assert "robosuite" in suites_here()
    with pytest.raises(ValueError, match="'nowhere'"):
        LeasingConfig(suites=("nowhere",))
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        LeasingConfig(slots=0)
