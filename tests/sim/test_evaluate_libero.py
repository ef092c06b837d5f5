"""Evaluations of real LIBERO scenes in real worker processes, over a real socket."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import psutil
import pytest

from robot_client.client import PolicyClient
from robot_client.rollout import Rollout
from sim import assets
from sim.evaluate import EvaluateConfig, carry_out, plan
from sim.report import Report, outcomes_digest
from sim.suites import find_suite
from tests.sim.scripted_policy import ScriptedPolicy, served

pytestmark = [
    pytest.mark.libero,
    pytest.mark.skipif(not assets.has_libero(), reason="LIBERO or its assets are not installed"),
]

TWO_TASKS = EvaluateConfig(suite="libero_object", tasks=(0, 3), episodes_per_task=3, slots=2, processes=2, videos=0)
ONE_WORKER = replace(TWO_TASKS, tasks=(3,), processes=1, step_deadline_s=10.0)
SHORT_TICKS = 48


def run(policy: ScriptedPolicy, config: EvaluateConfig, *, backwards: bool = False) -> Report:
    """The evaluation with shorter episodes: nothing here depends on their length."""
    with served(policy) as address:
        with PolicyClient(address) as client:
            spec = client.spec()
        rollouts = [shortened(rollout) for rollout in plan(config, find_suite(config.suite), version=4)]
        return carry_out(replace(config, server=address), spec, rollouts[::-1] if backwards else rollouts)


def shortened(rollout: Rollout) -> Rollout:
    return replace(rollout, task=replace(rollout.task, max_ticks=SHORT_TICKS))


def require_every_state_once(report: Report, config: EvaluateConfig) -> None:
    pairs = sorted((episode.task, episode.initial_state) for episode in report.episodes)
    assert pairs == [(f"libero_object/{task}", str(state)) for task in config.tasks for state in (40, 41, 42)]
    assert (report.rate.n, report.rate.errors) == (len(pairs), 0)


def worker_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


class SignalsAWorker(ScriptedPolicy):
    """Sends a signal to the only worker when its episodes are well under way."""

    def __init__(self, signal_number: int):
        super().__init__()
        self._signal = signal_number
        self._answers = 0
        self.victim = 0

    def Act(self, request, context):
        with self._lock:
            self._answers += 1
            if self._answers == 8:
                (self.victim,) = worker_pids()
                os.kill(self.victim, self._signal)
        return super().Act(request, context)


def test_an_evaluation_counts_every_state_once_and_its_calls_fly_together(tmp_path):
    policy = ScriptedPolicy(thinking_s=0.05)
    report = run(policy, replace(TWO_TASKS, out=tmp_path, videos=1))
    require_every_state_once(report, TWO_TASKS)
    assert len(policy.started) == len(policy.ended) == 6
    assert {request.version for request in policy.started.values()} == {4}
    assert policy.most_in_flight > 1
    assert all(episode.ticks == SHORT_TICKS and episode.decisions == 6 for episode in report.episodes)
    assert sorted(path.name.split(".state")[0] for path in (tmp_path / "videos").glob("*.mp4")) == [
        "libero_object-0.failure",
        "libero_object-3.failure",
    ]
    report.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["assets"].startswith("LIBERO with ") and data["model"] == "scripted" and data["complete"]


def test_order_slots_and_processes_do_not_change_what_happens():
    first = run(ScriptedPolicy(), TWO_TASKS)
    second = run(ScriptedPolicy(), replace(TWO_TASKS, slots=1, processes=1), backwards=True)
    assert outcomes_digest(first.episodes) == outcomes_digest(second.episodes)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_mid_episode_is_replaced_and_the_counts_stay_right(signal_number):
    policy = SignalsAWorker(signal_number)
    report = run(policy, ONE_WORKER)
    require_every_state_once(report, ONE_WORKER)
    (loss,) = report.workers_lost
    assert loss["pid"] == policy.victim and loss["jobs"]
    again = {(episode.task, episode.initial_state) for episode in report.episodes if episode.attempts == 2}
    assert again == {tuple(key.split(":")) for key in loss["jobs"]}
    assert not psutil.pid_exists(policy.victim)
