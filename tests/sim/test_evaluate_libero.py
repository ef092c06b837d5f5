"""Evaluations of real LIBERO scenes in real worker processes, against a real server on a real socket."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from protos.episode_file import Episode, read_episode
from robot_client.client import PolicyClient
from robot_client.rollout import Rollout
from sim.evaluate import EvaluateConfig, carry_out, plan
from sim.report import Report
from sim.suites import find_suite
from tests.server.running import serving
from tests.sim.wandering_model import CHUNK_LENGTH, WanderingModel

pytestmark = pytest.mark.libero

TWO_TASKS = EvaluateConfig(suite="libero_object", tasks=(0, 3), episodes_per_task=3, slots=2, processes=2, videos=0)
ONE_TASK = replace(TWO_TASKS, tasks=(3,), processes=1)
SHORT_TICKS = 40


def run(model, config: EvaluateConfig, episodes: Path, *, ticks: int = SHORT_TICKS, backwards: bool = False) -> Report:
    """The evaluation with shorter episodes, since nothing here depends on their length; the server stores them."""
    with serving(model, episodes=episodes, max_batch=8, queue=64, max_wait_ms=30.0) as server:
        with PolicyClient(server.address) as client:
            spec = client.spec()
        version = spec.message.live_version
        rollouts = [shortened(rollout, ticks) for rollout in plan(config, find_suite(config.suite), version)]
        return carry_out(replace(config, server=server.address), spec, rollouts[::-1] if backwards else rollouts)


def shortened(rollout: Rollout, ticks: int) -> Rollout:
    return replace(rollout, task=replace(rollout.task, max_ticks=ticks))


def require_every_state_once(report: Report, config: EvaluateConfig) -> None:
    pairs = sorted((episode.task, episode.initial_state) for episode in report.episodes)
    assert pairs == [(f"libero_object/{task}", str(state)) for task in config.tasks for state in (40, 41, 42)]
    assert (report.rate.n, report.rate.errors) == (len(pairs), 0)


def whole_episodes(folder: Path) -> dict[tuple[str, str], Episode]:
    """The finished episodes that the server stored, by task and initial state."""
    episodes = [read_episode(path) for path in folder.glob("*.episode")]
    return {(episode.start.task, episode.start.initial_state): episode for episode in episodes}


def what_happened(episode: Episode) -> list:
    """All that was seen, answered and done, but for clocks and names."""
    seen = [(dict(item.observation.images), item.observation.state) for item in episode.decisions]
    answered = [(item.chunk.token_ids, item.chunk.token_logprobs) for item in episode.decisions]
    final = episode.end.final_observation
    return [seen, answered, episode.ticks, dict(final.images), final.state, episode.end.outcome]


def require_same_episodes(first: Path, second: Path) -> None:
    one, other = whole_episodes(first), whole_episodes(second)
    assert one.keys() == other.keys() and one
    for key, episode in one.items():
        assert what_happened(episode) == what_happened(other[key]), key


def test_every_state_is_counted_once_and_slots_share_batches(tmp_path):
    model = WanderingModel()
    report = run(model, replace(TWO_TASKS, out=tmp_path, videos=1), tmp_path / "episodes")
    require_every_state_once(report, TWO_TASKS)
    assert len(whole_episodes(tmp_path / "episodes")) == 6
    assert model.largest_batch > 1
    decisions = SHORT_TICKS // CHUNK_LENGTH
    assert all((episode.ticks, episode.decisions) == (SHORT_TICKS, decisions) for episode in report.episodes)
    videos = {path.name.split(".state")[0] for path in (tmp_path / "videos").glob("*.mp4")}
    assert videos == {"libero_object-0.failure", "libero_object-3.failure"}
    report.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["assets"].startswith("LIBERO with ") and data["model"] == "scripted" and data["complete"]


def test_order_slots_and_processes_change_nothing_in_any_episode(tmp_path):
    run(WanderingModel(), TWO_TASKS, tmp_path / "one")
    run(WanderingModel(), replace(TWO_TASKS, slots=3, processes=1), tmp_path / "other", backwards=True)
    require_same_episodes(tmp_path / "one", tmp_path / "other")


def test_a_deterministic_server_gives_the_same_episodes_whatever_shares_its_passes(tmp_path, tiny_vla):
    from policy_server.vla.policy import Policy
    from policy_server.vla_model import VlaModel

    policy = Policy.load(tiny_vla, deterministic_batch=8)
    for name, slots in (("one", 3), ("other", 1)):
        model = VlaModel(policy, name="tiny", max_batch=8)
        run(model, replace(ONE_TASK, temperature=1.0, slots=slots), tmp_path / name, ticks=12)
    require_same_episodes(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_mid_episode_is_replaced_and_the_counts_stay_right(signal_number, tmp_path):
    victims: list[int] = []

    def strike(answers: int) -> None:
        if answers >= 6 and not victims:
            victims.append(only_worker())
            os.kill(victims[0], signal_number)

    config = replace(ONE_TASK, step_deadline_s=15.0)
    report = run(WanderingModel(strike), config, tmp_path / "episodes")
    require_every_state_once(report, config)
    (loss,) = report.workers_lost
    assert [loss["pid"]] == victims and loss["jobs"]
    again = {(episode.task, episode.initial_state) for episode in report.episodes if episode.attempts == 2}
    assert again == {tuple(key.split(":")) for key in loss["jobs"]}
    assert not psutil.pid_exists(victims[0])


def only_worker() -> int:
    """Process id of the pool's one worker."""
    (pid,) = (child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
    return pid
