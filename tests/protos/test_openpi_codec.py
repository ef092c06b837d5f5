"""openpi's messages: what openpi-client packs is understood, and the other way round; the rest is refused by name."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from protos.codec import CodecError
from protos.openpi_codec import MAX_CONTAINERS, MAX_DEPTH, MAX_ENTRIES, gripper_opening, libero_gripper, pack, unpack
from tests.openpi_wire import packb, unpackb

ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    np.linspace(-1, 1, 8),
    np.float32([[1.5, -2.5]]),
    np.array([True, False]),
    np.int64(-5) + np.zeros((), np.int64),
    np.zeros((0, 7), np.float16),
    np.arange(12, dtype=np.int32).reshape(3, 4)[::-1, ::2],
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_an_array_arrives_as_it_was_whoever_packed_it(array):
    for theirs in (unpack(packb({"a": array}))["a"], unpackb(pack({"a": array}))["a"]):
        assert theirs.dtype == array.dtype and theirs.shape == array.shape
        np.testing.assert_array_equal(theirs, array)


def test_plain_values_and_numpys_numbers_arrive_as_they_were():
    message = {"text": "bowl", "whole": 3, "real": 0.25, "yes": True, "none": None, "list": [1, "two", {"three": 3}]}
    assert unpack(packb(message)) == unpackb(pack(message)) == message
    number = unpack(packb({"n": np.float32(0.1)}))["n"]
    assert number == np.float32(0.1) and number.dtype == np.float32
    assert unpackb(pack({"n": np.uint8(200)}))["n"] == 200


def test_nested_dicts_become_one_with_paths_as_keys():
    nested = {"observation": {"image": np.zeros(3), "joints": {"left": 1}}, "prompt": "bowl"}
    assert set(unpack(packb(nested))) == {"observation/image", "observation/joints/left", "prompt"}


def said(**changes) -> bytes:
    """An array's description, changed."""
    array = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [3]}
    return msgpack.packb({"state": array | {name.encode(): value for name, value in changes.items()}})


def deep(levels: int) -> dict:
    return {"a": deep(levels - 1)} if levels else {"a": 1}


BAD = {
    "an object array": (said(dtype="|O"), "state: dtype must be one of"),
    "a structured dtype": (said(dtype="f4,O"), "state: dtype must be one of"),
    "text": (said(dtype="<U3"), "state: dtype must be one of"),
    "a dtype that is no text": (said(dtype=[["a", "<f4"]]), "state: dtype must be one of"),
    "no dtype": (msgpack.packb({"state": {b"__ndarray__": True}}), "state: dtype must be one of"),
    "too few bytes": (said(data=bytes(11)), r"state: data must be 12 bytes for float32\(3,\), got 11"),
    "too many bytes": (said(data=bytes(16)), "state: data must be 12 bytes"),
    "data that is text": (said(data="abcdefghijkl"), "state: data must be 12 bytes .* got str"),
    "a shape beyond all bytes": (said(shape=[2**60, 2**60]), "state: data must be"),
    "an extent beyond all numbers": (said(shape=[0, 2**63], data=b""), "state: shape must be a possible one"),
    "extents beyond all numbers": (said(shape=[0, 2**62, 2**62], data=b""), "state: shape must be a possible one"),
    "a negative extent": (said(shape=[-3]), "state: shape must be"),
    "a shape that is no list": (said(shape=3), "state: shape must be"),
    "many axes": (said(shape=[1] * 9 + [3]), "state: shape must be"),
    "a number too large": (
        msgpack.packb({"n": {b"__npgeneric__": True, b"dtype": "|u1", b"data": 1000}}),
        "n: must be a number that fits uint8, got 1000",
    ),
    "a number that is none": (
        msgpack.packb({"n": {b"__npgeneric__": True, b"dtype": "<f4", b"data": "1"}}),
        "n: must be a number that fits float32, got '1'",
    ),
    "no dict": (msgpack.packb([1, 2]), "message: must be a dict, got list"),
    "a key that is no text": (msgpack.packb({b"state": 1}), "message: keys must be printable text .*, got b'state'"),
    "a key within that is no text": (msgpack.packb({"a": {b"b": 1}}), "a: keys must be printable text .*, got b'b'"),
    "a key of two lines": (msgpack.packb({"a": {"b\n": 1}}), r"a: keys must be printable text .*, got 'b\\n'"),
    "a long key": (
        msgpack.packb({"k" * 101: 1}),
        "message: keys must be printable text of at most 100 characters, got 'k{79}$",
    ),
    "one key flat and nested": (msgpack.packb({"a": {"b": 1}, "a/b": 2}), "a/b: must be given once"),
    "nothing": (b"", "message: must be msgpack"),
    "half of it": (said()[:-5], "message: must be msgpack"),
    "something after it": (said() + b"\x01", "message: must be msgpack"),
    "JSON": (b'{"prompt": "bowl"}', "message: must be msgpack"),
    "a type of its own": (msgpack.packb({"a": msgpack.ExtType(5, b"code")}), "message: must be msgpack"),
    "a time": (msgpack.packb({"a": msgpack.Timestamp(1, 0)}), "message: must be msgpack"),
    "text that is none": (msgpack.packb({"a": b"\xff\xfe"}, use_bin_type=False), "message: must be msgpack"),
    "a long list": (msgpack.packb({"a": [0] * (MAX_ENTRIES + 1)}), "message: must be msgpack"),
    "many lists": (msgpack.packb({"a": [[]] * (MAX_CONTAINERS + 1)}), "message: must be msgpack"),
    "dicts in dicts": (msgpack.packb(deep(MAX_DEPTH)), "dicts may be nested 8 deep"),
    "very many dicts in dicts": (b"\x81\xa1a" * 500 + b"\x01", "dicts may be nested 8 deep"),
    "too many dicts in dicts": (b"\x81\xa1a" * 50_000 + b"\x01", "message: must be msgpack"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_breaks_a_rule_is_refused_by_name(what):
    data, sentence = BAD[what]
    with pytest.raises(CodecError, match=sentence):
        unpack(data)


def test_whatever_happens_to_a_message_on_its_way_it_is_understood_or_refused():
    dice = np.random.default_rng(0)
    whole = packb({"observation": {"image": np.zeros((4, 4, 3), np.uint8), "state": np.zeros(8)}, "prompt": "bowl"})
    refused = 0
    for _ in range(3000):
        data = bytearray(whole)
        for place in dice.integers(0, len(data), dice.integers(1, 5)):
            data[place] = dice.integers(0, 256)
        try:
            unpack(bytes(data[: dice.integers(1, len(data) + 1)] if dice.random() < 0.2 else data))
        except CodecError:
            refused += 1
    assert 500 < refused < 3000


def test_nothing_is_packed_that_the_other_side_could_not_read():
    for value in (np.array([object()]), np.array(["text"]), np.array([1j]), {1, 2}):
        with pytest.raises(TypeError, match="a message holds"):
            pack({"a": value})


def test_liberos_gripper_is_the_opening_the_other_way_round():
    np.testing.assert_allclose(libero_gripper(np.array([1.0, 0.5, 0.0])), [-1, 0, 1])
    np.testing.assert_allclose(libero_gripper(np.array([1.5, -0.5])), [-1, 1])
    np.testing.assert_allclose(gripper_opening(np.array([-1.0, 0.0, 1.0])), [1, 0.5, 0])
    np.testing.assert_allclose(gripper_opening(np.array([-1.05, 1.02])), [1, 0])
