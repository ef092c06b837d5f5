"""PolicyClient: every failure is typed, every call has a deadline, retries open nothing twice."""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np
import pytest

from protos import policy_pb2
from robot_client import errors
from robot_client.arm import Observation
from robot_client.client import PolicyClient
from tests.client.conftest import rollout_of
from tests.client.fake_arm import spec_of
from tests.client.scripted_policy import Delay, LoseReply, Refuse, Tamper, small_move

LOOK = Observation(
    images={"agentview": np.zeros((16, 16, 3), np.uint8)},
    state_S=np.zeros(3, np.float32),
    instruction="pick up the bowl",
    capture_time_ns=12345,
)


@pytest.fixture
def opened(client) -> str:
    return client.start_episode(rollout_of(), spec_of()).episode_id


def test_an_answer_names_its_episode_decision_capture_time_and_version(client, opened):
    answer = client.act(opened, 0, LOOK)
    assert (answer.decision, answer.capture_time_ns, answer.version) == (0, 12345, 1)
    assert answer.actions_KA.shape == (4, 7) and answer.token_ids_N.shape == (28,)
    np.testing.assert_allclose(answer.actions_KA, [small_move(0)] * 4, atol=1 / 255)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.BadRequest),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.BadRequest),
        (grpc.StatusCode.NOT_FOUND, errors.BadRequest),
        (grpc.StatusCode.UNAUTHENTICATED, errors.NotAdmitted),
        (grpc.StatusCode.PERMISSION_DENIED, errors.NotAdmitted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.ABORTED, errors.Superseded),
        (grpc.StatusCode.UNAVAILABLE, errors.ServerLost),
        (grpc.StatusCode.INTERNAL, errors.ServerFault),
    ],
)
def test_a_refusal_is_a_typed_error_with_field_message_and_hint(client, policy, opened, code, error):
    policy.script[0] = [Refuse(code, "got 1, expected 2", "observation.state", retry_after_ms=250)]
    with pytest.raises(error, match=r"observation\.state: got 1, expected 2") as refusal:
        client.act(opened, 0, LOOK)
    assert (refusal.value.field, refusal.value.retry_after_s) == ("observation.state", 0.25)


def test_a_refusal_leaves_the_way_open_for_the_next_request(client, policy, opened):
    policy.script[0] = [Refuse(grpc.StatusCode.INVALID_ARGUMENT)]
    with pytest.raises(errors.BadRequest):
        client.act(opened, 0, LOOK)
    assert client.act(opened, 0, LOOK).decision == 0


def test_a_retry_after_a_lost_reply_gets_the_stored_answer(client, policy, opened):
    policy.script[0] = [LoseReply()]
    with pytest.raises(errors.ServerLost):
        client.act(opened, 0, LOOK)
    policy.action_of = lambda decision: np.full(7, 0.5)
    answer = client.act(opened, 0, LOOK)
    np.testing.assert_allclose(answer.actions_KA[0], small_move(0), atol=1 / 255)


