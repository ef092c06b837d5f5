"""What every camera promises, what each make adds, and how a description becomes a camera."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protos import episode_pb2
from protos.codec import encode_image
from protos.episode_file import EpisodeWriter
from robot_client import cameras
from robot_client.camera import Camera, Frame, dropped_between, is_same, upright
from robot_client.cameras.realsense import RealSenseSource
from robot_client.cameras.replay import ReplaySource
from robot_client.cameras.uvc import UvcSource
from robot_client.errors import CameraError, UnknownCamera
from tests.client.camera_laws import CameraLaws, eventually, next_frames
from tests.client.fake_camera import FakeSource
from tests.client.realsense_recording import record

FPS = 30
IMAGES_FHW3 = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
"""A second of frames."""
HERE = Path(__file__).parent


def need(module: str) -> None:
    """Skips, and says why, where the module cannot be imported; a vendor's library may be missing under it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"needs {module}: {error}")


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def watch():
    """Cameras that are closed with the test."""
    opened: list[Camera] = []

    def watched(source, **settings) -> Camera:
        opened.append(Camera("front", source, **settings))
        return opened[-1]

    yield watched
    for camera in opened:
        camera.close()


class TestStalledFake(CameraLaws):
    @pytest.fixture
    def source(self):
        return FakeSource()

    def stop(self, source):
        source.stalled = True

    def go_on(self, source):
        source.stalled = False


class TestUnpluggedFake(CameraLaws):
    @pytest.fixture
    def source(self):
        return FakeSource(numbered=False)

    def stop(self, source):
        source.unplugged = True

    def go_on(self, source):
        source.unplugged = False


class TestReplay(CameraLaws):
    """stop() and go_on() change what is on disk: the folder is read again whenever the source is opened."""

    @pytest.fixture
    def source(self, tmp_path):
        self.folder = write_folder(tmp_path / "frames")
        return ReplaySource(path=self.folder, fps=FPS)

    def stop(self, source):
        self.folder.rename(self.folder.with_name("away"))

    def go_on(self, source):
        self.folder.with_name("away").rename(self.folder)


class TestRealSense(CameraLaws):
    @pytest.fixture
    def source(self, recording):
        return RealSenseSource(device=str(recording), width=64, height=48, fps=FPS, repeat=False)


class TestUvc(CameraLaws):
    @pytest.fixture
    def source(self, video):
        return UvcSource(device=str(video))


