"""Episode files -> LeRobotDataset v3.0: the layout on disk, read here with pyarrow alone.

Whether the real lerobot agrees is measured in benchmarks/lerobot_export.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from protos import episode_pb2, lerobot
from protos.codec import ImageFormat, encode_image, encode_tensor
from protos.episode_file import EpisodeWriter
from protos.image import decode_png

pa = pytest.importorskip("pyarrow", reason="the export needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="the export needs pyarrow")

from robot_client.export import CannotExport, Export, export, write_dataset  # noqa: E402
from robot_client.lerobot.film import psnr_db  # noqa: E402
from robot_client.lerobot.statistics import merged, statistics  # noqa: E402
from robot_client.lerobot.writer import DatasetWriter  # noqa: E402

POLICY, HOLD, EXPERT = episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_HOLD, episode_pb2.SOURCE_EXPERT
SUCCESS, FAILURE, ERROR = episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE, episode_pb2.OUTCOME_ERROR
TRAIN, EVALUATE = episode_pb2.PURPOSE_TRAIN, episode_pb2.PURPOSE_EVALUATE
SIDE, A, K = 16, 2, 3


def tick(decision: int, index: int, value: float, **options) -> episode_pb2.Tick:
    return episode_pb2.Tick(
        **{"decision": decision, "index": index, "action": [value, -value], "source": POLICY, **options}
    )


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def write(
    folder: Path,
    name: str,
    executed: list[list[episode_pb2.Tick]],
    *,
    outcome: episode_pb2.Outcome = SUCCESS,
    terminal: bool = True,
    purpose: episode_pb2.Purpose = TRAIN,
    tick_rate_hz: float = 20,
    side: int = SIDE,
    later_side: int | None = None,
    image_format: ImageFormat = "png",
    answered: bool = False,
    instruction: str = "pick up the bowl",
) -> Path:
    """An episode whose decision d is followed by executed[d]; its image is pixels(d), its state (d, d/2)."""
    folder.mkdir(parents=True, exist_ok=True)
    start = episode_pb2.EpisodeStart(
        episode_id=name, purpose=purpose, tick_rate_hz=tick_rate_hz, arm="fake", state_names=["reach", "grip"], seed=5
    )
    writer = EpisodeWriter(folder / f"{name}.episode", start)
    for d, ticks in enumerate(executed):
        here = later_side or side if d else side
        shown = encode_image(pixels(d) if here == SIDE else np.zeros((here, here, 3), np.uint8), image_format)
        observation = episode_pb2.Observation(
            images={"agentview": shown},
            state=encode_tensor(np.array([d, d / 2], np.float32)),
            instruction=instruction,
            capture_time_ns=1000 + d,
        )
        writer.decision(
            episode_pb2.Decision(decision=d, observation=observation, chunk=answer(d) if answered else None)
        )
        writer.executed(ticks)
    writer.finish(episode_pb2.EpisodeEnd(outcome=outcome, terminal=terminal))
    return folder / f"{name}.episode"


def answer(d: int) -> episode_pb2.Chunk:
    return episode_pb2.Chunk(
        actions=encode_tensor(np.full((K, A), d / 10, np.float32)),
        token_ids=encode_tensor(np.arange(K * A, dtype=np.int32) + d),
        token_logprobs=encode_tensor(np.full(K * A, -0.5 - d, np.float32)),
        version=7,
        temperature=0.5,
    )


TWO_BY_TWO = [[tick(0, 0, 0.1), tick(0, 1, 0.2)], [tick(1, 0, 0.3), tick(1, 1, 0.4)], [tick(2, 0, 0.5)]]
"""Observations 2 ticks apart; the last frame is shorter."""


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    return tmp_path / "episodes"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


def frames(out: Path):
    return pq.read_table(out / "data" / "chunk-000" / "file-000.parquet", partitioning=None)


def info(out: Path) -> dict:
    return json.loads((out / "meta" / "info.json").read_text())


def test_the_files_are_those_of_version_3(episodes, out):
    write(episodes, "e", TWO_BY_TWO)
    write_dataset(Export(episodes=(episodes,), out=out))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
    ]
    said = info(out)
    assert (said["codebase_version"], said["fps"], said["robot_type"]) == ("v3.0", 10, "fake")
    assert (said["total_episodes"], said["total_frames"], said["total_tasks"]) == (1, 3, 1)
    assert said["splits"] == {"train": "0:1"} and said["video_path"] is None
    assert said["features"]["action"] == {"dtype": "float32", "shape": [2], "names": ["action_0", "action_1"]}
    assert said["features"]["observation.state"]["names"] == ["reach", "grip"]
    assert said["features"]["observation.images.agentview"]["shape"] == [SIDE, SIDE, 3]
    assert set(frames(out).column_names) == set(said["features"]) == set(frames(out).schema.names)


def test_a_frame_is_an_observation_with_the_ticks_executed_from_it(episodes, out):
    write(episodes, "e", TWO_BY_TWO)
    summary = write_dataset(Export(episodes=(episodes,), out=out))
    assert (summary.episodes, summary.frames, summary.ticks, summary.fps) == (1, 3, 5, 10)
    rows = frames(out).to_pydict()
    np.testing.assert_allclose(rows["action"], [[0.1, -0.1], [0.3, -0.3], [0.5, -0.5]])
    np.testing.assert_allclose(rows["executed.actions"][0], [0.1, -0.1, 0.2, -0.2])
    np.testing.assert_allclose(rows["executed.actions"][2], [0.5, -0.5, 0, 0])
    assert rows["executed.is_pad"] == [[False, False], [False, False], [False, True]]
    assert rows["executed.source"] == [[1, 1], [1, 1], [1, 0]]
    assert rows["executed.decision"] == [[0, 0], [1, 1], [2, 0]]
    assert rows["executed.index"] == [[0, 1], [0, 1], [0, 0]]
    assert rows["decision"] == [0, 1, 2] and rows["tick"] == [0, 2, 4]
    assert rows["observation.state"] == [[0, 0], [1, 0.5], [2, 1]]
    assert rows["capture_time_ns"] == [1000, 1001, 1002]
    np.testing.assert_allclose(rows["timestamp"], [0, 0.1, 0.2])


def test_with_a_tick_for_every_observation_frames_are_ticks(episodes, out):
    write(episodes, "e", [[tick(d, 0, d / 10)] for d in range(4)])
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert info(out)["fps"] == 20
    np.testing.assert_allclose(rows["action"], rows["executed.actions"])
    assert rows["executed.is_pad"] == [False] * 4  # a column of width 1 holds numbers, not lists


def test_a_tick_of_an_older_answer_belongs_to_the_latest_observation(episodes, out):
    asked_ahead = [[tick(0, 0, 0.1), tick(0, 1, 0.2), tick(0, 2, 0.3)], [tick(1, 1, 0.4), tick(1, 2, 0.5)]]
    write(episodes, "e", asked_ahead)
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert rows["tick"] == [0, 2]  # decision 1 was entered at its index 1, in tick 3
    assert rows["executed.decision"] == [[0, 0, 0], [0, 1, 1]]
    assert rows["executed.index"] == [[0, 1, 0], [2, 1, 2]]
    assert rows["executed.is_pad"] == [[False, False, True], [False] * 3]


def test_ticks_held_while_an_answer_was_awaited_belong_to_the_observation_before(episodes, out):
    awaited = [tick(0, 2, 0, source=HOLD), tick(0, 3, 0, source=HOLD)]
    write(episodes, "e", [[tick(0, 0, 0.1), tick(0, 1, 0.2)], [*awaited, tick(1, 0, 0.3)]])
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert rows["tick"] == [0, 4]
    np.testing.assert_allclose(rows["action"], [[0.1, -0.1], [0.3, -0.3]])


def test_an_observation_of_which_nothing_was_executed_makes_no_frame_and_loses_no_tick(episodes, out):
    write(episodes, "e", [[tick(0, 0, 0.1), tick(0, 1, 0.2)], [], [tick(2, 0, 0.3)]])
    summary = write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert rows["decision"] == [0, 2] and rows["tick"] == [0, 2]
    assert summary.ticks == 3 == sum(not pad for frame in rows["executed.is_pad"] for pad in frame)


def test_the_images_are_kept_bit_for_bit(episodes, out):
    write(episodes, "a", TWO_BY_TWO, image_format="png")
    write(episodes, "b", TWO_BY_TWO, image_format="raw")
    summary = write_dataset(Export(episodes=(episodes,), out=out))
    shown = [decode_png(cell["bytes"]) for cell in frames(out)["observation.images.agentview"].to_pylist()]
    np.testing.assert_array_equal(shown, [pixels(d) for d in (0, 1, 2, 0, 1, 2)])
    assert summary.distances == {} and "bit for bit" in str(summary)


def test_an_answer_keeps_its_tokens_and_log_probabilities(episodes, out):
    write(episodes, "answered", TWO_BY_TWO, answered=True)
    write(episodes, "shown", TWO_BY_TWO)
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    np.testing.assert_allclose(rows["answer.actions"][1], [0.1] * K * A)
    assert rows["answer.token_ids"][1] == [1, 2, 3, 4, 5, 6]
    assert rows["answer.token_logprobs"][1] == [-1.5] * K * A
    assert rows["answer.version"] == [7, 7, 7, -1, -1, -1]
    assert rows["answer.temperature"] == [0.5, 0.5, 0.5, 0, 0, 0]


def test_what_an_expert_would_have_done_is_kept_beside_what_was_done(episodes, out):
    watched = [[tick(0, 0, 0.1, expert_action=[0.7, 0.8]), tick(0, 1, 0.2)], [tick(1, 0, 0.3, source=EXPERT)]]
    write(episodes, "e", watched)
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert rows["expert.watched"] == [[True, False], [False, False]]
    np.testing.assert_allclose(rows["expert.actions"][0], [0.7, 0.8, 0, 0])
    np.testing.assert_allclose(rows["action"], [[0.1, -0.1], [0.3, -0.3]])
    write_dataset(Export(episodes=(episodes,), out=out.with_name("labels"), action="expert"))
    np.testing.assert_allclose(frames(out.with_name("labels"))["action"].to_pylist(), [[0.7, 0.8], [0.3, -0.3]])


def test_reasons_are_kept_a_line_for_each_tick(episodes, out):
    held = [[tick(0, 0, 0.1, reason="x clipped\nfrom 2"), tick(0, 1, 0.0, source=HOLD), tick(0, 2, 0, reason="late")]]
    write(episodes, "e", held)
    write_dataset(Export(episodes=(episodes,), out=out))
    assert frames(out)["executed.reasons"].to_pylist() == ["x clipped from 2\n\nlate"]


def test_the_end_of_an_episode_says_how_it_ended(episodes, out):
    write(episodes, "a", TWO_BY_TWO)
    write(episodes, "b", TWO_BY_TWO, outcome=FAILURE, terminal=False)
    write(episodes, "c", TWO_BY_TWO, outcome=FAILURE)
    write_dataset(Export(episodes=(episodes,), out=out))
    rows = frames(out).to_pydict()
    assert rows["next.done"] == [False, False, True] * 3
    assert rows["next.success"] == [False, False, True] + [False] * 6
    assert rows["next.reward"] == [0, 0, 1] + [0] * 6
    assert rows["next.truncated"] == [False] * 5 + [True] + [False] * 3
    assert json.loads(rows["episode.end"][5]) == {"outcome": "OUTCOME_FAILURE"}
    assert json.loads(rows["episode.start"][0])["seed"] == "5"


def test_episodes_follow_each_other_in_the_order_of_their_files(episodes, out):
    write(episodes / "sub", "b", TWO_BY_TWO, instruction="open the drawer")
    write(episodes, "a", TWO_BY_TWO[:2])
    write(episodes, "z", TWO_BY_TWO)
    write_dataset(Export(episodes=(episodes / "sub", episodes), out=out))
    rows = frames(out).to_pydict()
    assert rows["episode_index"] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert rows["frame_index"] == [0, 1, 0, 1, 2, 0, 1, 2]
    assert rows["index"] == list(range(8))
    assert rows["task_index"] == [0, 0, 1, 1, 1, 0, 0, 0]
    tasks = pq.read_table(out / "meta" / "tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "__index_level_0__": ["pick up the bowl", "open the drawer"]}
    meta = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet", partitioning=None).to_pydict()
    assert meta["length"] == [2, 3, 3]
    assert (meta["dataset_from_index"], meta["dataset_to_index"]) == ([0, 2, 5], [2, 5, 8])
    assert meta["tasks"] == [["pick up the bowl"], ["open the drawer"], ["pick up the bowl"]]
    assert meta["stats/action/max"][0] == pytest.approx([0.3, -0.1])


def test_outcomes_and_purposes_are_chosen_and_the_rest_is_counted(episodes, out):
    write(episodes, "good", TWO_BY_TWO)
    write(episodes, "failed", TWO_BY_TWO, outcome=FAILURE)
    write(episodes, "crashed", TWO_BY_TWO, outcome=ERROR)
    write(episodes, "exam", TWO_BY_TWO, purpose=EVALUATE)
    write(episodes, "still", [[]])
    cut = write(episodes, "cut", TWO_BY_TWO)
    cut.write_bytes(cut.read_bytes()[:-5])
    summary = write_dataset(Export(episodes=(episodes,), out=out))
    assert summary.episodes == 2
    assert summary.refused == {"outcome_error": 1, "purpose_evaluate": 1, "nothing_executed": 1, "damaged": 1}
    asked = Export(episodes=(episodes,), out=out.with_name("errors"), outcomes=("error",))
    assert write_dataset(asked).episodes == 1


def test_observations_that_are_not_equally_far_apart_need_a_stated_fps(episodes, out):
    write(episodes, "e", [[tick(0, 0, 0.1)], [tick(1, 0, 0.2), tick(1, 1, 0.3)], [tick(2, 0, 0.4)]])
    with pytest.raises(CannotExport, match=r"\{1: 1, 2: 1\} \(ticks apart: how often\) at 20 ticks a second"):
        write_dataset(Export(episodes=(episodes,), out=out))
    assert write_dataset(Export(episodes=(episodes,), out=out, fps=10)).fps == 10
    assert frames(out)["tick"].to_pylist() == [0, 1, 3]


def test_actions_that_differ_in_length_are_refused_by_name(episodes, out):
    write(episodes, "e", [[tick(0, 0, 0.1), tick(0, 1, 0.1, action=[0.1])]])
    with pytest.raises(CannotExport, match=r"e\.episode: its actions differ in length: \[1, 2\]"):
        write_dataset(Export(episodes=(episodes,), out=out))


def test_an_episode_that_cannot_be_read_is_named_and_not_the_output(tmp_path, out):
    (tmp_path / "in" / "a.episode").mkdir(parents=True)
    with pytest.raises(CannotExport, match=r"a.episode cannot be read: Is a directory"):
        export(Export(episodes=(tmp_path / "in",), out=out))


def test_an_fps_need_not_be_a_whole_number(episodes, out):
    write(episodes, "e", [[tick(d, k, 0.1) for k in range(8)] for d in range(2)])
    write_dataset(Export(episodes=(episodes,), out=out))
    assert info(out)["fps"] == 2.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tick_rate_hz": 10}, "must agree in cameras, state, action and tick rate"),
        ({"side": 8}, "must agree in cameras, state, action and tick rate"),
    ],
)
def test_episodes_of_different_kinds_make_no_data_set(episodes, out, other, message):
    write(episodes, "a", TWO_BY_TWO)
    write(episodes, "b", TWO_BY_TWO, **other)
    with pytest.raises(CannotExport, match=message):
        write_dataset(Export(episodes=(episodes,), out=out))
    assert not out.exists()


def test_the_data_set_appears_as_a_whole_or_not_at_all(episodes, out):
    write(episodes, "a", TWO_BY_TWO)
    write(episodes, "b", TWO_BY_TWO, later_side=8)  # is seen when the first is written
    with pytest.raises(CannotExport, match=r"b\.episode: agentview: must be 16x16 as in the first frame, got 8x8"):
        write_dataset(Export(episodes=(episodes,), out=out))
    assert sorted(path.name for path in out.parent.iterdir()) == ["episodes"]


def test_an_existing_folder_is_never_overwritten(episodes, out):
    out.mkdir()
    write(episodes, "e", TWO_BY_TWO)
    with pytest.raises(CannotExport, match="exists already"):
        export(Export(episodes=(episodes,), out=out))


@pytest.mark.parametrize("made", [[], ["crashed"]])
def test_nothing_to_export_is_said(episodes, out, made):
    episodes.mkdir()
    for name in made:
        write(episodes, name, TWO_BY_TWO, outcome=ERROR)
    with pytest.raises(CannotExport, match="found none" if not made else r"left out: \{'outcome_error': 1\}"):
        write_dataset(Export(episodes=(episodes,), out=out))


@pytest.mark.parametrize("wrong", [{"crf": 99}, {"fps": 0}, {"episodes": ()}])
def test_options_that_make_no_sense_are_refused(out, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Export(**{"episodes": (Path("e"),), "out": out, **wrong})


def test_a_file_that_has_grown_to_its_limit_is_followed_by_another(out):
    features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
    writer = DatasetWriter(out, features, fps=10, robot_type="fake", data_file_mb=0)
    for n in range(3):
        writer.add({"action": np.full((2, 2), n, np.float32)}, {}, ["do"] * 2)
    writer.finish()
    assert [path.name for path in sorted((out / "data").rglob("*.parquet"))] == [
        f"file-00{n}.parquet" for n in range(3)
    ]
    meta = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet", partitioning=None).to_pydict()
    assert (meta["data/chunk_index"], meta["data/file_index"]) == ([0, 0, 0], [0, 1, 2])


def test_a_chunk_is_a_folder_of_a_thousand_files():
    assert lerobot.DATA.format(**lerobot.place(999)) == "data/chunk-000/file-999.parquet"
    assert lerobot.DATA.format(**lerobot.place(1000)) == "data/chunk-001/file-000.parquet"


@pytest.mark.parametrize("images", ["h264", "av1"])
def test_videos_hold_every_frame_in_order_and_say_how_far_they_are(episodes, out, images):
    av = pytest.importorskip("av", reason="videos need av")
    for n in range(2):
        write(episodes, f"e-{n}", [[tick(d, 0, 0.1), tick(d, 1, 0.1)] for d in range(4)], side=64)
    summary = write_dataset(Export(episodes=(episodes,), out=out, images=images))
    with av.open(str(out / "videos/observation.images.agentview/chunk-000/file-000.mp4")) as film:
        times_s = [frame.time for frame in film.decode(video=0)]
    assert times_s == pytest.approx([n / 10 for n in range(8)])
    meta = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet", partitioning=None).to_pydict()
    key = "videos/observation.images.agentview"
    assert meta[f"{key}/from_timestamp"] == pytest.approx([0, 0.4])
    assert meta[f"{key}/to_timestamp"] == pytest.approx([0.4, 0.8])
    assert "observation.images.agentview" not in frames(out).column_names
    assert info(out)["features"]["observation.images.agentview"]["info"]["video.codec"] == images
    assert summary.distances["agentview"].db > 45 and "PSNR" in str(summary)


def test_a_video_of_odd_images_is_refused_before_anything_is_written(episodes, out):
    pytest.importorskip("av", reason="videos need av")
    write(episodes, "e", TWO_BY_TWO, side=15)
    with pytest.raises(CannotExport, match=r"even heights and widths, got \[\('agentview', 15, 15\)\]"):
        write_dataset(Export(episodes=(episodes,), out=out, images="h264"))
    assert not out.exists()


def test_psnr_is_ten_times_the_logarithm_of_the_ratio_of_squares():
    assert psnr_db(255**2) == 0 and psnr_db(255**2 / 1000) == pytest.approx(30) and psnr_db(0) == math.inf


def test_statistics_of_two_parts_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(size=(50, 3))
    whole, parts = statistics(values), merged(statistics(values[:20]), statistics(values[20:]))
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(parts[name], whole[name])


def test_a_quantile_is_one_of_the_values():
    assert statistics(np.arange(1.0, 101)[:, None])["q10"].tolist() == [10]
    assert statistics(np.array([[3.0]]))["q99"].tolist() == [3]
