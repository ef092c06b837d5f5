"""Clips keep their frames, their order and their size limit."""

from __future__ import annotations

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sim.video import VideoError, write_gif, write_mp4


def clip(n: int, size: int = 64) -> list[np.ndarray]:
    """Frames that brighten from black to white."""
    return [np.full((size, size, 3), round(255 * i / (n - 1)), np.uint8) for i in range(n)]


def test_an_mp4_has_every_frame_in_order(tmp_path):
    write_mp4(tmp_path / "clip.mp4", clip(12), frames_per_s=10)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4"))
    assert next(reader)["size"] == (64, 64)
    means = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert len(means) == 12
    np.testing.assert_allclose(means, [frame.mean() for frame in clip(12)], atol=6)


def test_an_odd_size_loses_its_last_row_and_column(tmp_path):
    write_mp4(tmp_path / "clip.mp4", clip(4, size=65), frames_per_s=10)
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4")))["size"] == (64, 64)


def test_an_encoder_that_fails_says_why(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(VideoError, match=r"clip\.mp4: ffmpeg ended with .*directory"):
        write_mp4(tmp_path / "clip.mp4", clip(4), frames_per_s=10)


def test_a_gif_stays_below_its_limit(tmp_path):
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(32)]
    write_gif(tmp_path / "clip.gif", frames, frames_per_s=10, max_bytes=60_000)
    assert (tmp_path / "clip.gif").stat().st_size <= 60_000
    with Image.open(tmp_path / "clip.gif") as picture:
        assert 4 <= picture.n_frames < 32


def test_a_folder_that_cannot_be_made_is_no_video_and_no_crash(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VideoError, match=r"a.mp4: .*exists"):
        write_mp4(tmp_path / "file" / "a.mp4", [np.zeros((4, 4, 3), np.uint8)], frames_per_s=10)
