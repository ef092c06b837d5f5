"""The Policy service's promises about decisions, over real sockets, with a fake model behind."""

from __future__ import annotations

import queue
import threading
import time

import grpc
import pytest

from policy_server.refusals import REFUSAL_KEY
from protos import episode_pb2, policy_pb2
from protos.codec import decode_tensor
from tests.server import messages
from tests.server.fake_model import ACTIONS, CHUNK, FakeModel
from tests.server.running import eventually, serving


@pytest.fixture(scope="module")
def server():
    with serving(FakeModel()) as running:
        yield running


@pytest.fixture
def episode(server) -> str:
    return server.policy.StartEpisode(messages.start()).episode_id


def refusal_of(error: grpc.RpcError) -> policy_pb2.Refusal:
    trailing = dict(error.trailing_metadata())  # type: ignore[attr-defined]
    return policy_pb2.Refusal.FromString(trailing[REFUSAL_KEY])


def test_get_spec_says_everything_a_client_needs(server):
    spec = server.policy.GetSpec(policy_pb2.GetSpecRequest())
    unset = [field.name for field in spec.DESCRIPTOR.fields if not getattr(spec, field.name)]
    assert unset == ["live_version", "stores_episodes"]  # the first version is 0; this server stores nothing
    assert list(spec.versions) == [0]


def test_an_episode_is_pinned_to_the_live_version_with_a_seed_of_its_own(server):
    first, second = (server.policy.StartEpisode(messages.start()) for _ in range(2))
    assert first.version == second.version == 0
    assert first.seed != second.seed and first.episode_id != second.episode_id


def test_a_given_seed_is_kept(server):
    assert server.policy.StartEpisode(messages.start(seed=0)).seed == 0
    assert server.policy.StartEpisode(messages.start(seed=2**64 - 1)).seed == 2**64 - 1


def test_a_repeated_start_opens_no_second_episode(server):
    request = messages.start(request_id="once")
    assert server.policy.StartEpisode(request) == server.policy.StartEpisode(request)


def test_an_unknown_version_is_refused_and_names_those_there_are(server):
    with pytest.raises(grpc.RpcError) as error:
        server.policy.StartEpisode(messages.start(version=7))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert "no version 7; there are [0]" in refusal_of(error.value).message


def test_an_answer_names_what_it_answers_and_where_the_time_went(server, episode):
    reply = server.policy.Act(messages.act(episode, 0, grey=9))
    assert (reply.episode_id, reply.decision, reply.capture_time_ns) == (episode, 0, 123)
    actions = decode_tensor(reply.chunk.actions, dtype="float32", shape=(CHUNK, ACTIONS))
    assert actions[0].tolist() == [9, 0]
    assert decode_tensor(reply.chunk.token_ids, dtype="int32").shape == (CHUNK * ACTIONS,)
    assert decode_tensor(reply.chunk.token_logprobs, dtype="float32").shape == (CHUNK * ACTIONS,)
    timing = reply.chunk.timing
    assert timing.batch_size == 1 and timing.prepare_ms > 0 and timing.queue_ms >= 0
    assert (timing.vision_ms, timing.prefill_ms, timing.decode_ms) == (1, 2, 3)


def test_a_retry_gets_the_stored_answer_and_the_model_is_not_asked_again(server, episode):
    first = server.policy.Act(messages.act(episode, 0, grey=9))
    asked = len(server.model.batches)
    assert server.policy.Act(messages.act(episode, 0, grey=200)) == first
    assert len(server.model.batches) == asked


def test_unary_and_stream_give_the_same_chunk(server):
    def chunk(call) -> episode_pb2.Chunk:
        episode_id = server.policy.StartEpisode(messages.start(seed=5)).episode_id
        chunk = call(messages.act(episode_id, 0)).chunk
        chunk.ClearField("timing")
        return chunk

    assert chunk(server.policy.Act) == chunk(lambda request: next(server.policy.ActStream(iter([request]))))


def test_a_refusal_never_ends_a_stream(server, episode):
    requests = [messages.act("nobody", 0), messages.act(episode, 0), messages.act(episode, 9), messages.act(episode, 1)]
    pending: queue.Queue = queue.Queue()
    replies = server.policy.ActStream(iter(pending.get, None))
    answers = []
    for request in requests:
        pending.put(request)
        answers.append(next(replies))
    pending.put(None)
    assert list(replies) == []
    assert [answer.WhichOneof("answer") for answer in answers] == ["refusal", "chunk", "refusal", "chunk"]
    assert [answers[i].refusal.field for i in (0, 2)] == ["episode_id", "decision"]


def test_a_newer_observation_supersedes_a_queued_one():
    with serving(FakeModel(), max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        other, episode_id = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(2))
        in_model = server.policy.Act.future(messages.act(other, 0))
        eventually(lambda: server.model.batches)
        older = server.policy.Act.future(messages.act(episode_id, 0, grey=1))
        eventually(lambda: server.server.waiting == 1)
        newer = server.policy.Act.future(messages.act(episode_id, 0, grey=2))
        with pytest.raises(grpc.RpcError) as error:
            older.result(5)
        assert error.value.code() == grpc.StatusCode.ABORTED
        assert "superseded" in refusal_of(error.value).message
        server.model.gate.set()
        assert decode_tensor(newer.result(5).chunk.actions)[0, 0] == 2
        in_model.result(5)


