"""A caption and a neighbour leave the frames as they are."""

from __future__ import annotations

import numpy as np

from protos.animation import CAPTION_PX, captioned, side_by_side


def clip(n: int, size: int = 64) -> list[np.ndarray]:
    """Frames that brighten from black to white."""
    return [np.full((size, size, 3), round(255 * i / (n - 1)), np.uint8) for i in range(n)]


def test_a_caption_leaves_the_picture_alone():
    frame = clip(3)[1]
    captioned_frame = captioned(frame, "pick up the bowl")
    assert captioned_frame.shape == (64 + CAPTION_PX, 64, 3)
    np.testing.assert_array_equal(captioned_frame[:64], frame)
    assert captioned_frame[64:].max() > 200


def test_a_clip_that_is_over_stands_still_beside_a_longer_one():
    frames = side_by_side([clip(3), clip(5), clip(2)], columns=2, hold=1)
    assert len(frames) == 6 and frames[0].shape == (128, 128, 3)
    np.testing.assert_array_equal(frames[5][:64, :64], clip(3)[2])
    np.testing.assert_array_equal(frames[4][:64, 64:], clip(5)[4])
    assert not frames[5][64:, 64:].any()