def test_a_usb_device_keeps_the_same_laws(tmp_path):
    need("cv2")
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler, cc, for a V4L2 device in software")
    library = tmp_path / "v4l2_device.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-pthread", "-o", library, HERE / "v4l2_device.c"], check=True)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "v4l2_laws.py"],
        env={**os.environ, "LD_PRELOAD": str(library), "V4L2_DEVICE": str(tmp_path / "video0")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# What Camera makes of any source.


def test_a_frame_must_be_rgb_bytes():
    with pytest.raises(TypeError, match=r"must be uint8 \(H, W, 3\), got float64 \(4, 4, 3\)"):
        Frame(image=np.zeros((4, 4, 3)), capture_time_ns=0)
    with pytest.raises(TypeError, match=r"got uint8 \(4, 4\)"):
        Frame(image=np.zeros((4, 4), np.uint8), capture_time_ns=0)


@pytest.mark.parametrize(
    ("crop", "rotate", "expected"),
    [
        ("none", 0, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("none", 90, [[5, 1], [6, 2], [7, 3], [8, 4]]),
        ("none", 180, [[8, 7, 6, 5], [4, 3, 2, 1]]),
        ("none", 270, [[4, 8], [3, 7], [2, 6], [1, 5]]),
        ("square", 0, [[2, 3], [6, 7]]),
        ("square", 90, [[6, 2], [7, 3]]),
    ],
)
def test_an_image_is_turned_clockwise_then_cropped(crop, rotate, expected):
    image = np.repeat(np.arange(1, 9, dtype=np.uint8).reshape(2, 4, 1), 3, axis=2)
    turned = upright(image, crop=crop, rotate=rotate)
    np.testing.assert_array_equal(turned[..., 0], expected)
    assert turned.shape[2] == 3 and turned.flags.c_contiguous


def test_the_policy_sees_the_turned_and_cropped_image(watch, source):
    source.frozen = True
    source.image[:, :8] = 255
    frame = next_frames(watch(source, rotate=90, crop="square", frozen_after=0), 1)[0]
    assert frame.image.shape == (48, 48, 3)
    np.testing.assert_array_equal(frame.image, 0)  # the bright left edge came to the top, and was cut off


def frame_of(value: int, *, number: int = -1, at_ms: int = 0) -> Frame:
    return Frame(image=np.full((40, 40, 3), value, np.uint8), capture_time_ns=at_ms * 10**6, number=number)


def test_frames_are_the_same_by_number_by_time_or_by_every_pixel():
    first = frame_of(7, number=1, at_ms=1)
    assert is_same(first, frame_of(8, number=1, at_ms=2))
    assert is_same(first, frame_of(8, number=2, at_ms=1))
    assert is_same(first, frame_of(7, number=2, at_ms=2))
    assert not is_same(first, frame_of(8, number=2, at_ms=2))
    one_pixel_off = frame_of(7, number=2, at_ms=2)
    one_pixel_off.image[5, 5, 1] = 8
    assert not is_same(first, one_pixel_off)


def test_drops_are_counted_by_number():
    assert dropped_between(frame_of(0, number=3), frame_of(0, number=4), 30) == 0
    assert dropped_between(frame_of(0, number=3), frame_of(0, number=7), 30) == 3
    assert dropped_between(frame_of(0, number=30), frame_of(0, number=0), 30) == 0


@pytest.mark.parametrize(("interval_ms", "dropped"), [(20, 0), (29, 0), (31, 1), (40, 1), (51, 2), (100, 4)])
def test_drops_without_numbers_are_counted_by_time_from_one_and_a_half_periods_on(interval_ms, dropped):
    assert dropped_between(frame_of(0), frame_of(1, at_ms=interval_ms), fps=50) == dropped


def test_drops_are_not_counted_where_neither_number_nor_rate_is_known():
    assert dropped_between(frame_of(0), frame_of(1, at_ms=1000), fps=0) == 0


def test_the_report_counts_what_the_sensor_took_and_nobody_got(watch, source):
    camera = watch(source)
    next_frames(camera, 2)
    before = camera.report().dropped
    source.number += 7
    eventually(lambda: camera.report().dropped >= before + 7)
    assert str(camera.report()).endswith(f"{camera.report().dropped} dropped, source reopened 0 times")


def test_without_a_sensors_numbers_frames_are_counted(watch):
    camera = watch(FakeSource(numbered=False))
    eventually(lambda: camera.report().frames >= 3)
    assert camera.latest().number >= 2


def test_before_the_first_frame_there_is_nothing_to_show(watch, source):
    source.stalled = True
    camera = watch(source)
    assert camera.trouble() == "camera front: no frame yet"
    with pytest.raises(CameraError, match="camera front: no frame yet"):
        camera.latest()
    source.stalled = False
    eventually(lambda: not camera.trouble())


def test_latest_does_not_wait_for_a_read_that_does(watch, source):
    camera = watch(source, reopen_after_s=120)
    next_frames(camera, 1)
    source.stalled = True
    eventually(lambda: camera.trouble())
    began_s = time.monotonic()
    assert camera.latest() is camera.latest()
    assert time.monotonic() - began_s < 60
    assert camera.trouble().startswith("camera front: no frame for ") and camera.trouble().endswith(" s (limit 0.3 s)")
    source.stalled = False


def test_frames_that_repeat_are_a_frozen_camera(watch, source):
    camera = watch(source, max_age_s=60, frozen_after=4)
    next_frames(camera, 2)
    assert not camera.trouble()
    source.frozen = True
    eventually(lambda: camera.trouble())
    assert int(camera.trouble().removeprefix("camera front: frozen: ").split()[0]) >= 4
    source.frozen = False
    eventually(lambda: not camera.trouble())


def test_a_camera_of_a_still_scene_may_be_told_so(watch, source):
    source.frozen = True
    camera = watch(source, max_age_s=60, frozen_after=0)
    eventually(lambda: camera.report().frames > 10)
    assert not camera.trouble()


def test_each_loss_and_each_return_is_logged_once(watch, source, caplog):
    camera = watch(source)
    next_frames(camera, 2)
    for _ in range(2):
        tries = source.log.count("open")
        source.unplugged = True
        eventually(lambda tries=tries: source.log.count("open") >= tries + 3)
        source.unplugged = False
        eventually(lambda: not camera.trouble())
    lost, back = "camera front lost: the plug is out", "camera front is back"
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [lost, back] * 2
    assert camera.report().reopened == 2


def test_a_source_is_closed_before_it_is_opened_again(watch, source):
    camera = watch(source)
    next_frames(camera, 1)
    source.unplugged = True
    eventually(lambda: source.log.count("open") >= 3)
    source.unplugged = False
    camera.close()
    assert source.log[-1] == "close"
    opened = [at for at, what in enumerate(source.log) if what == "open"]
    assert all(source.log[at - 1] == "close" for at in opened[1:])


def test_a_camera_that_cannot_be_opened_is_refused_at_once(source):
    source.unplugged = True
    with pytest.raises(CameraError, match="camera front: nothing is plugged in"):
        Camera("front", source)
    assert source.log == ["open", "close"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "round"}, r"crop must be one of \('none', 'square'\).*got 'round'"),
        ({"rotate": 45}, r"rotate of \(0, 90, 180, 270\).*45"),
        ({"max_age_s": 0}, r"must be above 0, got 0"),
        ({"frozen_after": 1}, r"must be 0 or at least 2, got 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(source, settings, message):
    with pytest.raises(ValueError, match=message):
        Camera("front", source, **settings)
    assert source.log == []


# What each make adds.


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for number, image_HW3 in enumerate(IMAGES_FHW3):
        Image.fromarray(image_HW3).save(folder / f"{number:03}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def write_episode(path: Path) -> Path:
    writer = EpisodeWriter(path, episode_pb2.EpisodeStart(episode_id="e"))
    for number, image_HW3 in enumerate(IMAGES_FHW3):
        images = {"wrist": encode_image(image_HW3), "agentview": encode_image(255 - image_HW3)}
        observation = episode_pb2.Observation(images=images)
        writer.decision(episode_pb2.Decision(decision=number, observation=observation))
    writer.finish(episode_pb2.EpisodeEnd())
    return path


def write_array(path: Path) -> Path:
    np.save(path, IMAGES_FHW3)
    return path


def write_arrays(path: Path) -> Path:
    np.savez(path, wrist=IMAGES_FHW3, joints=np.zeros(3))
    return path


@pytest.mark.parametrize(
    ("write", "name", "of"),
    [
        (write_folder, "frames", ""),
        (write_array, "frames.npy", ""),
        (write_arrays, "frames.npz", "wrist"),
        (write_episode, "frames.episode", "wrist"),
    ],
)
def test_what_was_recorded_is_shown_in_order_to_the_bit(tmp_path, write, name, of):
    source = ReplaySource(path=write(tmp_path / name), of=of, fps=1000, loop=False)
    source.open()
    for number, image_HW3 in enumerate(IMAGES_FHW3):
        frame = source.read(1.0)
        np.testing.assert_array_equal(frame.image, image_HW3)
        assert frame.number == number
    with pytest.raises(CameraError, match=r"is over, after 30 frames"):
        source.read(1.0)


def test_a_recording_begins_again(tmp_path):
    source = ReplaySource(path=write_array(tmp_path / "frames.npy"), fps=1000)
    source.open()
    frames = [source.read(1.0) for _ in range(31)]
    np.testing.assert_array_equal(frames[30].image, frames[0].image)
    assert frames[30].number == 30


def test_a_recording_that_is_over_stays_lost(watch, tmp_path):
    camera = watch(ReplaySource(path=write_array(tmp_path / "frames.npy"), fps=500, loop=False))
    eventually(lambda: camera.report().reopened >= 2)
    assert camera.report().frames == 30
    assert "frames.npy is over, after 30 frames" in camera.trouble()


@pytest.mark.parametrize(
    ("write", "name", "of", "refusal"),
    [
        (lambda path: path, "nowhere.npy", "", r"cannot replay .*nowhere.npy: .*No such file"),
        (Path.mkdir, "empty", "", r"cannot replay .*empty: it holds no image"),
        (write_arrays, "frames.npz", "", r"of must be one of \['joints', 'wrist'\], got ''"),
        (write_episode, "frames.episode", "top", r"of must be one of \['agentview', 'wrist'\], got 'top'"),
        (lambda path: path.write_bytes(b"?"), "frames.episode", "", r"cannot replay .*not an episode file"),
        (lambda path: np.save(path, np.array([{}])), "frames.npy", "", r"cannot replay .*Python objects"),
    ],
)
def test_a_recording_that_cannot_be_shown_is_refused_by_name(tmp_path, write, name, of, refusal):
    write(tmp_path / name)
    with pytest.raises(CameraError, match=refusal):
        ReplaySource(path=tmp_path / name, of=of).open()


def test_an_array_that_is_no_image_is_the_recordings_fault(tmp_path):
    np.save(tmp_path / "depth.npy", np.zeros((3, 8, 8), np.float32))
    source = ReplaySource(path=tmp_path / "depth.npy")
    source.open()
    with pytest.raises(CameraError, match=r"cannot replay .*depth.npy: a frame must be uint8 \(H, W, 3\), got float32"):
        source.read(1.0)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    need("pyrealsense2")
    path = tmp_path_factory.mktemp("realsense") / "frames.db3"
    record(path, IMAGES_FHW3, fps=FPS)
    return path


@pytest.mark.parametrize("asked", [{}, {"width": 64, "height": 48, "fps": FPS}])
def test_realsense_frames_come_back_to_the_bit_with_the_sensors_numbers(recording, asked):
    source = RealSenseSource(device=str(recording), **asked)
    source.open()
    frames = [source.read(10.0) for _ in range(40)]
    source.close()
    assert source.fps == FPS
    for frame in frames:
        np.testing.assert_array_equal(frame.image, IMAGES_FHW3[frame.number])
    assert len({frame.number for frame in frames}) > 10


def test_a_recording_of_a_realsense_ends_unless_it_repeats(recording):
    source = RealSenseSource(device=str(recording), repeat=False)
    source.open()
    with pytest.raises(CameraError, match=r"RealSense .*frames.db3: sent no frame within 1 s"):
        for _ in range(100):
            source.read(1.0)
    source.close()


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"width": 640, "height": 480}, r"has no colour 640x480 at 0 fps \(0: any\), only \['64x48 at 30 fps'\]"),
        ({"fps": 15}, r"has no colour 0x0 at 15 fps"),
        ({"exposure": 100}, r"has no exposure to set, got exposure 100"),
    ],
)
def test_a_realsense_refuses_what_it_cannot_do(recording, asked, refusal):
    with pytest.raises(CameraError, match=refusal):
        Camera("front", RealSenseSource(device=str(recording), **asked))


