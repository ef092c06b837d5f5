"""Pixels: TensorFlow's arithmetic, and honest errors."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protos import image

REFERENCE = Path(__file__).parents[1] / "golden" / "preprocess" / "libero_preprocess.npz"
PROBES = ("20x30_to_17x23", "16x16_to_28x28", "7x9_to_14x5")


@pytest.fixture(scope="module")
def arrays():
    return np.load(REFERENCE)


@pytest.fixture
def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("probe", PROBES)
def test_lanczos_equals_tensorflow_on_odd_shapes(arrays, probe):
    expected = arrays[f"probe_lanczos3_aa_{probe}"]
    ours = image.lanczos3(arrays[f"probe_in_{probe}"], expected.shape[:2])
    assert np.abs(ours - expected).max() < 3e-3  # of 255


@pytest.mark.parametrize("probe", PROBES)
def test_crop_and_resize_equals_tensorflow_bit_for_bit(arrays, probe):
    expected = arrays[f"probe_crop_and_resize_{probe}"]
    box = tuple(arrays[f"probe_box_{probe}"])
    assert np.array_equal(image.crop_and_resize(arrays[f"probe_in_{probe}"], box, expected.shape[:2]), expected)


def test_jpeg_is_decoded_with_the_fast_dct(arrays):
    decoded = image.decode_jpeg(arrays["jpeg_bytes_scene_0"].tobytes(), size=(256, 256))
    assert np.array_equal(decoded, arrays["jpeg_decoded"][0])


def test_png_is_lossless(frame):
    assert np.array_equal(image.decode_png(image.encode_png(frame), size=(40, 56)), frame)


def test_jpeg_takes_views_of_any_order(frame):
    turned = frame[::-1, ::-1]
    assert image.encode_jpeg(turned) == image.encode_jpeg(turned.copy())


@pytest.mark.parametrize("decode", [image.decode_jpeg, image.decode_png])
@pytest.mark.parametrize("data", [b"", b"junk", b"\xff\xd8\xff\xe0 cut", b"\x89PNG\r\n\x1a\n cut"])
def test_bytes_that_are_no_image_are_refused(decode, data):
    with pytest.raises(image.ImageError, match="not a readable"):
        decode(data)


def test_a_truncated_image_is_refused_or_complete(frame):
    with pytest.raises(image.ImageError, match="not a readable PNG"):
        image.decode_png(image.encode_png(frame)[:-200])


SHORT = {kind: b"" for kind in (b"pHYs", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"fcTL")}
BOMB = zlib.compress(bytes(2**26))


@pytest.mark.parametrize("kind, data", [*SHORT.items(), (b"zTXt", b"k\0\0" + BOMB), (b"iCCP", b"k\0\0" + BOMB)])
def test_a_png_with_a_bad_chunk_is_refused_or_read_as_it_is(frame, kind, data):
    whole = image.encode_png(frame)
    pixels = whole.index(b"IDAT") - 4
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    try:
        read = image.decode_png(whole[:pixels] + chunk + whole[pixels:])
    except image.ImageError as error:
        assert "not a readable PNG" in str(error)
    else:
        assert np.array_equal(read, frame)


def test_a_depth_image_is_no_frame(frame):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 5000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(image.ImageError, match="at most 8 bits a colour"):
        image.decode_png(buffer.getvalue())


def test_another_size_than_announced_is_refused(frame):
    with pytest.raises(image.ImageError, match="JPEG must be 56x40, got 40x56"):
        image.decode_jpeg(image.encode_jpeg(frame), size=(56, 40))
    with pytest.raises(image.ImageError, match="PNG must be 56x40, got 40x56"):
        image.decode_png(image.encode_png(frame), size=(56, 40))


def test_resizing_to_the_same_size_changes_nothing(frame):
    assert image.resize(frame, (40, 56)) is frame


def test_a_flat_image_stays_flat():
    flat = np.full((37, 53, 3), 201, np.uint8)
    assert (image.resize(flat, (17, 80)) == 201).all()
    assert (image.resize(flat, (17, 80), "bicubic") == 201).all()


def test_unknown_filters_are_refused(frame):
    with pytest.raises(ValueError, match=r"filter must be one of \['lanczos3', 'bicubic'\], got 'nearest'"):
        image.resize(frame, (10, 10), "nearest")