def test_answers_that_come_out_of_order_find_their_requests(client, policy):
    ids = [client.start_episode(rollout_of(), spec_of()).episode_id for _ in range(3)]
    policy.script[0] = [Delay(1.2), Delay(0.6), Delay(0.0)]
    pending = []
    for episode_id in ids:
        pending.append(client.ask(episode_id, 0, LOOK))
        time.sleep(0.02)  # so that the script's delays fall in this order
    done: list[int] = []
    for n, future in enumerate(pending):
        future.add_done_callback(lambda _, n=n: done.append(n))
    [future.result(5) for future in pending]
    assert done == [2, 1, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_in_time_is_an_error_within_the_deadline(server, policy, stream):
    with PolicyClient(server.address, deadline_s=0.3, stream=stream) as client:
        opened = client.start_episode(rollout_of(), spec_of()).episode_id
        policy.script[0] = [Delay(1.0)]
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            client.act(opened, 0, LOOK)
        assert time.monotonic() - began < 0.8


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_later_than_its_deadline_does_not_disturb_the_next(server, policy, stream):
    with PolicyClient(server.address, deadline_s=0.3, stream=stream) as client:
        opened = client.start_episode(rollout_of(), spec_of()).episode_id
        policy.script[0] = [Delay(0.5)]
        with pytest.raises(errors.DeadlineExceeded):
            client.act(opened, 0, LOOK)
        time.sleep(0.4)
        assert client.act(opened, 1, LOOK).decision == 1


def test_what_waits_on_a_client_that_is_closed_fails(client, policy, opened):
    policy.script[0] = [Delay(1.0)]
    pending = client.ask(opened, 0, LOOK)
    threading.Timer(0.1, client.close).start()
    assert isinstance(pending.exception(3), errors.ServerLost)


def change(**fields):
    """A reply whose chunk has other bytes in the named fields."""

    def tamper(reply: policy_pb2.ActReply) -> None:
        for name, array in fields.items():
            getattr(reply.chunk, name).data = array.tobytes()
            getattr(reply.chunk, name).shape[:] = array.shape

    return Tamper(tamper)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change(actions=np.zeros((4, 6), "<f4")), r"chunk\.actions: shape must be \(4, 7\), got \(4, 6\)"),
        (change(actions=np.full((4, 7), np.nan, "<f4")), "28 of 28 actions are not what their tokens stand for"),
        (change(actions=np.zeros((4, 7), "<f4")), "4 of 28 .* the first is 0 gripper: got 0, its token gives 0.99"),
        (change(token_ids=np.zeros(28, "<i4")), r"chunk\.token_ids: ids must be in \[744, 999\], got \[0, 0\]"),
        (change(token_logprobs=np.zeros(7, "<f4")), r"chunk\.token_logprobs: shape must be \(28,\), got \(7,\)"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused_by_name(client, policy, opened, tamper, message):
    policy.script[0] = [tamper]
    with pytest.raises(errors.BadAnswer, match=message):
        client.act(opened, 0, LOOK)


def test_an_answer_to_another_decision_is_refused(server, policy):
    policy.script[0] = [Tamper(lambda reply: setattr(reply, "decision", 7))]
    with PolicyClient(server.address) as client:
        opened = client.start_episode(rollout_of(), spec_of()).episode_id
        with pytest.raises(errors.BadAnswer, match=r"must be \('episode-0', 0\), got \('episode-0', 7\)"):
            client.act(opened, 0, LOOK)


def test_a_start_whose_reply_was_lost_opens_one_episode(client, policy):
    policy.start_script = [Refuse(grpc.StatusCode.UNAVAILABLE), Refuse(grpc.StatusCode.UNAVAILABLE)]
    assert client.start_episode(rollout_of(), spec_of()).episode_id == "episode-0"
    assert len(policy.episodes) == 1


def test_a_start_carries_what_the_rollout_asks_for(client, policy):
    sampling = {"temperature": 0.5, "noise_correlation": 0.25, "seed": 9, "version": 1}
    rollout = rollout_of(name="libero_object/3", purpose="evaluate", **sampling)
    opened = client.start_episode(rollout, spec_of())
    start = policy.only_episode.start
    assert opened.seed == 9 and start.noise_correlation == 0.25
    assert (start.task, start.temperature, start.version, start.arm) == ("libero_object/3", 0.5, 1, "fake")
    assert not policy_pb2.StartEpisodeRequest().HasField("seed") and start.HasField("seed")


def test_a_server_that_is_not_there_is_reported_after_the_patience(server):
    server.stop()
    began = time.monotonic()
    with (
        PolicyClient(server.address, deadline_s=1, give_up_after_s=0.5) as client,
        pytest.raises(errors.ServerLost, match=server.address),
    ):
        client.spec()
    assert time.monotonic() - began < 2


def test_a_server_that_comes_back_within_the_patience_is_found(server):
    server.stop()
    threading.Timer(0.5, server.start).start()
    with PolicyClient(server.address, deadline_s=1, give_up_after_s=5) as client:
        assert client.spec().chunk_length == 4


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
def test_frames_travel_in_the_chosen_format(server, policy, image_format):
    with PolicyClient(server.address, image_format=image_format) as client:
        client.act(client.start_episode(rollout_of(), spec_of()).episode_id, 0, LOOK)
    image = policy.only_episode.requests[0].observation.images["agentview"]
    assert image.encoding == {"raw": 1, "jpeg": 2, "png": 3}[image_format]
