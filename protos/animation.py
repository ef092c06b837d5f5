"""Clips, lists of uint8 (H, W, 3) frames: captioned, and side by side as one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CAPTION_PX = 28
CHARACTER_PX = 6


def captioned(frame_HW3: np.ndarray, text: str) -> np.ndarray:
    """The frame with the text, wrapped to two lines, on a dark strip below it."""
    height, width = frame_HW3.shape[:2]
    lines = textwrap.wrap(text, max(8, width // CHARACTER_PX))[:2]
    picture = Image.new("RGB", (width, height + CAPTION_PX), (20, 20, 28))
    picture.paste(Image.fromarray(frame_HW3), (0, 0))
    ImageDraw.Draw(picture).multiline_text((3, height + 1), "\n".join(lines), fill=(235, 235, 235), spacing=2)
    return np.asarray(picture)


def side_by_side(clips: Sequence[Sequence[np.ndarray]], *, columns: int, hold: int = 0) -> list[np.ndarray]:
    """Clips of one frame size as one clip in a grid; a clip that is over stands still, and all do for `hold` frames."""
    length = max(len(clip) for clip in clips) + hold
    blank = np.zeros_like(clips[0][0])
    frames = []
    for index in range(length):
        cells = [clip[min(index, len(clip) - 1)] for clip in clips]
        cells += [blank] * (-len(cells) % columns)
        rows = [np.concatenate(cells[start : start + columns], axis=1) for start in range(0, len(cells), columns)]
        frames.append(np.concatenate(rows, axis=0))
    return frames
