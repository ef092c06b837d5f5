"""Frames as mp4 films, and how far what they show is from the originals.  Needs av."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from protos import lerobot

if TYPE_CHECKING:
    from av.container import OutputContainer

Codec = Literal["h264", "av1"]
ENCODERS: dict[Codec, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {}),
    "av1": ("libsvtav1", {"preset": "8", "svtav1-params": "lp=1"}),
}
"""PyAV's encoder and what it is told beside the quality."""
KEY_FRAME_EVERY = 2
"""As lerobot encodes: a frame is found without decoding many others."""
VIDEO_FILE_MB = 200


class Film:
    """A camera's frames of all episodes, one after another, in mp4 files of about VIDEO_FILE_MB."""

    def __init__(self, folder: Path, key: str, *, fps: float, codec: Codec, crf: int):
        self._folder, self._key, self._crf = folder, key, crf
        self._codec: Codec = codec
        self._rate = Fraction(fps).limit_denominator(1000)
        self._number = self._frames = self._bytes = 0
        self._container: OutputContainer | None = None
        self._size = (0, 0)

    def add(self, frames: Sequence[np.ndarray]) -> dict[str, float]:
        """Writes an episode's frames, uint8 (H, W, 3); gives where they are, as meta/episodes says it."""
        import av

        self._size = frames[0].shape[:2]
        path = self._folder / lerobot.VIDEO.format(video_key=self._key, **lerobot.place(self._number))
        if self._container is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path)
        first, container = self._frames, self._container
        assert container is not None
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            packets = self._stream.encode(frame)  # none yet, or several: the encoder looks ahead
            container.mux(packets)
            self._bytes += sum(packet.size for packet in packets)
            self._frames += 1
        where = {
            **lerobot.place(self._number),
            "from_timestamp": float(first / self._rate),
            "to_timestamp": float(self._frames / self._rate),
        }
        if self._bytes >= VIDEO_FILE_MB * 2**20:
            self.close()
            self._number, self._frames, self._bytes = self._number + 1, 0, 0
        return {f"videos/{self._key}/{name}": value for name, value in where.items()}

    def _open(self, path: Path) -> None:
        import av

        encoder, options = ENCODERS[self._codec]
        options = {**options, "crf": str(self._crf), "g": str(KEY_FRAME_EVERY)}
        self._container = container = av.open(str(path), "w")
        self._stream: Any = container.add_stream(encoder, rate=self._rate, options=options)
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def info(self) -> dict[str, Any]:
        """What meta/info.json says of it."""
        return {
            "video.height": self._size[0],
            "video.width": self._size[1],
            "video.codec": self._codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": int(self._rate),
            "video.channels": 3,
            "has_audio": False,
        }


def film_frames(folder: Path, key: str) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): what the films of a camera show, from the first file's first frame on."""
    import av

    first = folder / lerobot.VIDEO.format(video_key=key, **lerobot.place(0))
    for path in sorted(first.parents[1].rglob("*.mp4")):
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")


@dataclass(kw_only=True)
class Distance:
    """How far pictures are from the originals."""

    squares: float = 0.0
    """Sum of squared differences."""
    values: int = 0
    worst_db: float = math.inf
    """Of one picture."""

    def add(self, pixels: np.ndarray, original: np.ndarray) -> None:
        square = np.square(pixels.astype(np.float64) - original).sum()
        self.squares, self.values = self.squares + square, self.values + original.size
        self.worst_db = min(self.worst_db, psnr_db(square / original.size))

    @property
    def db(self) -> float:
        """Peak signal-to-noise ratio over all pictures."""
        return psnr_db(self.squares / max(1, self.values))


def psnr_db(mean_square: float) -> float:
    """10 log10(255² / mean squared error); infinite for equal pictures."""
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
