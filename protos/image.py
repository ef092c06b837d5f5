"""Pixels: encode, decode, resize, crop.  One arithmetic for client, server and trainer.

The resize and the crop have TensorFlow's semantics, since the published policies were trained on images that went
through it; `../shared/openvla_golden/README.md` holds the reference arrays and the formulas.  Images are uint8
(H, W, 3) RGB.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

Filter = Literal["lanczos3", "bicubic"]
FILTERS: tuple[str, ...] = get_args(Filter)
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pillow's modes whose conversion to RGB loses nothing but transparency: a depth image's would be cut off at 255."""

LANCZOS_RADIUS = 3.0


class ImageError(ValueError):
    """Bytes that are not the image they were said to be."""


def encode_jpeg(pixels_HW3: np.ndarray, *, quality: int = 95) -> bytes:
    """JPEG with 4:2:0 chroma: the stream decodes to the same pixels as tf.image.encode_jpeg's."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HW3)).save(buffer, "JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


def decode_jpeg(data: bytes, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W, 3), decoded with the fast integer DCT, TensorFlow's default.  `size` is the expected (H, W)."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size("JPEG", (int(height), int(width)), size)
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"data is not a readable JPEG: {error}") from error


def encode_png(pixels_HW3: np.ndarray) -> bytes:
    """PNG, lossless, at the fastest compression level."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HW3)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W, 3).  `size` is the expected (H, W)."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            _check_size("PNG", (image.height, image.width), size)
            if image.mode not in EIGHT_BIT:
                raise ImageError(f"PNG must have at most 8 bits a colour, got Pillow's mode {image.mode!r}")
            return np.asarray(image.convert("RGB"))
    except ImageError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"data is not a readable PNG: {error}") from error


def _check_size(kind: str, got: tuple[int, int], expected: tuple[int, int] | None) -> None:
    if expected is not None and got != tuple(expected):
        raise ImageError(f"{kind} must be {expected[0]}x{expected[1]}, got {got[0]}x{got[1]}")


def jpeg_round_trip(pixels_HW3: np.ndarray, *, quality: int = 95) -> np.ndarray:
    """What is left of an image after it was stored in a JPEG data set."""
    return decode_jpeg(encode_jpeg(pixels_HW3, quality=quality))


def resize(pixels_HW3: np.ndarray, size: tuple[int, int], filter: Filter = "lanczos3") -> np.ndarray:
    """uint8 at `size` = (height, width); untouched when it has that size already.

    lanczos3: tf.image.resize(antialias=True), rounded half to even and clipped.  bicubic: Pillow's.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter must be one of {list(FILTERS)}, got {filter!r}")
    if pixels_HW3.shape[:2] == tuple(size):
        return pixels_HW3
    if filter == "bicubic":
        return np.asarray(Image.fromarray(pixels_HW3).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.clip(np.rint(lanczos3(pixels_HW3, size)), 0, 255).astype(np.uint8)


def lanczos3(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 (height, width, C), unrounded: the separable Lanczos-3 resize with antialiasing."""
    rows, columns = _lanczos_matrix(pixels_HWC.shape[0], size[0]), _lanczos_matrix(pixels_HWC.shape[1], size[1])
    height, width, channels = pixels_HWC.shape
    tall = rows @ pixels_HWC.reshape(height, width * channels).astype(np.float32)
    return np.matmul(columns, tall.reshape(size[0], width, channels))


@lru_cache(maxsize=32)
def _lanczos_matrix(source: int, target: int) -> np.ndarray:
    """float32 (target, source).  Half-pixel centres, kernel widened when shrinking, rows that sum to 1."""
    scale = source / target
    widening = max(scale, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * scale
    distance = (np.arange(source)[None, :] + 0.5 - centre) / widening
    weight = np.where(np.abs(distance) < LANCZOS_RADIUS, np.sinc(distance) * np.sinc(distance / LANCZOS_RADIUS), 0.0)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def centre_crop(pixels_HW3: np.ndarray, *, area: float = 0.9) -> np.ndarray:
    """uint8 of the same size: the middle part of that area, scaled back up (tf.image.crop_and_resize, bilinear)."""
    height, width = pixels_HW3.shape[:2]
    cropped = crop_and_resize(pixels_HW3 * np.float32(1 / 255), centre_box(area), (height, width))
    # tf.image.convert_image_dtype(saturate=True): scale by 255.5 and truncate.
    return np.clip(np.floor(cropped * np.float32(255.5)), 0, 255).astype(np.uint8)


def centre_box(area: float) -> tuple[float, float, float, float]:
    """(y1, x1, y2, x2) in [0, 1]: sides sqrt(area)."""
    side = np.sqrt(np.float32(area))
    low = (np.float32(1) - side) / np.float32(2)
    return float(low), float(low), float(low + side), float(low + side)


def crop_and_resize(
    pixels_HWC: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    """float32 (height, width, C): bilinear samples of the box, corners aligned, in float32 as TensorFlow does it."""
    y1, x1, y2, x2 = box
    top, bottom, dy = _bilinear(y1, y2, pixels_HWC.shape[0], size[0])
    left, right, dx = _bilinear(x1, x2, pixels_HWC.shape[1], size[1])
    pixels = pixels_HWC.astype(np.float32, copy=False)
    dx = dx[None, :, None]
    # Horizontally first, then vertically: the order fixes the last bit.
    wide = pixels[:, left] + (pixels[:, right] - pixels[:, left]) * dx
    return wide[top] + (wide[bottom] - wide[top]) * dy[:, None, None]


def _bilinear(low: float, high: float, source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two neighbours of each sample, and the float32 weight of the second."""
    low32, high32, last = np.float32(low), np.float32(high), np.float32(source - 1)
    step = (high32 - low32) * last / np.float32(target - 1)
    position = low32 * last + np.arange(target, dtype=np.float32) * step
    first = np.floor(position)
    second = np.ceil(position)
    return first.astype(np.intp), np.minimum(second, last).astype(np.intp), position - first
