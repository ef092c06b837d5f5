"""A USB camera as the operating system shows it, or a video file in place of one.  Needs the extra `uvc`."""

from __future__ import annotations

import sys
import time
from glob import glob
from pathlib import Path

import numpy as np

from robot_client.cadence import Cadence
from robot_client.camera import Frame
from robot_client.errors import CameraError

MANUAL_EXPOSURE = 1
"""V4L2_EXPOSURE_MANUAL."""
ON_OUR_CLOCK_S = 2.0
"""A driver whose first stamp is further from time.monotonic() stamps by another clock."""
TOLERANCE = 0.5
"""Of a setting read back: 30 fps asked for, 29.97 got."""
LINUX = sys.platform == "linux"


class UvcSource:
    """Stamped by the driver where it uses the monotonic clock, as Linux's does; else when read.

    device: a number, a path (/dev/v4l/by-id/... stays the same over reboots), or a video file, which is shown at its
        own rate and ends like a camera unplugged.
    width, height, fps: 0 leaves each to OpenCV, which asks a Linux device for 640x480 at 30.
    fourcc: the format on the wire, e.g. MJPG, which lets several cameras share one USB controller.
    exposure: in the driver's units (100 µs on Linux); 0 leaves it as it is.
    buffers: frames that the driver may hold; where a camera reaches only half its rate with 1, 2 may help.
    """

    def __init__(
        self,
        *,
        device: str = "0",
        width: int = 0,
        height: int = 0,
        fps: float = 0,
        fourcc: str = "",
        exposure: float = 0,
        buffers: int = 1,
    ):
        # Only where such a camera is asked for: a robot without one need not have OpenCV.
        import cv2

        if bool(width) != bool(height) or len(fourcc) not in (0, 4):
            raise ValueError(f"width and height go together and fourcc has 4 letters, got {width}x{height}, {fourcc!r}")
        self.fps = fps
        self._cv2 = cv2
        self._device = f"/dev/video{device}" if LINUX and device.isdigit() else device
        self._is_file = Path(self._device).is_file()
        self._settings = {
            "buffers": (cv2.CAP_PROP_BUFFERSIZE, 0 if self._is_file else buffers),
            "fourcc": (cv2.CAP_PROP_FOURCC, int.from_bytes(fourcc.encode(), "little")),
            "width": (cv2.CAP_PROP_FRAME_WIDTH, width),
            "height": (cv2.CAP_PROP_FRAME_HEIGHT, height),
            "fps": (cv2.CAP_PROP_FPS, fps),
            "auto_exposure": (cv2.CAP_PROP_AUTO_EXPOSURE, MANUAL_EXPOSURE if LINUX and exposure else 0),
            "exposure": (cv2.CAP_PROP_EXPOSURE, exposure),
        }
        self._capture = None

    def open(self) -> None:
        cv2 = self._cv2
        if LINUX and not Path(self._device).exists():
            raise CameraError(f"there is no {self._device}, only {sorted(glob('/dev/video*'))}")
        number = int(self._device) if self._device.isdigit() else self._device
        self._capture = capture = cv2.VideoCapture(number, cv2.CAP_V4L2 if LINUX and not self._is_file else cv2.CAP_ANY)
        if not capture.isOpened():
            raise CameraError(f"{self._device} cannot be opened: in use, or not a camera")
        self._set(capture)
        self.fps = capture.get(cv2.CAP_PROP_FPS)
        self._cadence = Cadence(max(self.fps, 1)) if self._is_file else None
        self._waits = capture.getBackendName() == "V4L2"
        # The first picture is often damaged; and waitAny() counts on one having been read.
        if self._waits and not capture.read()[0]:
            raise CameraError(f"{self._device} shows nothing")
        self._stamps = self._waits and abs(time.monotonic() - self._stamp_s()) < ON_OUR_CLOCK_S

    def read(self, timeout_s: float) -> Frame:
        if self._capture is None:
            raise CameraError(f"{self._device} is not open")
        if self._cadence is not None:
            self._cadence.wait()
        try:
            if self._waits and not self._cv2.VideoCapture.waitAny([self._capture], round(1e9 * timeout_s))[0]:
                raise CameraError(f"{self._device} sent no frame within {timeout_s:g} s")
            arrived, image_bgr = self._capture.read()
        except self._cv2.error as error:
            raise CameraError(f"{self._device}: {error.err}") from error
        now_ns = time.monotonic_ns()
        if not arrived:
            raise CameraError(f"{self._device} {'is over' if self._is_file else 'is unplugged or has stopped'}")
        capture_time_ns = min(round(1e9 * self._stamp_s()), now_ns) if self._stamps else now_ns
        image = self._cv2.cvtColor(image_bgr, self._cv2.COLOR_BGR2RGB)
        return Frame(image=np.asarray(image), capture_time_ns=capture_time_ns)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
        self._capture = None

    def _set(self, capture) -> None:
        asked = {key: setting for key, setting in self._settings.items() if setting[1]}
        for number, value in asked.values():
            capture.set(number, value)
        # Only now: a device takes width and height together, and a format may change its rate.
        got = {key: capture.get(number) for key, (number, _) in asked.items()}
        refused = [key for key, (_, value) in asked.items() if abs(got[key] - value) > TOLERANCE]
        if refused:
            differences = [f"{key} {legible(key, asked[key][1])} (it says {legible(key, got[key])})" for key in refused]
            raise CameraError(f"{self._device} cannot do {', '.join(differences)}")

    def _stamp_s(self) -> float:
        assert self._capture is not None
        return self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000


def legible(key: str, value: float) -> str:
    return int(value).to_bytes(4, "little").decode("latin1") if key == "fourcc" else f"{value:g}"