def test_a_retry_shares_the_decision_that_is_in_the_model():
    with serving(FakeModel()) as server:
        server.model.gate.clear()
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        first = server.policy.Act.future(messages.act(episode_id, 0, grey=1))
        eventually(lambda: server.model.batches)
        second = server.policy.Act.future(messages.act(episode_id, 0, grey=2))
        time.sleep(0.1)
        server.model.gate.set()
        assert first.result(5) == second.result(5)
        assert len(server.model.batches) == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_request_that_nobody_waits_for_never_reaches_the_model(how):
    with serving(FakeModel(), max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        blocker, gone, last = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(3))
        in_model = server.policy.Act.future(messages.act(blocker, 0, grey=1))
        eventually(lambda: server.model.batches)
        call = server.policy.Act.future(messages.act(gone, 0, grey=2), timeout=0.5 if how == "expired" else None)
        eventually(lambda: server.server.waiting == 1)
        if how == "cancelled":
            call.cancel()
        else:
            assert call.exception(5).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: server.server.waiting == 0)
        server.model.gate.set()
        in_model.result(5)
        server.policy.Act(messages.act(last, 0, grey=3))
        greys = [request.prepared[0] for batch in server.model.batches for request in batch]
        assert greys == [1, 3]
        assert server.policy.Act(messages.act(gone, 0, grey=4)).HasField("chunk")  # a later retry is served


def test_a_full_queue_refuses_at_once_and_says_when_to_retry():
    with serving(FakeModel(), max_batch=1, max_wait_ms=0, queue=2) as server:
        server.model.gate.clear()
        episodes = [server.policy.StartEpisode(messages.start()).episode_id for _ in range(4)]
        in_model = server.policy.Act.future(messages.act(episodes[0], 0))
        eventually(lambda: server.model.batches)
        queued = [server.policy.Act.future(messages.act(episode_id, 0)) for episode_id in episodes[1:3]]
        eventually(lambda: server.server.waiting == 2)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as error:
            server.policy.Act(messages.act(episodes[3], 0))
        assert time.monotonic() - began < 1
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal_of(error.value).retry_after_ms > 0
        server.model.gate.set()
        assert all(call.result(5).HasField("chunk") for call in [in_model, *queued])
        assert server.policy.Act(messages.act(episodes[3], 0)).HasField("chunk")


def test_concurrent_requests_share_one_pass():
    with serving(FakeModel(), max_batch=4, max_wait_ms=1000) as server:
        episodes = [server.policy.StartEpisode(messages.start()).episode_id for _ in range(4)]
        calls = [server.policy.Act.future(messages.act(e, 0, grey=i)) for i, e in enumerate(episodes)]
        replies = [call.result(5) for call in calls]
        assert [reply.chunk.timing.batch_size for reply in replies] == [4] * 4
        assert [decode_tensor(reply.chunk.actions)[0, 0] for reply in replies] == [0, 1, 2, 3]


def test_one_robot_alone_is_not_kept_waiting():
    with serving(FakeModel(), max_batch=4, max_wait_ms=1000) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        assert server.policy.Act(messages.act(episode_id, 0)).chunk.timing.queue_ms < 500


def test_a_bad_request_does_not_harm_its_neighbours():
    with serving(FakeModel(), max_batch=4, max_wait_ms=200) as server:
        good, bad = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(2))
        calls = [
            server.policy.Act.future(messages.act(good, 0)),
            server.policy.Act.future(policy_pb2.ActRequest(episode_id=bad)),
        ]
        assert calls[0].result(5).HasField("chunk")
        assert calls[1].exception(5).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_failure_refuses_its_batch_and_the_server_lives_on(caplog):
    with serving(FakeModel(), max_batch=4, max_wait_ms=200) as server:
        first, second = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(2))
        calls = [
            server.policy.Act.future(messages.act(first, 0, instruction="explode")),
            server.policy.Act.future(messages.act(second, 0)),
        ]
        for call in calls:
            error = call.exception(5)
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "the model failed" in error.details() and "exploded" not in error.details()
        assert server.policy.Act(messages.act(second, 0)).HasField("chunk")
    assert "the fake model exploded" in caplog.text


@pytest.mark.parametrize("call", ["Act", "ActStream"])
def test_a_fault_of_ours_costs_one_request_and_tells_no_secrets(server, episode, call, caplog):
    request = messages.act(episode, 0, instruction="stumble")
    if call == "Act":
        with pytest.raises(grpc.RpcError) as error:
            server.policy.Act(request)
        refusal = refusal_of(error.value)
    else:
        refusal = next(server.policy.ActStream(iter([request]))).refusal
    assert refusal.code == grpc.StatusCode.INTERNAL.value[0]
    assert "stumbled" not in refusal.message and "the fake model stumbled" in caplog.text
    assert server.policy.Act(messages.act(episode, 0)).HasField("chunk")


def test_sixteen_robots_streaming_at_once_all_get_their_own_answers():
    def drive(server, results: list, robot: int) -> None:
        with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            policy = type(server.policy)(channel)
            episode_id = policy.StartEpisode(messages.start()).episode_id
            replies = policy.ActStream(messages.act(episode_id, d, grey=robot) for d in range(20))
            # A stream that is written ahead of its answers supersedes itself: take what was answered.
            results.append(
                [
                    (r.episode_id == episode_id, decode_tensor(r.chunk.actions)[0].tolist())
                    for r in replies
                    if r.HasField("chunk")
                ]
            )

    with serving(FakeModel(pass_s=0.002), max_batch=8, queue=64) as server:
        results: list = []
        threads = [threading.Thread(target=drive, args=(server, results, robot)) for robot in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 16
        for answers in results:
            assert answers and all(own for own, _ in answers)
            assert len({action[0] for _, action in answers}) == 1
            assert [action[1] for _, action in answers] == sorted(action[1] for _, action in answers)
