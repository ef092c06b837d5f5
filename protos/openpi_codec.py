"""openpi's messages: msgpack with numpy arrays in it, as openpi-client packs them, and where things are in them.

    array     {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}
    a number  {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}

As in protos/codec.py, everything that arrives is checked, and a message that breaks a rule raises CodecError: arrays
hold numbers of a few dtypes, never objects, and a short message never takes much memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgpack
import numpy as np

from protos.codec import CodecError

DEFAULT_OPENPI_PORT = 8000
MAX_ENTRIES, MAX_CONTAINERS, MAX_DEPTH, MAX_AXES, MAX_KEY = 4096, 1024, 8, 8, 100
"""Of one list or dict; lists and dicts in one message; dicts in dicts; axes of an array; characters of a key."""
DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")}
DTYPES |= {np.dtype(name).str: np.dtype(name) for name in ("f2", "f4", "f8")}

LIBERO_KEYS = {
    "agentview": "observation/image",
    "robot0_eye_in_hand": "observation/wrist_image",
    "state": "observation/state",
    "prompt": "prompt",
}
"""Camera, state or prompt -> its key in an observation, as openpi's LIBERO examples have them."""

Gripper = Literal["libero", "policy"]
"""What the gripper's action means: -1 opens and 1 closes, as in LIBERO's environments and openpi's examples of them;
or what the policy's own does, which for OpenVLA is 0 for closed and 1 for open."""


def libero_gripper(opening: np.ndarray) -> np.ndarray:
    """LIBERO's -1 to 1 for an opening of 1 to 0; what lies beyond is clipped."""
    return np.clip(1 - 2 * opening, -1, 1)


def gripper_opening(libero: np.ndarray) -> np.ndarray:
    """The opening, 1 to 0, for LIBERO's -1 to 1; what lies beyond, as regressed numbers do, is clipped."""
    return np.clip((1 - libero) / 2, 0, 1)


def pack(message: Mapping[str, Any]) -> bytes:
    """The message, which may hold arrays and nested dicts.  Raises TypeError for what openpi cannot carry."""
    return msgpack.packb(message, default=_packed)  # pyright: ignore[reportReturnType] (its None is for streams)


def unpack(data: bytes) -> dict[str, Any]:
    """The message as a flat dict: keys of nested dicts are joined by "/"; arrays are read-only.  Raises CodecError."""
    containers = _Count()
    try:
        message = msgpack.unpackb(
            data,
            object_hook=containers.one_more,
            list_hook=containers.one_more,
            max_map_len=MAX_ENTRIES,
            max_array_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError("message", f"must be msgpack, got {len(data)} bytes that are not: {error}") from error
    if not isinstance(message, dict):
        raise CodecError("message", f"must be a dict, got {type(message).__name__}")
    flat: dict[str, Any] = {}
    _flatten(message, "", 1, flat)
    return flat


class _Count:
    """Stops a message of very many small lists and dicts while it is being unpacked."""

    def __init__(self) -> None:
        self._so_far = 0

    def one_more(self, container: Any) -> Any:
        self._so_far += 1
        if self._so_far > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and dicts")
        return container


def _flatten(message: dict, path: str, depth: int, flat: dict[str, Any]) -> None:
    for key, value in message.items():
        if not (isinstance(key, str) and len(key) <= MAX_KEY and key.isprintable()):
            expected = f"printable text of at most {MAX_KEY} characters"
            raise CodecError(path or "message", f"keys must be {expected}, got {key!r:.80}")
        where = f"{path}/{key}" if path else key
        if not isinstance(value, dict):
            _put(flat, where, value)
        elif b"__ndarray__" in value:
            _put(flat, where, _array(value, where))
        elif b"__npgeneric__" in value:
            _put(flat, where, _number(value, where))
        elif depth == MAX_DEPTH:
            raise CodecError(where, f"dicts may be nested {MAX_DEPTH} deep, got more")
        else:
            _flatten(value, where, depth + 1, flat)


def _put(flat: dict[str, Any], where: str, value: Any) -> None:
    if where in flat:
        raise CodecError(where, "must be given once, got it twice")
    flat[where] = value


def _array(said: dict, where: str) -> np.ndarray:
    dtype, shape, data = _dtype(said, where), said.get(b"shape"), said.get(b"data")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CodecError(where, f"shape must be a list of at most {MAX_AXES} extents, got {shape!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        got = len(data) if isinstance(data, bytes) else type(data).__name__
        raise CodecError(where, f"data must be {expected} bytes for {dtype.name}{tuple(shape)}, got {got}")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except (ValueError, OverflowError):  # without elements, but with extents beyond what numpy counts to
        raise CodecError(where, f"shape must be a possible one, got {shape!r:.80}") from None


def _number(said: dict, where: str) -> np.generic:
    dtype, value = _dtype(said, where), said.get(b"data")
    try:
        if isinstance(value, int | float):
            return dtype.type(value)
    except (ValueError, OverflowError):
        pass
    raise CodecError(where, f"must be a number that fits {dtype.name}, got {value!r:.80}")


def _dtype(said: dict, where: str) -> np.dtype:
    name = said.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise CodecError(where, f"dtype must be one of {sorted(DTYPES)}, got {name!r:.80}")
    return DTYPES[name]


def _packed(value: Any) -> dict[bytes, Any]:
    """What msgpack itself does not know."""
    if isinstance(value, np.ndarray) and value.dtype.str in DTYPES:
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.str in DTYPES:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a message holds text, numbers, lists, dicts and arrays of {sorted(DTYPES)}, got {value!r:.80}")
