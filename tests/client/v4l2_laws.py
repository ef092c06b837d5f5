"""The laws for a USB camera, run by test_cameras.py in a process of its own with v4l2_device.c underneath OpenCV."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from robot_client.camera import Camera
from robot_client.cameras.uvc import UvcSource
from robot_client.errors import CameraError
from tests.client.camera_laws import CameraLaws, eventually, next_frames

DEVICE = Path(os.environ["V4L2_DEVICE"])
STALLED, FROZEN, UNPLUGGED = (DEVICE.with_suffix("." + state) for state in ("stalled", "frozen", "unplugged"))


@pytest.fixture(autouse=True)
def plugged_in():
    for state in (STALLED, FROZEN, UNPLUGGED, DEVICE):
        state.unlink(missing_ok=True)
    DEVICE.symlink_to("/dev/null")


class TestUnplugged(CameraLaws):
    size = (240, 320)

    @pytest.fixture
    def source(self):
        return UvcSource(device=str(DEVICE), width=320, height=240, fps=60)

    def stop(self, source):
        DEVICE.unlink()
        UNPLUGGED.touch()

    def go_on(self, source):
        UNPLUGGED.unlink()
        DEVICE.symlink_to("/dev/null")

    def test_red_comes_first_and_the_exposure_is_set(self):
        camera = Camera("front", UvcSource(device=str(DEVICE), width=320, height=240, exposure=50))
        frame = next_frames(camera, 1)[0]
        camera.close()
        np.testing.assert_array_equal(frame.image[..., 0], 200)
        np.testing.assert_array_equal(frame.image[..., 1], 50)

    def test_a_frame_that_waited_in_the_driver_is_stamped_when_it_came(self, source):
        source.open()
        time.sleep(1)
        looked_ns = time.monotonic_ns()
        assert source.read(10.0).capture_time_ns < looked_ns < source.read(10.0).capture_time_ns
        source.close()


class TestStalled(TestUnplugged):
    def stop(self, source):
        STALLED.touch()

    def go_on(self, source):
        STALLED.unlink()


def test_a_frozen_sensor_is_noticed_though_its_stamps_go_on():
    camera = Camera("front", UvcSource(device=str(DEVICE), width=320, height=240, fps=60), max_age_s=10)
    next_frames(camera, 2)
    FROZEN.touch()
    eventually(lambda: camera.trouble().startswith("camera front: frozen: "))
    FROZEN.unlink()
    eventually(lambda: not camera.trouble())
    camera.close()


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"width": 800, "height": 600}, r"cannot do width 800 \(it says 640\), height 600 \(it says 480\)$"),
        ({"fps": 24}, r"cannot do fps 24 \(it says 30\)$"),
        ({"fourcc": "MJPG"}, r"cannot do fourcc MJPG \(it says BGR3\)$"),
        ({"exposure": 900}, r"cannot do exposure 900 \(it says 200\)$"),
    ],
)
def test_what_the_device_does_not_say_back_is_refused(asked, refusal):
    with pytest.raises(CameraError, match=refusal):
        Camera("front", UvcSource(device=str(DEVICE), **asked))
