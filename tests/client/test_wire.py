"""A request put together from its parts is the message that protobuf would have made."""

import numpy as np
import pytest

from protos import episode_pb2, policy_pb2
from protos.codec import decode_image
from robot_client.arm import Observation
from robot_client.wire import encode_observation, encode_request

RNG = np.random.default_rng(0)


def frame(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("image_format", ["raw", "jpeg", "png"])
@pytest.mark.parametrize(
    "images",
    [
        {},
        {"agentview": frame(1, 1)},
        {"agentview": frame(224, 224), "robot0_eye_in_hand": frame(7, 300)},
        {"ä" * 100: frame(40, 60)[::-1, ::2]},
    ],
    ids=["no camera", "one pixel", "two cameras", "a long name, a view upside down"],
)
def test_the_bytes_are_those_of_the_whole_message(image_format, images):
    observation = Observation(
        images=images, state_S=RNG.normal(size=8), instruction="put the bowl on the plate", capture_time_ns=2**40
    )
    executed = [episode_pb2.Tick(index=1, action=[0.5]), episode_pb2.Tick()]
    whole = policy_pb2.ActRequest(
        episode_id="an episode",
        decision=300,
        observation=encode_observation(observation, image_format),
        executed=executed,
    )
    parsed = policy_pb2.ActRequest.FromString(encode_request("an episode", 300, observation, executed, image_format))
    assert parsed == whole
    if image_format != "jpeg":
        for name, pixels in images.items():
            np.testing.assert_array_equal(decode_image(parsed.observation.images[name]), pixels)


def test_pixels_are_those_of_the_moment_it_was_made():
    pixels = frame(8, 8)
    was = pixels.copy()
    request = encode_request("e", 0, Observation(images={"c": pixels}, state_S=np.zeros(0), instruction="i"), (), "raw")
    pixels[:] = 0
    np.testing.assert_array_equal(decode_image(policy_pb2.ActRequest.FromString(request).observation.images["c"]), was)
