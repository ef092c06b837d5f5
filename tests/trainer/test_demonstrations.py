from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from protos import episode_pb2
from protos.episode_file import read_episode
from rl_trainer.demonstrations import Source, chunk_labels, demonstration_from_episode, led_chunks, no_ops
from tests.trainer import fake_demonstrations as fake


def read(*paths: Path, **options: object) -> tuple[list, Counter]:
    refused: Counter[str] = Counter()
    return list(Source(paths=paths, **options).read(refused)), refused  # type: ignore[arg-type]


def test_a_label_chunk_crosses_the_borders_of_decisions(tmp_path: Path) -> None:
    labels = fake.actions(10)
    demonstration = demonstration_from_episode(
        read_episode(fake.write_episode(tmp_path, "e", labels, stride=4)), "agentview"
    )
    chunks = chunk_labels(demonstration.actions_TA, demonstration.tick_D, 6)
    assert demonstration.tick_D.tolist() == [0, 4, 8]
    np.testing.assert_array_equal(chunks[0], labels[0:6])
    np.testing.assert_array_equal(chunks[1], labels[4:10])


def test_past_the_end_the_arm_stands_still_and_the_gripper_stays() -> None:
    labels = fake.actions(10)
    chunk = chunk_labels(labels, np.array([8]), 6)[0]
    np.testing.assert_array_equal(chunk[:2], labels[8:])
    np.testing.assert_array_equal(chunk[2:, :6], 0)
    np.testing.assert_array_equal(chunk[2:, 6], labels[-1, 6])


def test_a_chunk_in_which_the_expert_only_watched_is_no_label() -> None:
    led = np.array([False] * 6 + [True] * 6)
    assert led_chunks(led, np.array([0, 4, 6, 8, 11]), 4).tolist() == [False, False, True, True, True]


def test_the_expert_is_the_label_where_it_watched_else_what_was_executed(tmp_path: Path) -> None:
    labels = fake.actions(8)
    watched = read(fake.write_episode(tmp_path, "watched", labels, with_expert=True))[0][0]
    alone = read(fake.write_episode(tmp_path, "alone", labels, with_expert=False))[0][0]
    np.testing.assert_array_equal(watched.actions_TA, labels)
    np.testing.assert_array_equal(alone.actions_TA, labels)


def test_evaluation_episodes_and_failures_are_refused_and_counted(tmp_path: Path) -> None:
    labels = fake.actions(8)
    fake.write_episode(tmp_path, "good", labels)
    fake.write_episode(tmp_path, "rollout", labels, purpose=episode_pb2.PURPOSE_TRAIN)
    fake.write_episode(tmp_path, "exam", labels, purpose=episode_pb2.PURPOSE_EVALUATE)
    fake.write_episode(tmp_path, "use", labels, purpose=episode_pb2.PURPOSE_DEPLOY)
    fake.write_episode(tmp_path, "failed", labels, outcome=episode_pb2.OUTCOME_FAILURE)
    fake.write_episode(tmp_path, "crashed", labels, outcome=episode_pb2.OUTCOME_ERROR)
    used, refused = read(tmp_path)
    assert sorted(d.name for d in used) == ["good", "rollout"]
    assert refused == {"purpose_evaluate": 1, "purpose_deploy": 1, "outcome_failure": 1, "outcome_error": 1}


def test_a_damaged_file_is_named_and_its_neighbours_are_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake.write_episode(tmp_path, "whole", fake.actions(8))
    cut = fake.write_episode(tmp_path, "cut", fake.actions(8))
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "other.hdf5").write_bytes(b"no hdf5")
    used, refused = read(tmp_path)
    assert [d.name for d in used] == ["whole"]
    assert refused == {"damaged": 2}
    printed = capsys.readouterr().out
    assert "cut.episode" in printed and "other.hdf5" in printed


def test_a_missing_camera_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake.write_episode(tmp_path, "e", fake.actions(8))
    used, refused = read(tmp_path, camera="wrist")
    assert not used and refused == {"damaged": 1}
    assert "'wrist' is missing, available: ['agentview']" in capsys.readouterr().out


def test_a_place_without_demonstrations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found none"):
        read(tmp_path)


def test_hdf5_frames_are_turned_by_180_degrees_and_the_gripper_is_one_when_open(tmp_path: Path) -> None:
    raw = fake.actions(9)
    raw[:, -1] = [-1, -1, -1, -1, 1, 1, 1, 1, 1]
    [demonstration], _ = read(fake.write_hdf5(tmp_path / "task.hdf5", raw), hdf5_stride=4)
    assert demonstration.instruction == "open the drawer"
    assert demonstration.name == "task/demo_0"
    frames = demonstration.frames_DHW3
    assert frames.shape == (3, fake.SIDE, fake.SIDE, 3)
    assert frames[:, -1, -1].tolist() == [[0, 0, 255], [4, 0, 255], [8, 0, 255]]
    assert frames.sum() == frames[:, -1, -1].sum()
    np.testing.assert_array_equal(demonstration.actions_TA[:, -1], [1, 1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(demonstration.actions_TA[:, :-1], raw[:, :-1])
    np.testing.assert_allclose(demonstration.state_DS[1], [4, 4, 4, 0.5, 0.5, 0.5, 0.04, 0.04])


def test_no_ops_are_ticks_without_motion_or_a_new_gripper_command() -> None:
    raw = np.zeros((5, 7), np.float32)
    raw[:, -1] = [-1, -1, 1, 1, 1]
    raw[3, 0] = 0.5
    assert no_ops(raw).tolist() == [True, True, False, False, True]


def test_without_no_ops_the_frames_still_belong_to_their_actions(tmp_path: Path) -> None:
    raw = np.zeros((6, 7), np.float32)
    raw[:, -1] = -1
    raw[[1, 2, 4], 0] = [0.1, 0.2, 0.4]
    [demonstration], _ = read(fake.write_hdf5(tmp_path / "t.hdf5", raw), hdf5_stride=2, drop_no_ops=True)
    np.testing.assert_allclose(demonstration.actions_TA[:, 0], [0.1, 0.2, 0.4], rtol=1e-6)
    assert demonstration.tick_D.tolist() == [0, 2]
    assert demonstration.frames_DHW3[:, -1, -1, 0].tolist() == [1, 4]
