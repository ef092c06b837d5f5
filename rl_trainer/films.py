"""Before and after: of each task one evaluated episode, as the first evaluation and as the newest one saw it.

Animated WebPs, one frame a decision: `before/TASK.webp` is the first evaluation's, `TASK.webp` has both side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from protos import codec
from protos.animation import captioned, side_by_side
from protos.episode_file import Episode
from rl_trainer.rollouts import Finished

SIDE_PX = 160
"""Larger frames are made smaller, and those of less than half of it are magnified: captions need room."""
FRAMES = 50
"""Of a clip, at most; a longer episode is shown faster."""
FRAME_MS = 150
HOLD = 8
"""Frames that the end stands still."""
QUALITY = 80
MARGIN = ((0, 0), (2, 2), (0, 0))
"""Black columns beside a frame, so that neighbours are told apart."""


def film_evaluation(folder: Path, iteration: int, finished: Sequence[Finished], *, camera: str) -> None:
    """Writes the films of an evaluation; a task whose first rollout ended as an error keeps the film it has.

    An evaluation has its rollouts in the same order every time: the first of a task is the same initial state.
    """
    (folder / "before").mkdir(parents=True, exist_ok=True)
    first: dict[str, Finished] = {}
    for item in finished:
        first.setdefault(item.rollout.task, item)
    for task, item in first.items():
        if item.episode is None:
            continue
        outcome = "success" if item.success else "failure"
        frames = [np.pad(frame, MARGIN) for frame in frames_of(item.episode, camera)]
        clip = [captioned(frame, f"iteration {iteration}: {outcome}") for frame in frames]
        clips, before = [clip], folder / "before" / film_name(task)
        if before.exists():
            clips.insert(0, read_webp(before))
        else:
            write_webp(before, clip)
        instruction = item.episode.decisions[0].observation.instruction
        both = side_by_side(clips, columns=len(clips), hold=HOLD)
        write_webp(folder / film_name(task), [captioned(frame, instruction) for frame in both])


def film_episode(path: Path, episode: Episode, caption: str, *, camera: str) -> None:
    """Writes the film of one episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [captioned(frame, caption) for frame in frames_of(episode, camera)]
    if frames:
        write_webp(path, [*frames, *[frames[-1]] * HOLD])


def film_name(task: str) -> str:
    """A file name for "suite/3"."""
    return task.replace("/", "-") + ".webp"


def frames_of(episode: Episode, camera: str) -> list[np.ndarray]:
    """uint8 (H, W, 3): what the policy saw at its decisions, and at the end where that was recorded."""
    seen = [decision.observation for decision in episode.decisions]
    seen += [episode.end.final_observation] if camera in episode.end.final_observation.images else []
    chosen = np.unique(np.linspace(0, len(seen) - 1, min(len(seen), FRAMES)).round().astype(int))
    return [_sized(codec.decode_image(seen[index].images[camera], f"images[{camera}]")) for index in chosen]


def write_webp(path: Path, frames: Sequence[np.ndarray]) -> None:
    """An endless animation, whole or not at all."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    partial = path.with_suffix(".partial")
    first.save(
        partial,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=FRAME_MS,
        loop=0,
        quality=QUALITY,
        method=0,  # the quickest: a tenth of a GIF's time at half of its size
    )
    os.replace(partial, path)


def read_webp(path: Path) -> list[np.ndarray]:
    """The frames that write_webp() was given.  A file holds equal neighbours once, and for longer."""
    frames: list[np.ndarray] = []
    with Image.open(path) as animation:
        for frame in ImageSequence.Iterator(animation):
            pixels_HW3 = np.asarray(frame.convert("RGB"))
            frames += [pixels_HW3] * max(1, round(frame.info.get("duration", FRAME_MS) / FRAME_MS))
    return frames


def _sized(pixels_HW3: np.ndarray) -> np.ndarray:
    times = max(1, SIDE_PX // max(pixels_HW3.shape[:2]))
    picture = Image.fromarray(pixels_HW3.repeat(times, axis=0).repeat(times, axis=1))
    picture.thumbnail((SIDE_PX, SIDE_PX))
    return np.asarray(picture)
