"""From an observation to the model's inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.preprocessing import STATE_CLIP, BadInput, Preprocessor
from policy_server.vla.tokenizer import build_tokenizer
from protos import image

FRAME = np.zeros((128, 128, 3), np.uint8)


@pytest.fixture
def preprocessor(nano: Checkpoint) -> Preprocessor:
    return Preprocessor(nano.config, nano.tokenizer)


def test_a_frame_of_the_models_size_is_left_alone_on_the_plain_path(preprocessor: Preprocessor, rng):
    frame = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert np.array_equal(preprocessor.image(frame), frame)


def test_the_libero_path_stores_resizes_and_crops(nano: Checkpoint, rng):
    frame = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    libero = Preprocessor(replace(nano.config, image_path="libero"), nano.tokenizer)
    expected = image.centre_crop(image.resize(image.jpeg_round_trip(frame), (128, 128)))
    assert np.array_equal(libero.image(frame), expected)
    plain = Preprocessor(nano.config, nano.tokenizer).image(frame)
    assert not np.array_equal(libero.image(frame), plain)


def test_states_go_from_the_quantiles_to_one_and_are_clipped(nano: Checkpoint):
    low, high = np.arange(8.0), np.array([1.0, 3, 5, 7, 9, 11, 13, 7])
    statistics = {"nano": {**nano.config.norm_stats["nano"], "proprio": {"q01": low.tolist(), "q99": high.tolist()}}}
    preprocessor = Preprocessor(replace(nano.config, norm_stats=statistics), nano.tokenizer)
    assert preprocessor.state(low)[:7] == pytest.approx(-np.ones(7))
    assert preprocessor.state(high)[:7] == pytest.approx(np.ones(7))
    assert preprocessor.state(low + 100)[:7] == pytest.approx(np.full(7, STATE_CLIP))
    assert preprocessor.state(high)[7] == 0  # no extent, no information


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("image", (FRAME.astype(np.float32), "push", np.zeros(8))),
        ("image", (FRAME[..., 0], "push", np.zeros(8))),
        ("instruction", (FRAME, "  ", np.zeros(8))),
        ("instruction", (FRAME, "push the bowl " * 100, np.zeros(8))),
        ("state", (FRAME, "push", None)),
        ("state", (FRAME, "push", np.zeros(7))),
        ("state", (FRAME, "push", np.full(8, np.nan))),
    ],
)
def test_bad_input_is_blamed_on_its_field(preprocessor: Preprocessor, field, arguments):
    with pytest.raises(BadInput) as refusal:
        preprocessor.prepare(*arguments)
    assert refusal.value.field == field


def test_the_prompt_is_lower_case_and_ends_in_one_empty_token(reference: Checkpoint):
    preprocessor = Preprocessor(reference.config, reference.tokenizer, unnorm_key="libero_spatial")
    ids = preprocessor.prompt_ids("Turn ON the Stove")
    assert np.array_equal(ids, preprocessor.prompt_ids("turn on the stove"))
    empty = reference.tokenizer.empty_id
    assert (ids[-1], ids[-2] == empty) == (empty, False)
    assert np.array_equal(reference.tokenizer.encode_prompt("Out: "), reference.tokenizer.encode("Out: "))


def test_nanos_tokenizer_encodes_any_text():
    tokenizer = build_tokenizer(["pick up the milk"], size=512)
    for text in ("pick up the milk", "żółw 🤖 \n\t", "PUSH; drop --now", "日本語"):
        ids = tokenizer.encode_prompt(text)
        assert ids.max() < 512
        assert tokenizer.backend.decode(ids.tolist()).strip() == text.strip()
    assert len(tokenizer.encode("pick up the milk")) == 5


def test_nanos_tokenizer_does_not_depend_on_the_order_of_the_texts():
    texts = ["pick up the milk", "open the drawer", "push the plate"]
    one, other = build_tokenizer(texts, size=300), build_tokenizer(texts[::-1] + texts, size=300)
    assert one.backend.to_str() == other.backend.to_str()
