"""A camera that shows its newest frame and says when it cannot be trusted.

One thread reads the source without pause and keeps the newest frame only, so that nobody waits for a camera and nobody
sees a frame that has queued.  A source that fails is opened again until it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np

from robot_client.backoff import BackOff
from robot_client.errors import CameraError

logger = logging.getLogger(__name__)

Crop = Literal["none", "square"]
Turn = Literal[0, 90, 180, 270]

FIRST_FRAME_S = 5.0
"""How long a source may take to show anything once it is open: a sensor starts, its exposure settles."""
SAMPLE_STRIDE = 16
"""Of the pixels compared first, each way: two different frames differ there already, at 1/256 of the cost."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One exposure.  Raises TypeError when the image is not one."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB.  Nobody writes to it after it was handed on."""
    capture_time_ns: int
    """On time.monotonic_ns(): when the exposure reached this computer."""
    number: int = -1
    """The sensor's own frame number; -1 from a source without one, where Camera puts its own count."""

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise TypeError(f"a frame must be uint8 (H, W, 3), got {self.image.dtype} {self.image.shape}")


class FrameSource(Protocol):
    """One make of camera.  Its settings are keyword arguments of simple types; the first says which device.

    All calls come from one thread at a time.  Raises CameraError where a device fails or cannot do what was asked.
    """

    fps: float
    """Frames a second, once open; 0 where the source cannot say: dropped frames then show in the numbers alone."""

    def open(self) -> None:
        """Starts the device with its settings; again after close(), as often as need be."""
        ...

    def read(self, timeout_s: float) -> Frame:
        """The next frame, upright or not.  Raises CameraError when there is none within timeout_s."""
        ...

    def close(self) -> None:
        """Lets go of the device.  Never raises, also when it is not open."""
        ...


@dataclass(frozen=True, kw_only=True)
class CameraReport:
    """What became of a camera's frames since it was opened."""

    frames: int
    rate_hz: float
    """Frames over the time between the first and the last of them."""
    dropped: int
    """Frames that the sensor took, or had to take at its rate, and that never came; outages apart."""
    reopened: int
    """How often the source failed and could be opened again."""

    def __str__(self) -> str:
        return (
            f"{self.frames} frames at {self.rate_hz:.2f} Hz, {self.dropped} dropped, "
            f"source reopened {self.reopened} times"
        )


