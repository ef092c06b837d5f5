"""Writes a RealSense recording with no camera: a software device under librealsense's own recorder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np


def record(path: Path, images_FHW3: np.ndarray, *, fps: int = 30) -> None:
    """One colour frame for each image, at that rate: the player keeps the times at which they arrived here."""
    import pyrealsense2  # pyright: ignore[reportMissingImports]

    rs: Any = pyrealsense2
    _, height, width, _ = images_FHW3.shape
    device = rs.software_device()
    sensor = device.add_sensor("Color")
    profile = sensor.add_video_stream(stream_of(rs, width, height, fps))
    # After the sensor was added: the recorder takes what the device has when it begins.
    recorder = rs.recorder(str(path), device)
    recorded = recorder.query_sensors()[0]
    recorded.open(recorded.get_stream_profiles()[0])
    recorded.start(rs.frame_queue(1))
    for number, image_HW3 in enumerate(images_FHW3):
        frame = rs.software_video_frame()
        frame.stride, frame.bpp, frame.pixels = 3 * width, 3, image_HW3
        frame.timestamp, frame.domain = 1000 * number / fps, rs.timestamp_domain.system_time
        frame.frame_number, frame.profile = number, profile.as_video_stream_profile()
        sensor.on_video_frame(frame)
        time.sleep(1 / fps)
    recorded.stop()
    recorded.close()


def stream_of(rs: Any, width: int, height: int, fps: int) -> Any:
    stream, lens = rs.video_stream(), rs.intrinsics()
    lens.width, lens.height, lens.fx, lens.fy, lens.ppx, lens.ppy = width, height, width, width, width / 2, height / 2
    lens.model, lens.coeffs = rs.distortion.none, [0.0] * 5
    stream.type, stream.index, stream.uid, stream.fmt = rs.stream.color, 0, 1, rs.format.rgb8
    stream.width, stream.height, stream.fps, stream.bpp, stream.intrinsics = width, height, fps, 3, lens
    return stream
