"""Episode files -> a LeRobotDataset v3.0 that lerobot 0.4.4 reads (its columns: protos/lerobot.py).

One frame for each observation, not for each tick: a LeRobot frame needs its images, and an episode holds images where
a decision was taken.  Frames that repeat an image over the ticks of a chunk would show a policy what the arm no longer
saw, and the fps would be of pictures that were never taken.  So `action` is the first action executed from the
observation, all of them are in `executed.actions`, and fps is the tick rate over the ticks between two observations.
Where an observation was taken at every tick (`sim demos --stride 1`, or `run --replan-after 1`) this is the usual data
set with a frame a tick; LeRobot's own policies, whose chunks are successive frames' actions, are to be trained on such
a one.  `rl_trainer sft --data` reads either, and learns from it what it learns from the episodes.  An fps that is no
whole number (8 ticks at 20 Hz give 2.5) lerobot reads and merges, but it cannot record more video at it.

Not exported: the final observation, an observation of which nothing was executed, and where the server's time went.

Episodes are read twice, one at a time (first what they have in common, then what is in them), and a third time to
measure videos against them.  The data set appears as a whole, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from protos import codec, episode_pb2, lerobot
from protos.episode_file import SUFFIX, DamagedEpisode, Episode, read_episode
from robot_client.arm import Outcome
from robot_client.errors import RobotError
from robot_client.lerobot.film import Distance, film_frames
from robot_client.lerobot.frames import Frame, Survey, Unfit, columns_of, frames_of, pixels_of
from robot_client.lerobot.writer import DatasetWriter
from robot_client.rollout import Purpose

logger = logging.getLogger(__name__)

Images = Literal["png", "h264", "av1"]


class CannotExport(RobotError):
    """These episodes make no such data set, or the place for it is taken."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Makes a data set of episode files, for other programs to train on."""

    episodes: tuple[Path, ...]
    """Episode files, or folders of them: a server's store, what a robot or `sim demos` recorded."""
    out: Path
    """Folder of the data set; must not exist yet."""
    format: Literal["lerobot"] = "lerobot"
    """LeRobotDataset v3.0."""
    images: Images = "png"
    """png keeps every pixel; a video takes a fifth of the bytes and is lossy: its PSNR is reported."""
    crf: int = 18
    """Quality of a video: lower is better and larger."""
    outcomes: tuple[Outcome, ...] = ("success", "failure")
    """Episodes that ended otherwise are left out."""
    purposes: tuple[Purpose, ...] = ("train", "demonstrate", "deploy")
    """Episodes that were for something else are left out: what is evaluated on is not trained on."""
    action: Literal["executed", "expert"] = "executed"
    """What the column `action` holds; expert: what the expert would have done, where one watched."""
    fps: float | None = None
    """Frames a second to state where observations are not equally far apart; computed if not given."""

    def __post_init__(self) -> None:
        if not self.episodes:
            raise ValueError("episodes must name at least one file or folder, got none")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf must be in [0, 51], got {self.crf}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")


@dataclass(kw_only=True)
class Summary:
    """What was exported."""

    episodes: int = 0
    frames: int = 0
    ticks: int = 0
    fps: float
    refused: Counter[str]
    """Episodes left out, by reason."""
    bytes: int = 0
    distances: dict[str, Distance] = field(default_factory=dict)
    """Of each camera's video from the originals; empty where images are bit for bit."""

    def __str__(self) -> str:
        films = "; ".join(
            f"{camera}: PSNR {distance.db:.1f} dB, worst frame {distance.worst_db:.1f} dB"
            for camera, distance in self.distances.items()
        )
        return (
            f"{self.episodes} episodes, {self.frames} frames at {self.fps:g} fps, {self.ticks} ticks, "
            f"{self.bytes / 2**20:.1f} MiB; images {films or 'bit for bit'}; left out: {dict(self.refused) or 'none'}"
        )


def export(config: Export) -> int:
    """0, after saying what was exported.  Raises CannotExport."""
    logger.info("%s", write_dataset(config))
    return 0


