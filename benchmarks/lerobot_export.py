"""Exports episodes as LeRobot data sets, has the real lerobot load them, and compares what it gives with the episodes.

    python -m benchmarks.lerobot_export --episodes FOLDER --python /path/to/python-with-lerobot-0.4.4

That interpreter's environment: `pip install lerobot==0.4.4`, Python 3.10 or 3.11, and for videos FFmpeg's libraries
(Debian: libavdevice59).  What is compared is read from the episode files here, not by the exporter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from google.protobuf.json_format import Parse

from protos import episode_pb2, lerobot
from protos.codec import decode_image, decode_tensor
from protos.episode_file import Episode, read_episode
from robot_client.export import Export, Images, files, write_dataset

READER = Path(__file__).with_name("lerobot_reader.py")


@dataclass(frozen=True, kw_only=True)
class LerobotExportConfig:
    """Proves exported data sets against lerobot."""

    episodes: tuple[Path, ...]
    """Episode files, or folders of them"""
    python: Path
    """an interpreter that has lerobot 0.4.4"""
    images: tuple[Images, ...] = ("png", "h264", "av1")
    crf: int = 18
    fps: float | None = None
    """stated where observations are not equally far apart"""
    most: int = 8
    """episodes taken"""


def main(config: LerobotExportConfig) -> int:
    paths = tuple(files(config.episodes)[: config.most])
    episodes = [read_episode(path) for path in paths]
    wrong = 0
    for images in config.images:
        with tempfile.TemporaryDirectory() as place:
            out, read = Path(place) / "dataset", Path(place) / "read.npz"
            began_s = time.perf_counter()
            config_of = Export(episodes=paths, out=out, images=images, crf=config.crf, fps=config.fps)
            summary = write_dataset(config_of)
            print(f"{images}: {summary}; written in {time.perf_counter() - began_s:.1f} s")
            ran = subprocess.run([config.python, READER, out, read], capture_output=True, text=True)
            if ran.returncode:
                sys.exit(f"lerobot cannot read it:\n{ran.stderr[-3000:]}")
            columns = dict(np.load(read, allow_pickle=False))
        report = json.loads(str(columns.pop("report")))
        report["stats_apart"] = {name: float(f"{value:.1e}") for name, value in report["stats_apart"].items()}
        print("\n".join(f"  lerobot's {name}: {value}" for name, value in report.items()))
        differences = compare(columns, episodes, exact=images == "png")
        print("\n".join(f"  {line}" for line in differences))
        wrong += sum("DIFFERS" in line for line in differences) + len(report["schema_differences"])
    return int(wrong > 0)


def compare(columns: dict[str, np.ndarray], episodes: Sequence[Episode], *, exact: bool) -> list[str]:
    """A line for each thing compared."""
    ours: dict[str, list] = {}
    for e, episode in enumerate(episodes):
        mine = columns["episode_index"] == e
        assert Parse(str(columns[lerobot.START][mine][0]), episode_pb2.EpisodeStart()) == episode.start
        by_number = {decision.decision: decision for decision in episode.decisions}
        frames = [by_number[number] for number in columns[lerobot.DECISION][mine]]
        last = np.arange(len(frames)) == len(frames) - 1
        success = episode.end.outcome == episode_pb2.OUTCOME_SUCCESS
        for name, values in {
            lerobot.DONE: last,
            lerobot.SUCCESS: last & success,
            lerobot.REWARD: last * float(success),
            lerobot.TRUNCATED: last & (not episode.end.terminal),
            lerobot.ACTION: [episode.ticks[tick].action for tick in columns[lerobot.TICK][mine]],
            lerobot.STATE: [decode_tensor(f.observation.state) for f in frames],
            lerobot.CAPTURE_TIME_NS: [f.observation.capture_time_ns for f in frames],
            "task": [f.observation.instruction for f in frames],
            **{
                lerobot.IMAGES + camera: [decode_image(f.observation.images[camera]) for f in frames]
                for camera in frames[0].observation.images
            },
            **(answers(frames) if all(f.HasField("chunk") for f in frames) else {}),
        }.items():
            ours.setdefault(name, []).extend(values)
        for name, values in ticks(episode).items():
            ours.setdefault(name, []).extend(np.reshape(values, (len(episode.ticks), -1)))
    kept = ~atleast_2d(columns[lerobot.EXECUTED_IS_PAD]).astype(bool)
    lines = []
    for name, values in ours.items():
        theirs, mine = columns[name], np.array(values)
        if name.startswith(("executed.", "expert.")):  # tick by tick, without what only fills up a frame
            theirs = theirs.reshape(*kept.shape, -1)[kept]
        if name.startswith(lerobot.IMAGES) and not exact:
            squares = np.square(theirs.astype(float) - mine).reshape(len(mine), -1).mean(1)
            overall, worst = (10 * np.log10(255**2 / square) for square in (squares.mean(), squares.max()))
            lines.append(f"{name}: as lerobot decodes it, PSNR {overall:.2f} dB, worst frame {worst:.2f} dB")
        else:
            equal = theirs.shape == mine.shape and (theirs == mine.astype(theirs.dtype)).all()
            lines.append(f"{name} {mine.shape}: {'equal' if equal else 'DIFFERS'}")
    return lines


def answers(frames: Sequence[episode_pb2.Decision]) -> dict[str, list]:
    return {
        lerobot.ANSWER_ACTIONS: [decode_tensor(f.chunk.actions).reshape(-1) for f in frames],
        lerobot.ANSWER_TOKEN_IDS: [decode_tensor(f.chunk.token_ids) for f in frames],
        lerobot.ANSWER_LOGPROBS: [decode_tensor(f.chunk.token_logprobs) for f in frames],
        lerobot.ANSWER_VERSION: [f.chunk.version for f in frames],
        lerobot.ANSWER_TEMPERATURE: [f.chunk.temperature for f in frames],
    }


def ticks(episode: Episode) -> dict[str, list]:
    watched = any(tick.expert_action for tick in episode.ticks)
    return {
        lerobot.EXECUTED_ACTIONS: [tick.action for tick in episode.ticks],
        lerobot.EXECUTED_SOURCE: [tick.source for tick in episode.ticks],
        lerobot.EXECUTED_DECISION: [tick.decision for tick in episode.ticks],
        lerobot.EXECUTED_INDEX: [tick.index for tick in episode.ticks],
    } | ({lerobot.EXPERT_ACTIONS: [tick.expert_action for tick in episode.ticks]} if watched else {})


def atleast_2d(column: np.ndarray) -> np.ndarray:
    """(F, M), also where lerobot gives one number a frame."""
    return column.reshape(len(column), -1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LerobotExportConfig, description=__doc__)))
