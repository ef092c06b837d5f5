"""A LeRobot data set made of episodes teaches what the episodes teach; another's is read as what it says it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from protos import codec, episode_pb2
from protos.episode_file import EpisodeWriter
from rl_trainer.demonstrations import Demonstration, Source
from rl_trainer.lerobot_dataset import UnreadableDataset
from tests.trainer import fake_demonstrations as fake

pa = pytest.importorskip("pyarrow", reason="LeRobot data sets need pyarrow")

from robot_client.export import Export, write_dataset  # noqa: E402
from robot_client.lerobot.writer import DatasetWriter  # noqa: E402


def read(*paths: Path, **options: object) -> tuple[list[Demonstration], Counter]:
    refused: Counter[str] = Counter()
    return list(Source(paths=paths, **options).read(refused)), refused  # type: ignore[arg-type]


def assert_same(ours: Demonstration, theirs: Demonstration, *, pixels: bool = True) -> None:
    for name in ("name", "instruction", "state_names", "tick_rate_hz"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("state_DS", "tick_D", "actions_TA", "led_T"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    if pixels:
        np.testing.assert_array_equal(ours.frames_DHW3, theirs.frames_DHW3)


def test_it_teaches_what_its_episodes_teach(tmp_path: Path) -> None:
    episodes, dataset = tmp_path / "episodes", tmp_path / "dataset"
    for n, (ticks, expert) in enumerate([(10, True), (7, False), (4, True)]):
        fake.write_episode(episodes, f"e-{n}", fake.actions(ticks, seed=n), with_expert=expert)
    write_dataset(Export(episodes=(episodes,), out=dataset))
    ours, theirs = read(episodes)[0], read(dataset)[0]
    assert [d.name for d in theirs] == ["e-0", "e-1", "e-2"]
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_where_an_expert_only_watched_nobody_led(tmp_path: Path) -> None:
    write_mixed(tmp_path / "e" / "mixed.episode")
    write_dataset(Export(episodes=(tmp_path / "e",), out=tmp_path / "dataset", fps=10))
    [ours], [theirs] = read(tmp_path / "e")[0], read(tmp_path / "dataset")[0]
    assert theirs.led_T.tolist() == [True, True, False, False, False, True]
    assert theirs.tick_D.tolist() == [0, 2, 5]
    assert_same(ours, theirs)


@pytest.mark.parametrize("images", ["h264", "av1"])
def test_videos_show_each_decision_its_own_frame(tmp_path: Path, images) -> None:
    pytest.importorskip("av", reason="videos need av")
    for n in range(3):
        write_greys(tmp_path / "e" / f"{n}.episode", [40 * n + 10 * d for d in range(5)])
    write_dataset(Export(episodes=(tmp_path / "e",), out=tmp_path / "dataset", images=images))
    ours, theirs = read(tmp_path / "e")[0], read(tmp_path / "dataset")[0]
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, pixels=False)
        assert np.abs(a.frames_DHW3.astype(int) - b.frames_DHW3).max() <= 3  # neighbours are 10 apart


def test_evaluations_and_failures_are_refused_and_counted(tmp_path: Path) -> None:
    labels = fake.actions(8)
    fake.write_episode(tmp_path / "e", "good", labels)
    fake.write_episode(tmp_path / "e", "exam", labels, purpose=episode_pb2.PURPOSE_EVALUATE)
    fake.write_episode(tmp_path / "e", "failed", labels, outcome=episode_pb2.OUTCOME_FAILURE)
    everything = Export(episodes=(tmp_path / "e",), out=tmp_path / "dataset", purposes=("demonstrate", "evaluate"))
    write_dataset(everything)
    used, refused = read(tmp_path / "dataset")
    assert [d.name for d in used] == ["good"]
    assert refused == {"purpose_evaluate": 1, "outcome_failure": 1}
    used, _ = read(tmp_path / "dataset", failed=True)
    assert sorted(d.name for d in used) == ["failed", "good"]


def test_it_is_found_in_a_folder_among_other_demonstrations(tmp_path: Path) -> None:
    fake.write_episode(tmp_path / "e", "exported", fake.actions(8))
    write_dataset(Export(episodes=(tmp_path / "e",), out=tmp_path / "all" / "dataset"))
    fake.write_episode(tmp_path / "all", "episode", fake.actions(8))
    assert sorted(d.name for d in read(tmp_path / "all")[0]) == ["episode", "exported"]


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Two recordings with a frame for each of 9 ticks, as anybody records them; the second failed."""
    features = {
        "observation.images.front": {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["reach", "grip"]},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    writer = DatasetWriter(tmp_path / "others", features, fps=10, robot_type="so100")
    for n in range(2):
        columns = {
            "observation.state": np.arange(18, dtype=np.float32).reshape(9, 2),
            "action": fake.actions(9, seed=n),
            "next.success": np.arange(9)[:, None] == (8 if n == 0 else 9),
        }
        frames = {"observation.images.front": [np.full((8, 8, 3), 10 * t, np.uint8) for t in range(9)]}
        writer.add(columns, frames, ["fold the towel"] * 9)
    writer.finish()
    return tmp_path / "others"


def test_of_others_every_nth_frame_is_a_decision_and_every_frame_a_tick(others: Path) -> None:
    [demonstration], refused = read(others, camera="front", hdf5_stride=4)
    assert refused == {"outcome_failure": 1}
    assert (demonstration.name, demonstration.instruction) == ("others/0", "fold the towel")
    assert (demonstration.tick_rate_hz, demonstration.state_names) == (10.0, ("reach", "grip"))
    assert demonstration.tick_D.tolist() == [0, 4, 8]
    assert demonstration.frames_DHW3[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert demonstration.state_DS.tolist() == [[0, 1], [8, 9], [16, 17]]
    np.testing.assert_array_equal(demonstration.actions_TA, fake.actions(9))
    assert demonstration.led_T.all()


def edit_info(folder: Path, **changes: object) -> None:
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_version_is_refused_by_name(others: Path) -> None:
    edit_info(others, codebase_version="v2.1")
    with pytest.raises(UnreadableDataset, match=r"others: codebase_version must be v3\.0, got v2\.1"):
        read(others, camera="front")


def test_a_missing_camera_is_refused_with_those_there_are(others: Path) -> None:
    with pytest.raises(UnreadableDataset, match=r"camera 'agentview' is missing, available: \['front'\]"):
        read(others)


def test_a_missing_column_is_refused_with_those_there_are(others: Path) -> None:
    features = json.loads((others / "meta" / "info.json").read_text())["features"]
    edit_info(others, features={name: feature for name, feature in features.items() if name != "action"})
    with pytest.raises(UnreadableDataset, match=r"columns \['action'\] are missing, available: .*'next\.success'"):
        read(others, camera="front")


@pytest.mark.parametrize("text", ["", "[]", '{"features": {}}', '{"codebase_version": "v3.0"}'])
def test_what_is_no_data_set_is_refused_by_name(others: Path, text: str) -> None:
    (others / "meta" / "info.json").write_text(text)
    with pytest.raises(UnreadableDataset, match="others"):
        read(others, camera="front")


def test_a_damaged_file_is_refused_by_name(others: Path) -> None:
    (others / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UnreadableDataset, match=r"file-000\.parquet: not a readable parquet file"):
        read(others, camera="front")


def test_a_damaged_image_refuses_its_recording_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pyarrow.parquet as pq

    for n in range(2):
        fake.write_episode(tmp_path / "e", f"e-{n}", fake.actions(8, seed=n))
    write_dataset(Export(episodes=(tmp_path / "e",), out=tmp_path / "dataset"))
    path = tmp_path / "dataset" / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    images = table["observation.images.agentview"].to_pylist()
    images[0]["bytes"] = b"\x89PNG and no more"
    column = pa.array(images, table.schema.field("observation.images.agentview").type)
    pq.write_table(table.set_column(0, table.schema.field(0), column), path)
    used, refused = read(tmp_path / "dataset")
    assert [d.name for d in used] == ["e-1"] and refused == {"damaged": 1}
    assert "refused dataset/0: data is not a readable PNG" in capsys.readouterr().out


def write_mixed(path: Path) -> None:
    """The expert drives, then the policy while it watches, then the expert; observations 2, 3 and 1 ticks apart."""
    path.parent.mkdir()
    start = episode_pb2.EpisodeStart(episode_id="mixed", purpose=episode_pb2.PURPOSE_DEMONSTRATE, tick_rate_hz=20)
    writer = EpisodeWriter(path, start)
    for decision, (source, count) in enumerate(
        [(episode_pb2.SOURCE_EXPERT, 2), (episode_pb2.SOURCE_POLICY, 3), (episode_pb2.SOURCE_EXPERT, 1)]
    ):
        image = codec.encode_image(np.full((8, 8, 3), decision, np.uint8), "raw")
        observation = episode_pb2.Observation(images={"agentview": image}, instruction="stack")
        writer.decision(episode_pb2.Decision(decision=decision, observation=observation))
        writer.executed(
            [
                episode_pb2.Tick(
                    decision=decision, index=i, action=[0.1 * i] * 7, expert_action=[0.5] * 7, source=source
                )
                for i in range(count)
            ]
        )
    writer.finish(episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_SUCCESS, terminal=True))


def write_greys(path: Path, greys: list[int]) -> None:
    """An observation of each grey, two ticks apart."""
    path.parent.mkdir(exist_ok=True)
    start = episode_pb2.EpisodeStart(episode_id=path.stem, purpose=episode_pb2.PURPOSE_DEMONSTRATE, tick_rate_hz=20)
    writer = EpisodeWriter(path, start)
    for decision, grey in enumerate(greys):
        image = codec.encode_image(np.full((64, 64, 3), grey, np.uint8), "png")
        observation = episode_pb2.Observation(images={"agentview": image}, instruction="stack")
        writer.decision(episode_pb2.Decision(decision=decision, observation=observation))
        source = episode_pb2.SOURCE_EXPERT
        writer.executed(
            [episode_pb2.Tick(decision=decision, index=i, action=[0.1] * 7, source=source) for i in range(2)]
        )
    writer.finish(episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_SUCCESS, terminal=True))