def write_dataset(config: Export) -> Summary:
    """Raises CannotExport."""
    require("pyarrow", *(("av",) if config.images != "png" else ()))
    if config.out.exists():
        raise CannotExport(f"{config.out} exists already: choose another --out")
    survey, refused, chosen = Survey(), Counter[str](), list[Path]()
    try:
        for path, episode, frames in selected(config, files(config.episodes), refused):
            with naming(path):
                survey.add(episode, frames)
            chosen.append(path)
        if not chosen:
            raise CannotExport(f"there is nothing to export; left out: {dict(refused) or 'none'}")
        summary = Summary(fps=config.fps or survey.fps(), refused=refused)
        check_sides(config, survey)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=config.out.parent, prefix=f".{config.out.name}-") as folder:
            _write(config, Path(folder) / "whole", survey, chosen, summary)
            os.replace(Path(folder) / "whole", config.out)
    except Unfit as error:
        raise CannotExport(str(error)) from error
    except OSError as error:
        raise CannotExport(f"{config.out} cannot be written: {error.strerror}") from error
    return summary


def _write(config: Export, folder: Path, survey: Survey, chosen: list[Path], summary: Summary) -> None:
    features = survey.features(image_dtype="image" if config.images == "png" else "video")
    cameras = {lerobot.IMAGES + name: (name, (height, width)) for name, height, width in survey.kind().cameras}
    writer = DatasetWriter(
        folder,
        features,
        fps=summary.fps,
        robot_type=", ".join(sorted(survey.arms)),
        codec="h264" if config.images == "png" else config.images,
        crf=config.crf,
    )
    for path, episode, frames in selected(config, chosen, Counter()):
        with naming(path):
            pixels = {key: [pixels_of(frame, *camera) for frame in frames] for key, camera in cameras.items()}
            columns = columns_of(episode, frames, features, expert=config.action == "expert")
        writer.add(columns, pixels, [frame.decision.observation.instruction for frame in frames])
        summary.episodes += 1
        summary.frames += len(frames)
        summary.ticks += len(episode.ticks)
    writer.finish()
    summary.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if config.images != "png":
        summary.distances = {camera[0]: Distance() for camera in cameras.values()}
        films = {key: film_frames(folder, key) for key in cameras}
        for _, _, frames in selected(config, chosen, Counter()):
            for frame in frames:
                for key, camera in cameras.items():
                    summary.distances[camera[0]].add(next(films[key]), pixels_of(frame, *camera))


def files(paths: tuple[Path, ...]) -> list[Path]:
    """Every episode file, sorted.  Raises CannotExport when a path has none."""
    found: set[Path] = set()
    for path in paths:
        here = [path] if path.is_file() else list(path.rglob(f"*{SUFFIX}"))
        if not here:
            raise CannotExport(f"{path}: expected an episode file, or a folder with *{SUFFIX} files, found none")
        found.update(here)
    return sorted(found)


def selected(config: Export, paths: list[Path], refused: Counter[str]) -> Iterator[tuple[Path, Episode, list[Frame]]]:
    """The episodes to export and their frames; the others are counted by reason, the damaged also logged by name."""
    purposes = {f"PURPOSE_{purpose.upper()}" for purpose in config.purposes}
    outcomes = {f"OUTCOME_{outcome.upper()}" for outcome in config.outcomes}
    for path in paths:
        try:
            episode = read_episode(path)
        except DamagedEpisode as error:
            refused["damaged"] += 1
            logger.warning("left out: %s", error)
            continue
        except OSError as error:
            raise CannotExport(f"{path} cannot be read: {error.strerror}") from error
        purpose = episode_pb2.Purpose.Name(episode.start.purpose)
        outcome = episode_pb2.Outcome.Name(episode.end.outcome)
        frames = frames_of(episode)
        if purpose not in purposes:
            refused[purpose.lower()] += 1
        elif outcome not in outcomes:
            refused[outcome.lower()] += 1
        elif not frames:
            refused["nothing_executed"] += 1
        else:
            yield path, episode, frames


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which episode was at fault."""
    try:
        yield
    except (Unfit, codec.CodecError) as error:
        raise CannotExport(f"{path.name}: {error}") from error


def check_sides(config: Export, survey: Survey) -> None:
    """Raises CannotExport for images that no video can hold."""
    odd = [camera for camera in survey.kind().cameras if config.images != "png" and any(s % 2 for s in camera[1:])]
    if odd:
        raise CannotExport(f"a video needs even heights and widths, got {odd}: export them as png")


def require(*packages: str) -> None:
    """Raises CannotExport for what is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CannotExport(f"this needs {missing}, which come with: pip install 'vla-rl[export]'")