@pytest.mark.parametrize(
    ("device", "refusal"),
    [
        ("no-such-serial", r"RealSense no-such-serial: is not connected: the device must be one of \["),
        ("/nowhere/frames.db3", r"RealSense /nowhere/frames.db3: .*does not exist"),
    ],
)
def test_a_realsense_that_is_not_there_is_refused(device, refusal):
    need("pyrealsense2")
    with pytest.raises(CameraError, match=refusal):
        RealSenseSource(device=device).open()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Lossless, so that frames can be compared to the bit."""
    need("cv2")
    import cv2

    path = tmp_path_factory.mktemp("uvc") / "frames.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), FPS, (64, 48))
    for image_HW3 in IMAGES_FHW3:
        writer.write(np.ascontiguousarray(image_HW3[..., ::-1]))
    writer.release()
    return path


def test_video_frames_come_back_to_the_bit_red_first_and_end(video):
    source = UvcSource(device=str(video), width=64, height=48)
    source.open()
    for image_HW3 in IMAGES_FHW3:
        np.testing.assert_array_equal(source.read(1.0).image, image_HW3)
    with pytest.raises(CameraError, match=r"frames.avi is over"):
        source.read(1.0)
    source.close()
    source.open()
    np.testing.assert_array_equal(source.read(1.0).image, IMAGES_FHW3[0])
    source.close()


def test_a_video_refuses_another_size(video):
    source = UvcSource(device=str(video), width=32, height=24)
    with pytest.raises(CameraError, match=r"cannot do width 32 \(it says 64\), height 24 \(it says 48\)"):
        source.open()


def test_a_usb_camera_that_is_not_there_is_refused():
    need("cv2")
    with pytest.raises(CameraError, match=r"there is no /dev/video63, only \["):
        UvcSource(device="63").open()


def test_a_file_that_is_no_video_is_refused(tmp_path):
    need("cv2")
    (tmp_path / "frames.avi").write_text("?")
    with pytest.raises(CameraError, match=r"frames.avi cannot be opened"):
        UvcSource(device=str(tmp_path / "frames.avi")).open()


# From a description to a camera.


@pytest.fixture
def installed(offer):
    """A package that offers cameras, as far as Python's own machinery can tell."""
    offer(
        f"[{cameras.GROUP}]\n"
        "fake = tests.client.fake_camera:FakeSource\n"
        "pictures = robot_client.cameras.replay:ReplaySource\n"
        "absent = tests.client.no_such_module:Source\n"
        "bare = tests.client.fake_camera:SourceWithoutItsSdk\n"
    )


