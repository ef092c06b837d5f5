"""What a robot saw, as it travels.

protobuf copies pixels three times: into a message, out of it, and into the bytes that leave.  A decision's request is
therefore put together here: the message leaves without its frames, and each of them follows as one more part of it,
since what comes twice on the wire is merged (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from protos import episode_pb2, policy_pb2, tensor_pb2
from protos.codec import ImageFormat, encode_image, encode_pixels, encode_tensor
from robot_client.arm import Observation

KEY, VALUE = 1, 2
"""Field numbers of a map's entry."""
LENGTH_DELIMITED = 2
"""The wire type of bytes, strings and messages."""


def encode_observation(observation: Observation, image_format: ImageFormat) -> episode_pb2.Observation:
    """The message that the observation travels as."""
    message = _beside_frames(observation)
    for name, pixels in observation.images.items():
        message.images[name].CopyFrom(encode_image(pixels, image_format))
    return message


def encode_request(
    episode_id: str,
    decision: int,
    observation: Observation,
    executed: Sequence[episode_pb2.Tick],
    image_format: ImageFormat,
) -> bytes:
    """An ActRequest with encode_observation()'s message in it, as bytes; every frame is copied once."""
    request = policy_pb2.ActRequest(
        episode_id=episode_id, decision=decision, observation=_beside_frames(observation), executed=executed
    )
    parts: list[bytes | memoryview] = [request.SerializeToString()]
    for name, pixels in observation.images.items():
        image, data = encode_pixels(pixels, image_format)
        frame = [image.SerializeToString(), *_field(tensor_pb2.Image.DATA_FIELD_NUMBER, [data])]
        entry = [*_field(KEY, [name.encode()]), *_field(VALUE, frame)]
        seen = _field(episode_pb2.Observation.IMAGES_FIELD_NUMBER, entry)
        parts += _field(policy_pb2.ActRequest.OBSERVATION_FIELD_NUMBER, seen)
    return b"".join(parts)


def deciding(channel: grpc.Channel) -> tuple[grpc.UnaryUnaryMultiCallable, grpc.StreamStreamMultiCallable]:
    """Act and ActStream, of which requests are encode_request()'s bytes."""
    parse = policy_pb2.ActReply.FromString
    return (
        channel.unary_unary("/vla_rl.Policy/Act", response_deserializer=parse),
        channel.stream_stream("/vla_rl.Policy/ActStream", response_deserializer=parse),
    )


def _beside_frames(observation: Observation) -> episode_pb2.Observation:
    message = episode_pb2.Observation(instruction=observation.instruction, capture_time_ns=observation.capture_time_ns)
    if observation.state_S.size:
        message.state.CopyFrom(encode_tensor(observation.state_S.astype("float32")))
    return message


def _field(number: int, content: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The content as one field of the message around it."""
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(sum(map(len, content))), *content]


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
