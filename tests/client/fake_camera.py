"""A source of frames that stalls, freezes and comes unplugged when told to."""

from __future__ import annotations

import time

import numpy as np

from robot_client.camera import Frame
from robot_client.errors import CameraError


class FakeSource:
    """Shows noise, fps frames of it a second, with numbers unless numbered is False."""

    def __init__(self, *, device: str = "", fps: float = 50.0, numbered: bool = True):
        self.fps = fps
        self.stalled = self.unplugged = self.frozen = False
        self.log: list[str] = []
        self.image = np.zeros((48, 64, 3), np.uint8)
        self.number = 0
        self._numbered = numbered
        self._noise = np.random.default_rng(0)

    def open(self) -> None:
        self.log.append("open")
        if self.unplugged:
            raise CameraError("nothing is plugged in")

    def read(self, timeout_s: float) -> Frame:
        until_s = time.monotonic() + timeout_s
        time.sleep(1 / self.fps)
        while self.stalled and not self.unplugged:
            if time.monotonic() > until_s:
                raise CameraError(f"no frame within {timeout_s:g} s")
            time.sleep(0.005)
        if self.unplugged:
            raise CameraError("the plug is out")
        if not self.frozen:
            self.image = self._noise.integers(0, 256, self.image.shape, np.uint8)
        self.number += 1
        number = self.number if self._numbered else -1
        return Frame(image=self.image, capture_time_ns=time.monotonic_ns(), number=number)

    def close(self) -> None:
        self.log.append("close")


class SourceWithoutItsSdk(FakeSource):
    def __init__(self, *, device: str = ""):
        import no_such_sdk  # noqa: F401  # pyright: ignore[reportMissingImports]
