"""Demonstrations: what was executed and what the expert meant, successes only, the same again from the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protos import episode_pb2
from protos.codec import decode_image, decode_tensor
from protos.episode_file import Episode, read_episode
from sim.demos import DemosConfig, plan, record_demos, recorder_for
from sim.recorder import Plan
from sim.scene import Scene
from sim.suites import find_suite, find_task

FIRST = Plan(task="robosuite/0", index=0, initial_state="seed:0")


@pytest.fixture(scope="module")
def lift() -> Scene:
    return Scene(find_task("robosuite/0"))


def config_for(out: Path, *, stride: int = 10, **settings) -> DemosConfig:
    return DemosConfig(suite="robosuite", tasks=(0,), out=out, size_px=48, processes=1, stride=stride, **settings)


def record(scene: Scene, out: Path, item: Plan = FIRST, **settings) -> Episode:
    assert recorder_for(config_for(out, **settings), scene).record(item).success
    return read_episode(out / f"{item.key}.episode")


def executed(episode: Episode) -> np.ndarray:
    return np.array([tick.action for tick in episode.ticks])


def labels(episode: Episode) -> np.ndarray:
    return np.array([tick.expert_action for tick in episode.ticks])


def test_an_episode_names_itself_and_ends_in_success(lift: Scene, tmp_path: Path) -> None:
    episode = record(lift, tmp_path)
    start = episode.start
    assert (start.task, start.initial_state, start.arm) == ("robosuite/0", "seed:0", "robosuite")
    assert start.purpose == episode_pb2.PURPOSE_DEMONSTRATE and start.asset_tree and start.tick_rate_hz == 20
    assert len(start.state_names) == 8
    assert episode.end.outcome == episode_pb2.OUTCOME_SUCCESS and episode.end.terminal


def test_an_observation_stands_before_every_stride_of_ticks(lift: Scene, tmp_path: Path) -> None:
    episode = record(lift, tmp_path, stride=5)
    places = [(tick.decision, tick.index) for tick in episode.ticks]
    assert places == [(tick // 5, tick % 5) for tick in range(len(places))]
    assert [decision.decision for decision in episode.decisions] == list(range(-(-len(places) // 5)))
    for decision in episode.decisions:
        assert decode_image(decision.observation.images["agentview"]).shape == (48, 48, 3)
        assert decode_tensor(decision.observation.state).shape == (8,)
        assert decision.observation.instruction == lift.task.instruction


def test_labels_are_clean_and_executed_actions_are_shaken(lift: Scene, tmp_path: Path) -> None:
    shaken, still = record(lift, tmp_path, noise=0.3), record(lift, tmp_path, noise=0.0)
    assert np.abs(executed(shaken) - labels(shaken))[:, :3].max() > 0.05
    np.testing.assert_array_equal(executed(shaken)[:, 3:], labels(shaken)[:, 3:])
    np.testing.assert_allclose(executed(still), labels(still), atol=1e-6)
    assert {tick.source for tick in shaken.ticks} == {episode_pb2.SOURCE_EXPERT}


def test_noise_rests_while_the_fingers_work(lift: Scene, tmp_path: Path) -> None:
    episode = record(lift, tmp_path)
    at_rest = np.linalg.norm(labels(episode)[:, :3], axis=1) == 0
    assert at_rest.any()
    assert not executed(episode)[at_rest, :3].any()


def test_the_same_seed_records_the_same_episode_and_another_seed_another(lift: Scene, tmp_path: Path) -> None:
    first = record(lift, tmp_path)
    again = record(lift, tmp_path)
    other = record(lift, tmp_path, seed=1)
    assert [d.observation.images["agentview"].data for d in first.decisions] == [
        d.observation.images["agentview"].data for d in again.decisions
    ]
    assert first.ticks == again.ticks
    assert first.ticks != other.ticks


def test_recordings_begin_within_the_start_offset(lift: Scene, tmp_path: Path) -> None:
    def start_of(index: int, offset_m: float) -> np.ndarray:
        item = Plan(task="robosuite/0", index=index, initial_state="seed:0")
        episode = record(lift, tmp_path, item, start_offset_m=offset_m)
        return decode_tensor(episode.decisions[0].observation.state)[:3]

    given = start_of(0, 0.0)
    distances = [float(np.linalg.norm(start_of(index, 0.06) - given)) for index in range(4)]
    assert max(distances) < 0.07 and max(distances) > 0.01


def test_failures_are_counted_and_not_kept(lift: Scene, tmp_path: Path) -> None:
    recorded = recorder_for(config_for(tmp_path, attempts=2, speed=0.01, stride=300), lift).record(FIRST)
    assert (recorded.success, recorded.failures, recorded.ticks) == (False, 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_plans_go_round_the_train_states_only(tmp_path: Path) -> None:
    items = plan(DemosConfig(suite="libero_object", episodes_per_task=31, out=tmp_path), find_suite("libero_object"))
    assert len(items) == 10 * 31 and len({item.key for item in items}) == len(items)
    assert {int(item.initial_state) for item in items} == set(range(30))


@pytest.mark.parametrize("split", ["held_out", "fresh", "paper"])
def test_states_that_evaluations_report_on_are_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match="split"):
        DemosConfig(split=split, out=tmp_path)


def test_a_learner_is_a_server_or_a_checkpoint_and_is_looked_for_before_anything_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a server's or a checkpoint, got 'localhost:1' and 'nano'"):
        config_for(tmp_path, server="localhost:1", learner="nano")
    with pytest.raises(SystemExit, match="the policy server ended with code 2"):
        record_demos(config_for(tmp_path / "demos", learner=str(tmp_path / "nothing")))
    assert not (tmp_path / "demos").exists()


def test_a_task_without_an_expert_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[7\]"):
        plan(DemosConfig(suite="robosuite", tasks=(7,), out=tmp_path), find_suite("robosuite"))


def test_a_run_that_was_killed_is_resumed_without_recording_anything_twice(tmp_path: Path) -> None:
    config = config_for(tmp_path, episodes_per_task=2, stride=20)
    kept = tmp_path / "robosuite-0-0000.episode"
    kept.write_bytes(b"recorded before")
    before = kept.stat().st_mtime_ns
    (tmp_path / "robosuite-0-0001.episode.partial").write_bytes(b"left by a killed run")
    assert record_demos(config) == 0
    assert kept.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "demos.json",
        "robosuite-0-0000.episode",
        "robosuite-0-0001.episode",
    ]
    report = json.loads((tmp_path / "demos.json").read_text())
    assert report["missing"] == 0 and report["tasks"][0]["recorded"] == 1