class Camera:
    """Opens the source at once and reads it until close().

    crop: "square" keeps the middle square of the turned image.
    rotate: turns the image clockwise by so many degrees, so that the policy sees it upright.
    max_age_s: the newest frame may be vouched for until it is so old.
    frozen_after: so many frames in a row with one number, one capture time or the same pixels are a frozen camera; 0
        switches the rule off.
    reopen_after_s: a source that shows nothing for so long is closed and opened again.

    Raises CameraError when the source cannot be opened as asked; later losses are told by trouble().
    """

    def __init__(
        self,
        name: str,
        source: FrameSource,
        *,
        crop: Crop = "none",
        rotate: Turn = 0,
        max_age_s: float = 0.3,
        frozen_after: int = 5,
        reopen_after_s: float = 1.0,
    ):
        if crop not in get_args(Crop) or rotate not in get_args(Turn):
            raise ValueError(
                f"crop must be one of {get_args(Crop)} and rotate of {get_args(Turn)}, got {crop!r} and {rotate!r}"
            )
        if max_age_s <= 0 or reopen_after_s <= 0:
            raise ValueError(f"max_age_s and reopen_after_s must be above 0, got {max_age_s} and {reopen_after_s}")
        if frozen_after < 0 or frozen_after == 1:
            raise ValueError(f"frozen_after must be 0 or at least 2, got {frozen_after}")
        self.name = name
        self._source = source
        self._crop: Crop = crop
        self._rotate: Turn = rotate
        self._max_age_s = max_age_s
        self._frozen_after = frozen_after
        self._reopen_after_s = reopen_after_s
        # Written by the thread alone, each replaced whole: readers need no lock.
        self._frame: Frame | None = None
        self._lost = ""
        self._alike = self._frames = self._dropped = self._reopened = self._first_ns = 0
        self._back_off = BackOff()
        self._closing = threading.Event()
        try:
            source.open()
        except CameraError as error:
            source.close()
            raise CameraError(f"camera {name}: {error}") from error
        self._thread = threading.Thread(target=self._run, name=f"camera {name}", daemon=True)
        self._thread.start()

    def latest(self) -> Frame:
        """The newest frame, however old; never blocks.  Raises CameraError when there has been none."""
        frame = self._frame
        if frame is None:
            raise CameraError(f"camera {self.name}: {self._lost or 'no frame yet'}")
        return frame

    def trouble(self) -> str:
        """Why the newest frame cannot be vouched for now; empty when it can.  Never blocks."""
        reason = self._reason()
        return f"camera {self.name}: {reason}" if reason else ""

    def report(self) -> CameraReport:
        frame, frames = self._frame, self._frames
        elapsed_s = (frame.capture_time_ns - self._first_ns) / 1e9 if frame else 0.0
        return CameraReport(
            frames=frames,
            rate_hz=(frames - 1) / elapsed_s if elapsed_s > 0 else 0.0,
            dropped=self._dropped,
            reopened=self._reopened,
        )

    def close(self) -> None:
        """Stops the thread, which lets go of the device; again does nothing."""
        self._closing.set()
        self._thread.join(FIRST_FRAME_S)

    def _reason(self) -> str:
        frame = self._frame
        if self._closing.is_set():
            return "closed"
        if self._lost:
            return f"lost: {self._lost}"
        if frame is None:
            return "no frame yet"
        age_s = (time.monotonic_ns() - frame.capture_time_ns) / 1e9
        if age_s > self._max_age_s:
            return f"no frame for {age_s:.2f} s (limit {self._max_age_s:g} s)"
        if self._is_frozen:
            return f"frozen: {self._alike} frames with identical pixels"
        return ""

    @property
    def _is_frozen(self) -> bool:
        return bool(self._frozen_after) and self._alike >= self._frozen_after

    def _run(self) -> None:
        patience_s = FIRST_FRAME_S
        try:
            while not self._closing.is_set():
                try:
                    self._take(self._source.read(patience_s))
                    patience_s = self._reopen_after_s
                except CameraError as error:
                    self._lose(error)
                    self._reopen()
                    patience_s = FIRST_FRAME_S
        finally:
            self._source.close()

    def _take(self, frame: Frame) -> None:
        frame = replace(frame, image=upright(frame.image, crop=self._crop, rotate=self._rotate))
        before, was_frozen = self._frame, self._is_frozen
        self._alike = self._alike + 1 if before and is_same(before, frame) else 1
        if before and not self._lost:
            self._dropped += dropped_between(before, frame, self._source.fps)
        self._frames += 1
        self._first_ns = self._first_ns or frame.capture_time_ns
        self._frame = frame if frame.number >= 0 else replace(frame, number=self._frames - 1)
        if self._is_frozen != was_frozen:
            logger.warning("camera %s %s", self.name, "is frozen" if self._is_frozen else "moves again")
        if self._lost:
            logger.warning("camera %s is back", self.name)
            self._lost = ""
            self._back_off.reset()

    def _lose(self, error: CameraError) -> None:
        if not self._lost:
            logger.warning("camera %s lost: %s", self.name, error)
        self._lost = str(error)

    def _reopen(self) -> None:
        """Returns once the source is open again, or the camera closed."""
        self._source.close()
        while not self._closing.wait(self._back_off.next_s()):
            try:
                self._source.open()
                self._reopened += 1
                return
            except CameraError as error:
                self._lose(error)
                self._source.close()


def upright(image_HW3: np.ndarray, *, crop: Crop, rotate: Turn) -> np.ndarray:
    """uint8 (H', W', 3): turned clockwise, then cropped; copied only when it has changed."""
    turned = np.rot90(image_HW3, -rotate // 90)
    if crop == "square":
        height, width = turned.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        turned = turned[top : top + side, left : left + side]
    return np.ascontiguousarray(turned)


def is_same(before: Frame, after: Frame) -> bool:
    """True when both are one exposure: one number of the sensor's, one capture time, or equal in every pixel."""
    if before.number == after.number or before.capture_time_ns == after.capture_time_ns:
        return True
    sample = np.s_[::SAMPLE_STRIDE, ::SAMPLE_STRIDE]
    return np.array_equal(before.image[sample], after.image[sample]) and np.array_equal(before.image, after.image)


def dropped_between(before: Frame, after: Frame, fps: float) -> int:
    """How many frames are missing: by the sensor's numbers, else by the time, at 1.5 periods and beyond.

    A number that falls is a sensor that began anew: nothing is known then.
    """
    if after.number >= 0:
        return max(0, after.number - before.number - 1)
    return max(0, round((after.capture_time_ns - before.capture_time_ns) / 1e9 * fps) - 1)
