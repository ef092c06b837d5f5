"""Intel RealSense: the colour stream of a camera, or of a recording of one.

Needs the extra `realsense` and, on Debian, the package libusb-1.0-0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robot_client.camera import Frame
from robot_client.errors import CameraError

RECORDINGS = (".bag", ".db3")


class RealSenseSource:
    """Numbers its frames as the sensor does, and stamps them when they arrive.

    device: a serial number, or a recording (.db3; .bag where librealsense is older); empty: the only camera there is.
    width, height, fps: of the colour stream; 0 leaves each to the device.
    exposure: in the sensor's own units (100 µs in most); 0 leaves it automatic.
    repeat: a recording begins again at its end, instead of ending like a camera unplugged.
    """

    def __init__(
        self,
        *,
        device: str = "",
        width: int = 0,
        height: int = 0,
        fps: int = 0,
        exposure: float = 0,
        repeat: bool = True,
    ):
        # Only where a RealSense is asked for: the module loads its vendor's libraries.
        import pyrealsense2  # pyright: ignore[reportMissingImports]

        self.fps = float(fps)
        self._rs: Any = pyrealsense2
        self._device = device
        self._size = (width, height)
        self._exposure = exposure
        self._repeat = repeat
        self._pipeline = None

    def open(self) -> None:
        stream, (width, height), fps = self._rs.stream.color, self._size, round(self.fps)
        with self._blamed_on_the_device():
            config, pipeline = self._chosen(), self._rs.pipeline()
            device = config.resolve(pipeline).get_device()
            config.enable_stream(stream, width, height, self._rs.format.rgb8, fps)
            if not config.can_resolve(pipeline):
                raise CameraError(f"has no colour {width}x{height} at {fps} fps (0: any), only {self._modes(device)}")
            profile = pipeline.start(config)
            self._pipeline = pipeline
            self.fps = float(profile.get_stream(stream).fps())
            if self._exposure:
                self._expose(profile.get_device())

    def read(self, timeout_s: float) -> Frame:
        with self._blamed_on_the_device():
            if self._pipeline is None:
                raise CameraError("is not open")
            arrived, frames = self._pipeline.try_wait_for_frames(round(1000 * timeout_s))
            capture_time_ns = time.monotonic_ns()
            if not arrived:
                raise CameraError(f"sent no frame within {timeout_s:g} s")
            color = frames.get_color_frame()
            # Copied: the memory is the SDK's, and goes back to it with the frame.
            image = np.array(color.get_data())
            return Frame(image=image, capture_time_ns=capture_time_ns, number=color.get_frame_number())

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            with contextlib.suppress(RuntimeError):  # it may have stopped by itself, with the device
                device = pipeline.get_active_profile().get_device()
                if device.is_playback():
                    device.as_playback().pause()  # a recording that begins again just now crashes in a stop
                pipeline.stop()

    def _chosen(self):
        """An rs.config for this device and no other."""
        config = self._rs.config()
        if Path(self._device).suffix in RECORDINGS:
            config.enable_device_from_file(self._device, repeat_playback=self._repeat)
            return config
        connected = [each.get_info(self._rs.camera_info.serial_number) for each in self._rs.context().query_devices()]
        if self._device not in connected and (self._device or len(connected) != 1):
            raise CameraError(f"is not connected: the device must be one of {connected}")
        config.enable_device(self._device or connected[0])
        return config

    def _modes(self, device) -> list[str]:
        profiles = [each.as_video_stream_profile() for each in self._color_profiles(self._color_sensor(device))]
        return sorted({f"{each.width()}x{each.height()} at {each.fps()} fps" for each in profiles})

    def _expose(self, device) -> None:
        sensor, exposure = self._color_sensor(device), self._rs.option.exposure
        if not sensor.supports(exposure):
            raise CameraError(f"has no exposure to set, got exposure {self._exposure:g}")
        allowed = sensor.get_option_range(exposure)
        if not allowed.min <= self._exposure <= allowed.max:
            raise CameraError(f"exposure must be in [{allowed.min:g}, {allowed.max:g}], got {self._exposure:g}")
        sensor.set_option(exposure, self._exposure)

    def _color_sensor(self, device):
        return next(sensor for sensor in device.query_sensors() if self._color_profiles(sensor))

    def _color_profiles(self, sensor) -> list:
        return [each for each in sensor.get_stream_profiles() if each.stream_type() == self._rs.stream.color]

    @contextlib.contextmanager
    def _blamed_on_the_device(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, CameraError) as error:
            raise CameraError(f"RealSense {self._device or '(any)'}: {error}") from error
