"""Bad input is refused with its field, what was got and what is expected; nothing of it reaches the model."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import numpy as np
import pytest

from policy_server.refusals import REFUSAL_KEY
from protos import episode_pb2, policy_pb2, tensor_pb2
from protos.codec import encode_tensor
from tests.server import messages
from tests.server.fake_model import SIDE_PX, FakeModel
from tests.server.running import serving


@pytest.fixture(scope="module")
def server():
    with serving(FakeModel()) as running:
        yield running


def refusal(call, request) -> tuple[grpc.StatusCode, policy_pb2.Refusal]:
    with pytest.raises(grpc.RpcError) as error:
        call(request)
    return error.value.code(), policy_pb2.Refusal.FromString(dict(error.value.trailing_metadata())[REFUSAL_KEY])


def image(observation: episode_pb2.Observation) -> tensor_pb2.Image:
    return observation.images["agentview"]


def rename_camera(observation: episode_pb2.Observation) -> None:
    observation.images["wrist"].CopyFrom(image(observation))
    del observation.images["agentview"]


def set_state(values) -> Callable[[episode_pb2.Observation], None]:
    return lambda observation: observation.state.CopyFrom(encode_tensor(np.array(values)))


FLOATS = np.float32
SPOILED: dict[str, tuple[Callable[[episode_pb2.Observation], object], str, str]] = {
    "missing camera": (rename_camera, "images[agentview]", "got ['wrist']"),
    "no encoding": (lambda o: setattr(image(o), "encoding", 0), "images[agentview]", "encoding must be"),
    "cut pixels": (lambda o: setattr(image(o), "data", b"12"), "images[agentview]", "got 2"),
    "no height": (lambda o: setattr(image(o), "height", 0), "images[agentview]", f"got 0x{SIDE_PX}"),
    "huge image": (lambda o: setattr(image(o), "data", bytes(2**20 + 1)), "images[agentview]", "at most 1048576 bytes"),
    "not a JPEG": (lambda o: setattr(image(o), "encoding", tensor_pb2.ENCODING_JPEG), "images[agentview]", ""),
    "not a PNG": (lambda o: setattr(image(o), "encoding", tensor_pb2.ENCODING_PNG), "images[agentview]", ""),
    "short state": (set_state(FLOATS([1, 2])), "state", "shape must be (3,), got (2,)"),
    "no state": (lambda o: o.ClearField("state"), "state", "dtype must be"),
    "double state": (set_state([1.0, 2.0, 3.0]), "state", "dtype must be float32, got float64"),
    "NaN state": (set_state(FLOATS([1, np.nan, 3])), "state", "finite, got [1.0, nan, 3.0]"),
    "infinite state": (set_state(FLOATS([1, np.inf, 3])), "state", "finite"),
    "empty instruction": (lambda o: setattr(o, "instruction", " "), "instruction", "got an empty instruction"),
    "long instruction": (lambda o: setattr(o, "instruction", "go " * 7), "instruction", "at most 6 tokens, got 7"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_bad_observation_is_refused_by_field(server, what):
    spoil, field, message = SPOILED[what]
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    request = messages.act(episode_id, 0)
    spoil(request.observation)
    asked = len(server.model.batches)
    code, refused = refusal(server.policy.Act, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT and refused.code == code.value[0]
    assert refused.field == f"observation.{field}"
    assert message in refused.message and refused.retry_after_ms == 0
    assert len(server.model.batches) == asked
    assert server.policy.Act(messages.act(episode_id, 0)).HasField("chunk")  # the episode goes on


BAD_TICKS = {
    "short action": ({"action": [1.0]}, "action"),
    "NaN action": ({"action": [1.0, float("nan")]}, "action"),
    "no source": ({"source": episode_pb2.SOURCE_UNSPECIFIED}, "source"),
    "short expert": ({"expert_action": [1.0]}, "expert_action"),
}


@pytest.mark.parametrize("what", BAD_TICKS)
@pytest.mark.parametrize("where", ["Act", "EndEpisode"])
def test_a_bad_tick_is_refused_by_field(server, what, where):
    values, field = BAD_TICKS[what]
    good = {"action": [0.0, 0.0], "source": episode_pb2.SOURCE_HOLD}
    ticks = [episode_pb2.Tick(**good), episode_pb2.Tick(**{**good, **values})]
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    requests = {"Act": messages.act(episode_id, 0, ticks=ticks), "EndEpisode": messages.end(episode_id, executed=ticks)}
    code, refused = refusal(getattr(server.policy, where), requests[where])
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.field == f"executed[1].{field}"


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"purpose": episode_pb2.PURPOSE_UNSPECIFIED}, "purpose"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"noise_correlation": -0.5}, "noise_correlation"),
        ({"noise_correlation": float("nan")}, "noise_correlation"),
        ({"version": 0, "follow_live": True}, "follow_live"),
    ],
)
def test_a_bad_start_is_refused_by_field(server, request_fields, field):
    code, refused = refusal(server.policy.StartEpisode, messages.start(**request_fields))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.field == field


def test_an_end_without_outcome_is_refused_and_the_episode_stays_open(server):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    code, refused = refusal(server.policy.EndEpisode, messages.end(episode_id, outcome=0))
    assert (code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "outcome")
    assert server.policy.Act(messages.act(episode_id, 0)).HasField("chunk")


def test_a_bad_final_observation_is_refused_unless_the_episode_ended_in_an_error(server):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    broken = episode_pb2.Observation()
    code, refused = refusal(server.policy.EndEpisode, messages.end(episode_id, final_observation=broken))
    assert (code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "final_observation.images[agentview]")
    ended = messages.end(episode_id, final_observation=broken, outcome=episode_pb2.OUTCOME_ERROR)
    server.policy.EndEpisode(ended)


@pytest.mark.parametrize("call", ["Act", "EndEpisode"])
def test_an_unknown_episode_is_refused(server, call):
    request = {"Act": messages.act("nobody", 0), "EndEpisode": messages.end("nobody")}[call]
    code, refused = refusal(getattr(server.policy, call), request)
    assert (code, refused.field) == (grpc.StatusCode.FAILED_PRECONDITION, "episode_id")
    assert "no episode 'nobody'" in refused.message


def test_a_closed_episode_takes_no_decision(server):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    server.policy.EndEpisode(messages.end(episode_id))
    code, refused = refusal(server.policy.Act, messages.act(episode_id, 0))
    assert (code, refused.field) == (grpc.StatusCode.FAILED_PRECONDITION, "episode_id")
    assert "is closed" in refused.message


@pytest.mark.parametrize("decision", [0, 3, 2**32 - 1])
def test_a_decision_out_of_order_is_refused(server, decision):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    for due in (0, 1):
        server.policy.Act(messages.act(episode_id, due))
    code, refused = refusal(server.policy.Act, messages.act(episode_id, decision))
    assert (code, refused.field) == (grpc.StatusCode.FAILED_PRECONDITION, "decision")
    assert refused.message == f"expected decision 2, got {decision}"
