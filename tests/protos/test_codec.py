"""Bytes become arrays only when they are what their message says; all else is a CodecError that names the field."""

from __future__ import annotations

import contextlib
import zlib
from struct import pack

import numpy as np
import pytest

from protos import codec, tensor_pb2
from protos.codec import CodecError, decode_image, decode_tensor, encode_image, encode_tensor

RNG = np.random.default_rng(0)


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """Smooth, so that JPEG keeps it nearly."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, (rows + columns) // 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("dtype", [dtype.name for dtype in codec.DTYPES.values()])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3), (2, 0, 4), (2, 3, 4, 5)])
def test_a_tensor_comes_back_as_it_was(dtype, shape):
    array = (100 * RNG.standard_normal(shape)).astype(dtype)
    back = decode_tensor(encode_tensor(array), dtype=dtype, shape=shape)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(12.0)[::-2], np.arange(3, dtype=">f8")])
def test_a_tensor_travels_row_major_and_little_endian_whatever_its_memory(array):
    message = encode_tensor(array)
    assert message.data == array.astype("<f8").tobytes(order="C")
    np.testing.assert_array_equal(decode_tensor(message), array)


def test_values_that_are_not_finite_travel():
    array = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    assert decode_tensor(encode_tensor(array)).tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [np.zeros(2, bool), np.zeros(2, np.float16), np.zeros(2, complex), np.array(["a"])])
def test_a_dtype_that_the_contract_does_not_have_is_refused(array):
    with pytest.raises(TypeError, match="dtype must be one of"):
        encode_tensor(array)


def test_a_decoded_tensor_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        decode_tensor(encode_tensor(np.zeros(3)))[0] = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 0}, "dtype must be one of .*, got code 0"),
        ({"dtype": 99}, "got code 99"),
        ({"data": b"12345"}, r"data must be 24 bytes for float32\(2, 3\), got 5"),
        ({"data": b""}, "must be 24 bytes .* got 0"),
        ({"shape": [2**32 - 1] * 4}, "got 24"),
        ({"shape": [2, 3, 0]}, "must be 0 bytes"),
    ],
)
def test_a_tensor_that_does_not_describe_its_bytes_is_refused(fields, message):
    tensor = encode_tensor(np.zeros((2, 3), np.float32))
    for name in fields:
        tensor.ClearField(name)
    tensor.MergeFrom(tensor_pb2.Tensor(**fields))
    with pytest.raises(CodecError, match="^observation.state: .*" + message) as refusal:
        decode_tensor(tensor, "observation.state")
    assert refusal.value.field == "observation.state"


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"dtype": "float64"}, "dtype must be float64, got float32"),
        ({"shape": (2, 4)}, r"shape must be \(2, 4\), got \(2, 3\)"),
        ({"shape": (None, 4)}, r"shape must be \('any', 4\), got \(2, 3\)"),
        ({"shape": (6,)}, r"shape must be \(6,\), got \(2, 3\)"),
        ({"shape": ()}, r"shape must be \(\), got \(2, 3\)"),
    ],
)
def test_a_tensor_that_is_not_what_the_caller_expects_is_refused(expected, message):
    with pytest.raises(CodecError, match=message):
        decode_tensor(encode_tensor(np.zeros((2, 3), np.float32)), **expected)


def test_any_extent_is_accepted_where_the_caller_does_not_care():
    assert decode_tensor(encode_tensor(np.zeros((2, 3))), shape=(None, 3)).shape == (2, 3)


@pytest.mark.parametrize("format", ["raw", "png"])
@pytest.mark.parametrize("size", [(1, 1), (20, 30), (31, 7)])
def test_lossless_formats_keep_every_pixel(format, size):
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(encode_image(pixels, format)), pixels)


def test_jpeg_keeps_the_picture_and_takes_fewer_bytes():
    pixels = picture(200, 220)
    message = encode_image(pixels, "jpeg")
    assert len(message.data) < pixels.nbytes / 5
    assert np.abs(decode_image(message).astype(int) - pixels).mean() < 2


def test_an_image_of_a_view_keeps_its_order():
    pixels = picture()[::-1, ::-1]
    for format in ("raw", "png"):
        np.testing.assert_array_equal(decode_image(encode_image(pixels, format)), pixels)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_what_is_not_an_rgb_image_is_not_sent(pixels):
    with pytest.raises(TypeError, match=r"must be uint8 \(H, W, 3\)"):
        encode_image(pixels)


@pytest.mark.parametrize("format", ["raw", "jpeg", "png"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 21}, "21"),
        ({"width": 29}, "29"),
        ({"height": 0}, r"height and width must be in \[1, 4096\], got 0x30"),
        ({"width": 5000}, "got 20x5000"),
        ({"data": b""}, ""),
        ({"data": b"not an image"}, ""),
        ({"encoding": 0}, "encoding must be RAW_RGB8, JPEG or PNG, got code 0"),
        ({"encoding": 7}, "got code 7"),
    ],
)
def test_an_image_that_does_not_describe_its_bytes_is_refused(format, fields, message):
    image = encode_image(picture(), format)
    for name in fields:
        image.ClearField(name)
    image.MergeFrom(tensor_pb2.Image(**fields))
    with pytest.raises(CodecError, match=r"^observation\.images\[wrist\]: .*" + message):
        decode_image(image, "observation.images[wrist]")


def test_one_encoding_is_not_taken_for_another():
    image = encode_image(picture(), "png")
    image.encoding = tensor_pb2.ENCODING_JPEG
    with pytest.raises(CodecError):
        decode_image(image)


def test_a_png_that_says_it_is_enormous_is_refused_before_it_is_unpacked():
    header = b"IHDR" + pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, body, b"IEND"):
        data += pack(">I", len(chunk) - 4) + chunk + pack(">I", zlib.crc32(chunk))
    with pytest.raises(CodecError):
        decode_image(tensor_pb2.Image(encoding=tensor_pb2.ENCODING_PNG, height=20, width=30, data=data))


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_a_compressed_image_that_is_cut_is_refused(format):
    image = encode_image(RNG.integers(0, 256, (20, 30, 3), np.uint8), format)
    for kept in (1, 10, 50, len(image.data) // 2):
        cut = tensor_pb2.Image()
        cut.CopyFrom(image)
        cut.data = image.data[:kept]
        with pytest.raises(CodecError):
            decode_image(cut)


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_a_compressed_image_with_any_byte_changed_is_an_image_or_a_codec_error(format):
    image = encode_image(RNG.integers(0, 256, (20, 30, 3), np.uint8), format)
    for _ in range(300):
        data = bytearray(image.data)
        for position in RNG.integers(0, len(data), 4):
            data[position] = RNG.integers(0, 256)
        changed = tensor_pb2.Image(encoding=image.encoding, height=20, width=30, data=bytes(data))
        with contextlib.suppress(CodecError):
            assert decode_image(changed).shape == (20, 30, 3)
