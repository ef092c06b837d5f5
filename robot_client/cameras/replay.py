"""Recorded images as a camera: a folder of pictures, an array file, or what the policy saw in an episode.

Exercises everything behind a camera without one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from protos import codec
from protos.episode_file import read_episode
from robot_client.cadence import Cadence
from robot_client.camera import Frame
from robot_client.errors import CameraError

Images = list[Callable[[], np.ndarray]]
"""One function for each frame, which reads it from where it lies."""
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class ReplaySource:
    """Shows the frames in order, fps of them a second, and numbers them.

    path: a folder of pictures, in the order of their names; uint8 (frames, H, W, 3) in an .npy or .npz; an .episode.
    of: which array of an .npz, which camera of an episode; not needed where there is one.
    loop: begins again at the end; otherwise it stays lost there.
    """

    def __init__(self, *, path: Path, of: str = "", fps: float = 30.0, loop: bool = True):
        if fps < 1:
            raise ValueError(f"fps must be at least 1, got {fps:g}")
        self.fps = fps
        self._path = path
        self._of = of
        self._loop = loop
        self._images: Images = []
        self._number = 0

    def open(self) -> None:
        """Goes on where it was."""
        with self._blamed_on_the_recording():
            self._images = images_of(self._path, self._of)
        self._cadence = Cadence(self.fps)

    def read(self, timeout_s: float) -> Frame:
        self._cadence.wait()
        if self._number >= len(self._images) and not self._loop:
            raise CameraError(f"{self._path} is over, after {len(self._images)} frames")
        with self._blamed_on_the_recording():
            image = self._images[self._number % len(self._images)]()
            frame = Frame(image=image, capture_time_ns=time.monotonic_ns(), number=self._number)
        self._number += 1
        return frame

    def close(self) -> None:
        self._images = []

    @contextlib.contextmanager
    def _blamed_on_the_recording(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TypeError, ValueError) as error:
            raise CameraError(f"cannot replay {self._path}: {error}") from error


def images_of(path: Path, of: str) -> Images:
    """At least one.  Raises OSError or ValueError where they cannot be read."""
    if path.is_dir():
        images: Images = [partial(decode, each) for each in sorted(path.iterdir()) if each.suffix.lower() in PICTURES]
    elif path.suffix == ".episode":
        messages = [decision.observation.images for decision in read_episode(path).decisions]
        camera = one_of(messages[0] if messages else [], of)
        images = [partial(codec.decode_image, message[camera]) for message in messages]
    else:
        arrays = np.load(path, mmap_mode="r")
        images_FHW3 = arrays if isinstance(arrays, np.ndarray) else arrays[one_of(arrays.files, of)]
        images = [partial(np.array, image_HW3) for image_HW3 in images_FHW3]
    if not images:
        raise ValueError("it holds no image")
    return images


def one_of(names: Iterable[str], of: str) -> str:
    """The name asked for, or the only one there is."""
    names = sorted(names)
    if of not in names and (of or len(names) != 1):
        raise ValueError(f"of must be one of {names}, got {of!r}")
    return of or names[0]


def decode(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))
