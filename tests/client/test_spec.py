"""The spec says enough to turn tokens into actions, and whether an arm fits."""

from __future__ import annotations

import numpy as np
import pytest

from protos import image
from protos.codec import decode_image
from robot_client.arm import ACTION_NAMES, STATE_NAMES, Observation
from robot_client.client import PolicyClient
from robot_client.errors import BadAnswer, SpecMismatch
from robot_client.spec import PolicySpec
from tests.client.conftest import rollout_of
from tests.client.fake_arm import LIMITS, Limits, spec_of
from tests.client.scripted_policy import spec_of as policy_spec


@pytest.fixture
def spec() -> PolicySpec:
    return PolicySpec.of(policy_spec())


def test_tokens_become_actions_by_the_published_formula(spec):
    # OpenVLA's table: id 999 of 1000 is the lowest bin, whose centre is -1 + 1/255; 256 edges have 255 centres.
    ids_N = np.array([999, 999 - 127, 999 - 254, 999 - 255, 999, 999, 999 - 127])
    actions_A = spec.tokens.actions(ids_N)[0]
    top = 1 - 1 / 255
    np.testing.assert_allclose(actions_A, [-top, 0, top, top, -top, -top, 0], atol=1e-12)


def test_only_masked_dimensions_are_unnormalised():
    message = policy_spec()
    message.action_tokens.low.data = np.array([10.0] * 7).tobytes()
    message.action_tokens.high.data = np.array([20.0] * 7).tobytes()
    middle = PolicySpec.of(message).tokens.actions(np.full(7, 999 - 127))[0]
    np.testing.assert_allclose(middle, [15.0] * 6 + [0.0], atol=1e-12)


def test_an_arm_with_more_images_and_state_than_needed_fits(spec):
    spec.require_fit(spec_of())


def test_an_unknown_tick_rate_fits_every_arm():
    PolicySpec.of(policy_spec(tick_rate_hz=0)).require_fit(spec_of(tick_rate_hz=7))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (spec_of(action_names=ACTION_NAMES[:6]), r"answers 7 .*'gripper'\], fake expects 6 .*'yaw'\]"),
        (spec_of(action_names=("y", "x", *ACTION_NAMES[2:])), r"\['x', 'y', .* expects 7 \['y', 'x'"),
        (spec_of(image_names=("front",)), r"images: the policy reads \['agentview'\], fake offers \['front'\]"),
        (spec_of(state_names=STATE_NAMES[1:]), r"state: the policy reads \['eef_x'\], fake offers \['eef_y'"),
        (spec_of(tick_rate_hz=10), "trained at 20 Hz, fake ticks at 10 Hz"),
        (spec_of(limits=Limits(low=LIMITS.low[:6], high=LIMITS.high[:6])), "bounds 6 numbers of 7"),
    ],
)
def test_a_difference_is_refused_with_what_was_got_and_what_is_expected(spec, arm, message):
    with pytest.raises(SpecMismatch, match=message):
        spec.require_fit(arm)


def test_all_differences_are_named_at_once(spec):
    with pytest.raises(SpecMismatch) as refusal:
        spec.require_fit(spec_of(image_names=(), state_names=(), tick_rate_hz=1, action_names=()))
    assert [line.split(":")[0] for line in refusal.value.mismatches] == [
        "actions",
        "images",
        "state",
        "tick rate",
        "limits",
    ]


@pytest.mark.parametrize("field", ["chunk_length", "action_tokens", "action"])
def test_a_spec_that_contradicts_itself_is_the_servers_fault(field):
    message = policy_spec()
    message.ClearField(field)
    with pytest.raises(BadAnswer):
        PolicySpec.of(message)


def test_frames_are_brought_to_the_policys_size_with_its_filter_before_they_travel(server, policy):
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    seen = Observation(images={"agentview": noise_HW3}, state_S=np.zeros(8, np.float32), instruction="t")
    with PolicyClient(server.address, resize=True) as client:
        spec = client.spec()
        episode_id = client.start_episode(rollout_of(), spec_of()).episode_id
        client.act(episode_id, 0, spec.read_of(seen, spec_of()))
    sent = policy.only_episode.requests[0].observation.images["agentview"]
    np.testing.assert_array_equal(decode_image(sent), image.resize(noise_HW3, (16, 16), "lanczos3"))


def test_a_filter_that_nobody_here_has_is_refused_where_it_would_be_needed():
    message = policy_spec()
    message.images[0].resize = "sinc"
    PolicySpec.of(message)
    with pytest.raises(BadAnswer, match=r"resize must be one of \['lanczos3', 'bicubic'\], got \['sinc'\]"):
        PolicySpec.of(message, resize=True)
