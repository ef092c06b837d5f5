"""numpy <-> wire: the only place where bytes become arrays.

Everything that arrives is checked here: a message that does not describe its own bytes raises CodecError, which names
the field, what was got and what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from protos import image, tensor_pb2

ImageFormat = Literal["raw", "jpeg", "png"]

DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DTYPE_FLOAT64: np.dtype("<f8"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DTYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DTYPE_UINT8: np.dtype("u1"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_SIDE_PX = 4096
MAX_AXES = 8


class CodecError(ValueError):
    """A message whose bytes are not what it says.  `field` is the path of the message inside its request."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


def encode_tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    """The array, of any shape and one of the dtypes in DTYPES, as a Tensor.  Raises TypeError for another dtype."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in CODES:
        raise TypeError(f"dtype must be one of {[d.name for d in CODES]}, got {array.dtype}")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return tensor_pb2.Tensor(dtype=CODES[dtype], shape=array.shape, data=data)


def decode_tensor(
    message: tensor_pb2.Tensor,
    field: str = "tensor",
    *,
    dtype: str | None = None,
    shape: Sequence[int | None] | None = None,
) -> np.ndarray:
    """The Tensor as a read-only array.

    dtype and shape, when given, are what the caller expects; None in shape accepts any extent.  Raises CodecError.
    """
    got = DTYPES.get(message.dtype)
    if got is None:
        raise CodecError(field, f"dtype must be one of {[d.name for d in CODES]}, got code {message.dtype}")
    if dtype is not None and got != np.dtype(dtype):
        raise CodecError(field, f"dtype must be {dtype}, got {got.name}")
    if len(message.shape) > MAX_AXES:
        raise CodecError(field, f"shape must have at most {MAX_AXES} axes, got {len(message.shape)}")
    extents = tuple(message.shape)
    if shape is not None and not _fits(extents, shape):
        wanted = tuple("any" if extent is None else extent for extent in shape)
        raise CodecError(field, f"shape must be {wanted}, got {extents}")
    count = 1
    for extent in extents:
        count *= extent
    if len(message.data) != count * got.itemsize:
        raise CodecError(
            field, f"data must be {count * got.itemsize} bytes for {got.name}{extents}, got {len(message.data)}"
        )
    return np.frombuffer(message.data, dtype=got).reshape(extents)


def _fits(extents: tuple[int, ...], shape: Sequence[int | None]) -> bool:
    return len(extents) == len(shape) and all(
        want is None or have == want for have, want in zip(extents, shape, strict=True)
    )


def encode_image(pixels_HW3: np.ndarray, format: ImageFormat = "raw", *, quality: int = 95) -> tensor_pb2.Image:
    """uint8 (H, W, 3) RGB as an Image.  JPEG is lossy (`quality` 1..100), raw and PNG are not."""
    message, data = encode_pixels(pixels_HW3, format, quality=quality)
    message.data = bytes(data)
    return message


def encode_pixels(
    pixels_HW3: np.ndarray, format: ImageFormat, *, quality: int = 95
) -> tuple[tensor_pb2.Image, bytes | memoryview]:
    """encode_image() without its `data`, and these: raw pixels are not copied where they lie in one piece."""
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3:
        raise TypeError(f"an image must be uint8 (H, W, 3), got {pixels_HW3.dtype} {pixels_HW3.shape}")
    height, width = pixels_HW3.shape[:2]
    if format == "jpeg":
        encoding, data = tensor_pb2.ENCODING_JPEG, image.encode_jpeg(pixels_HW3, quality=quality)
    elif format == "png":
        encoding, data = tensor_pb2.ENCODING_PNG, image.encode_png(pixels_HW3)
    else:
        encoding, data = tensor_pb2.ENCODING_RAW_RGB8, np.ascontiguousarray(pixels_HW3).reshape(-1).data
    return tensor_pb2.Image(encoding=encoding, height=height, width=width), data


def decode_image(message: tensor_pb2.Image, field: str = "image") -> np.ndarray:
    """The Image as uint8 (H, W, 3) RGB.  Raises CodecError when the bytes are not such an image."""
    height, width = message.height, message.width
    if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
        raise CodecError(field, f"height and width must be in [1, {MAX_SIDE_PX}], got {height}x{width}")
    if message.encoding == tensor_pb2.ENCODING_RAW_RGB8:
        if len(message.data) != height * width * 3:
            raise CodecError(
                field, f"data must be {height * width * 3} bytes for {height}x{width} RGB, got {len(message.data)}"
            )
        return np.frombuffer(message.data, np.uint8).reshape(height, width, 3)
    if message.encoding not in (tensor_pb2.ENCODING_JPEG, tensor_pb2.ENCODING_PNG):
        raise CodecError(field, f"encoding must be RAW_RGB8, JPEG or PNG, got code {message.encoding}")
    try:
        if message.encoding == tensor_pb2.ENCODING_JPEG:
            pixels = image.decode_jpeg(message.data, size=(height, width))
        else:
            pixels = image.decode_png(message.data, size=(height, width))
    except image.ImageError as error:
        raise CodecError(field, str(error)) from error
    return pixels