def test_our_makes_are_found_by_name():
    assert {"realsense", "replay", "uvc"} <= set(cameras.available())
    assert cameras.load("replay") is ReplaySource


def test_a_description_says_make_device_and_settings(installed, tmp_path):
    folder = write_folder(tmp_path / "frames")
    camera = cameras.parse(f"front=pictures:{folder},fps=50,loop=false,crop=square,rotate=90,frozen_after=0")
    frame = next_frames(camera, 1)[0]
    camera.close()
    assert camera.name == "front"
    expected = upright(IMAGES_FHW3[frame.number], crop="square", rotate=90)
    np.testing.assert_array_equal(frame.image, expected)


def test_a_make_suffices(installed):
    camera = cameras.parse("wrist=fake")
    next_frames(camera, 1)
    camera.close()
    assert camera.name == "wrist"


FAKE_SETTINGS = r"device', 'fps', 'numbered', 'crop', 'rotate', 'max_age_s', 'frozen_after', 'reopen_after_s'"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("front", CameraError, r"must be NAME=MAKE\[:DEVICE\]\[,key=value...\], got 'front'"),
        ("=fake", CameraError, r"must be NAME=MAKE"),
        ("front=fake,square", CameraError, r"must be NAME=MAKE.*got 'front=fake,square'"),
        ("front=webcam:0", UnknownCamera, r"must be one of \[.*'bare', 'fake'.*\], got 'webcam'"),
        ("front=absent:0", UnknownCamera, r"'absent' needs a package that is not installed: .*no_such_module"),
        ("front=bare:0", UnknownCamera, r"not installed: No module named 'no_such_sdk'; .*'vla-rl\[bare\]'"),
        ("front=fake,zoom=2,iso=3", CameraError, rf"fake has the settings \['{FAKE_SETTINGS}\], got \['iso', 'zoom'\]"),
        ("front=fake,fps=fast", CameraError, r"camera front: fps must be float, got 'fast'"),
        ("front=fake,frozen_after=2.5", CameraError, r"camera front: frozen_after must be int, got '2.5'"),
        ("front=fake,numbered=perhaps", CameraError, r"camera front: numbered must be bool, got 'perhaps'"),
        ("front=fake,rotate=45", CameraError, r"rotate must be one of \['0', '90', '180', '270'\], got '45'"),
        ("front=fake,max_age_s=0", CameraError, r"camera front: max_age_s and reopen_after_s must be above 0, got 0.0"),
        ("front=pictures", CameraError, r"camera front: .*missing.*'path'"),
        ("front=pictures:/nowhere", CameraError, r"camera front: cannot replay /nowhere: "),
    ],
)
def test_a_description_that_makes_no_camera_is_refused_with_what_there_is(installed, text, error, message):
    with pytest.raises(error, match=message):
        cameras.parse(text)
