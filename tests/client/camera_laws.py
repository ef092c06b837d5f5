"""What every camera promises.  Subclassed by each make, with a real source of its frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from robot_client.camera import Camera, Frame, FrameSource

MAX_AGE_S = 0.3
PATIENCE_S = 30.0
"""For a machine that is busy with something else: no law measures speed."""


def eventually(happens: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < until_s, "never happened"
        time.sleep(0.002)


def next_frames(camera: Camera, count: int) -> list[Frame]:
    """The latest frame, each time that it is another one."""
    frames: list[Frame] = []
    while len(frames) < count:
        eventually(lambda: camera.report().frames and (not frames or camera.latest() is not frames[-1]))
        frames.append(camera.latest())
    return frames


class CameraLaws:
    """The source fails once stop() is called, or by itself after it has shown some frames; it can be opened again."""

    size = (48, 64)
    """Height and width of its frames."""

    @pytest.fixture
    def source(self) -> FrameSource:
        raise NotImplementedError

    def stop(self, source: FrameSource) -> None:
        """Nothing to do for a recording, which ends."""

    def go_on(self, source: FrameSource) -> None:
        """Undoes stop()."""

    @pytest.fixture
    def camera(self, source: FrameSource) -> Iterator[Camera]:
        camera = Camera("front", source, max_age_s=MAX_AGE_S, reopen_after_s=0.5)
        yield camera
        camera.close()

    def test_frames_are_rgb_bytes_of_one_size(self, camera):
        for frame in next_frames(camera, 3):
            assert frame.image.dtype == np.uint8 and frame.image.shape == (*self.size, 3)
            assert frame.image.flags.c_contiguous

    def test_frames_are_stamped_with_the_robots_clock_and_numbered_in_order(self, source):
        before_ns = time.monotonic_ns()
        camera = Camera("front", source)
        frames = next_frames(camera, 4)
        reopened = camera.report().reopened
        camera.close()
        stamps_ns, numbers = [frame.capture_time_ns for frame in frames], [frame.number for frame in frames]
        assert before_ns < stamps_ns[0] and stamps_ns[-1] < time.monotonic_ns()
        assert stamps_ns == sorted(set(stamps_ns))
        assert numbers[0] >= 0 and (numbers == sorted(set(numbers)) or reopened)

    def test_a_frame_once_shown_does_not_change(self, camera):
        shown = next_frames(camera, 1)[0]
        pixels_HW3 = shown.image.copy()
        next_frames(camera, 4)
        np.testing.assert_array_equal(shown.image, pixels_HW3)

    def test_whoever_looks_late_sees_the_newest_frame(self, camera):
        early = next_frames(camera, 1)[0]
        seen = camera.report().frames
        eventually(lambda: camera.report().frames >= seen + 5)
        late = camera.latest()
        assert late.number >= early.number + 5 or camera.report().reopened
        assert late.capture_time_ns > early.capture_time_ns

    def test_an_old_frame_is_never_passed_over_in_silence(self, camera, source):
        next_frames(camera, 2)
        self.stop(source)
        trouble = ""
        until_s = time.monotonic() + PATIENCE_S
        while "lost" not in trouble and time.monotonic() < until_s:
            frame, now_ns = camera.latest(), time.monotonic_ns()
            trouble = camera.trouble()
            if not trouble and camera.latest() is frame:
                assert now_ns - frame.capture_time_ns <= MAX_AGE_S * 1e9
            time.sleep(0.002)
        assert trouble.startswith("camera front: lost: ")

    def test_it_comes_back_by_itself(self, camera, source):
        next_frames(camera, 2)
        self.stop(source)
        eventually(lambda: "lost" in camera.trouble())
        seen = camera.report().frames
        assert camera.latest().image.shape == (*self.size, 3)
        self.go_on(source)
        eventually(lambda: camera.report().frames > seen and not camera.trouble())
        assert camera.report().reopened >= 1

    def test_close_ends_it_and_may_be_repeated(self, camera):
        next_frames(camera, 1)
        camera.close()
        camera.close()
        seen = camera.report().frames
        assert camera.trouble() == "camera front: closed"
        time.sleep(0.1)
        assert camera.report().frames == seen
