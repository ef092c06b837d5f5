"""Episodes as pictures: MP4s, and animations small enough for a web page."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


class VideoError(RuntimeError):
    """There is no video; the message says why, in the encoder's or the system's words."""


def write_mp4(path: Path, frames_HW3: Sequence[np.ndarray], *, frames_per_s: int) -> None:
    """uint8 (H, W, 3) frames as H.264.  An odd row or column is cut off.  Raises VideoError."""
    import imageio_ffmpeg  # only where a video is written

    height, width = frames_HW3[0].shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(frames_per_s), "-i", "-"]
    target = ["-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"]
    # A plain subprocess: imageio's own writer forks with a preexec_fn, which breaks beside gRPC's threads.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoder = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *target, str(path)],
            input=b"".join(frame.tobytes() for frame in frames_HW3),
            capture_output=True,
        )
    except (OSError, RuntimeError) as error:  # the latter: there is no encoder
        raise VideoError(f"{path.name}: {error}") from error
    if encoder.returncode:
        raise VideoError(f"{path.name}: ffmpeg ended with {encoder.returncode}: {encoder.stderr.decode().strip()}")


def write_gif(path: Path, frames_HW3: Sequence[np.ndarray], *, frames_per_s: float, max_bytes: int) -> None:
    """The frames as an endless GIF of one palette; every second frame is dropped until it fits into max_bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = list(frames_HW3)
    while True:
        # One palette, taken over the whole clip, and no dithering: what stands still costs nothing.
        sheet = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 12)], axis=0))
        palette = sheet.quantize(128, method=Image.Quantize.MEDIANCUT)
        images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        duration_ms = round(1000 / frames_per_s)
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0, optimize=True)
        if path.stat().st_size <= max_bytes or len(frames) < 4:
            return
        frames, frames_per_s = frames[::2], frames_per_s / 2
