"""What no client can do to the server or to the others: ask for too much, send half, read nothing, vanish."""

from __future__ import annotations

import gc
import itertools
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from policy_server import server as server_module
from policy_server import service
from policy_server.batcher import Ticket
from policy_server.observation import MAX_CAMERAS, MAX_NAME, MAX_TICKS, max_request_bytes
from policy_server.refusals import REFUSAL_KEY
from policy_server.version_store import VersionStore
from protos import admin_pb2, episode_pb2, policy_pb2, policy_pb2_grpc, rollout_pb2
from protos.codec import decode_tensor
from tests.client.black_hole import BlackHole
from tests.server import messages, publishing
from tests.server.fake_admin import FakeWeights, administered
from tests.server.fake_model import FakeModel
from tests.server.publishing import publication
from tests.server.rude_client import RudeClient
from tests.server.running import RunningServer, eventually, serving

ACT, STREAM, SPEC = "/vla_rl.Policy/Act", "/vla_rl.Policy/ActStream", "/vla_rl.Policy/GetSpec"
EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def calm() -> Iterator[RunningServer]:
    """A server of which nothing special is asked."""
    with serving(FakeModel()) as running:
        yield running


def open_episode(running: RunningServer) -> str:
    return running.policy.StartEpisode(messages.start()).episode_id


def kept(folder: Path) -> VersionStore:
    return VersionStore(folder, first=FakeWeights().fingerprint(FakeWeights.first))


def refusal(call, *args) -> policy_pb2.Refusal:
    """What a call is refused with, whose status says the same."""
    with pytest.raises(grpc.RpcError) as error:
        reply = call(*args, timeout=20)
        list(reply) if hasattr(reply, "cancel") else None
    refused = policy_pb2.Refusal.FromString(dict(error.value.trailing_metadata())[REFUSAL_KEY])
    assert refused.code == error.value.code().value[0]
    return refused


def raw(running: RunningServer, method: str, data: bytes):
    """The same method, with a request of these bytes."""
    return running.channel.unary_unary(method)(data, timeout=20)


def test_a_client_may_have_so_many_calls_under_way_and_another_is_not_kept_out():
    with serving(FakeModel(), client_calls=3) as running:
        running.model.gate.clear()
        episodes = [open_episode(running) for _ in range(4)]
        calls = [running.policy.Act.future(messages.act(episode_id, 0)) for episode_id in episodes[:2]]
        silent = running.policy.ActStream(iter(queue.Queue().get, None))
        eventually(lambda: sum(running.server._calls._open.values()) == 3)
        refused = refusal(running.policy.Act, messages.act(episodes[3], 0))
        assert refused.code == EXHAUSTED.value[0] and "3 calls under way" in refused.message
        assert refused.retry_after_ms > 0
        with RudeClient(running.address, source="127.0.0.2") as other:
            call = other.call(SPEC)
            other.send(call, b"", end=True)
            assert other.status(call) == 0
        running.model.gate.set()
        silent.cancel()
        assert all(call.result(5).HasField("chunk") for call in calls)
        eventually(lambda: not running.server._calls._open)
        assert running.policy.Act(messages.act(episodes[3], 0)).HasField("chunk")


def test_a_client_may_have_so_many_episodes_open_and_an_end_makes_room():
    with serving(FakeModel(), client_episodes=2) as running:
        first = running.policy.StartEpisode(messages.start(request_id="once"))
        open_episode(running)
        refused = refusal(running.policy.StartEpisode, messages.start())
        assert refused.code == EXHAUSTED.value[0] and "2 episodes open" in refused.message
        assert refused.retry_after_ms > 0
        assert running.policy.StartEpisode(messages.start(request_id="once")) == first  # a retry opens none
        running.policy.EndEpisode(messages.end(first.episode_id))
        open_episode(running)


def test_an_episode_whose_weights_cannot_be_had_is_closed_again(admin_server, admin, base, tmp_path):
    for by in (0.1, 0.2, 0.3, 0.4):
        publishing.publish(admin, base, by)
    assert not admin_server.server._versions.holds(1)
    shutil.rmtree(tmp_path / "versions" / "00000001")
    refused = refusal(admin_server.policy.StartEpisode, messages.start(version=1, request_id="once"))
    assert refused.code == grpc.StatusCode.INTERNAL.value[0]
    status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=20)
    assert (status.open_episodes, status.errors) == (0, 1)
    assert refusal(admin_server.policy.StartEpisode, messages.start(version=1, request_id="once")).code == refused.code


def test_an_episode_whose_weights_the_server_fails_to_build_is_closed_again(monkeypatch, caplog):
    with serving(FakeModel()) as running:
        monkeypatch.setattr(running.server._versions, "holds", lambda version: False)
        monkeypatch.setattr(running.server._versions, "weights", lambda version: 1 / 0)
        assert refusal(running.policy.StartEpisode, messages.start()).code == grpc.StatusCode.INTERNAL.value[0]
        assert not running.server._episodes.open and "ZeroDivisionError" in caplog.text


class SlowToPrepare(FakeModel):
    """Holds prepare() until it is free."""

    def __init__(self):
        super().__init__()
        self.prepared = 0
        self.free = threading.Event()

    def prepare(self, observed):
        self.prepared += 1
        assert self.free.wait(30)
        return super().prepare(observed)


@pytest.fixture
def slow_to_prepare() -> Iterator[RunningServer]:
    """Whatever is held too long here is seen: nobody collects it."""
    with serving(SlowToPrepare(), queue=64) as running:
        gc.collect()
        gc.disable()
        try:
            yield running
        finally:
            gc.enable()
            running.model.free.set()


def held() -> int:
    """How many tickets are held by anything, and their requests by those that hold them."""
    return sum(type(each) is Ticket for each in gc.get_objects())


def test_requests_that_nobody_waits_for_are_neither_prepared_nor_held(slow_to_prepare):
    running = slow_to_prepare
    for episode_id in [open_episode(running) for _ in range(50)]:
        call = running.policy.Act.future(messages.act(episode_id, 0))
        eventually(lambda: running.server.waiting == 1)
        call.cancel()
        eventually(lambda: running.server.waiting == 0)
    last = running.policy.Act.future(messages.act(open_episode(running), 0))
    eventually(lambda: running.server.waiting == 1)
    eventually(lambda: held() == 1)
    running.model.free.set()
    assert last.result(20).HasField("chunk") and running.model.prepared <= 3


def test_observations_of_a_stream_that_newer_ones_supersede_are_neither_prepared_nor_held(slow_to_prepare):
    running, pending = slow_to_prepare, queue.Queue()
    episode_id = open_episode(running)
    replies = running.policy.ActStream(iter(pending.get, None), timeout=60)
    for grey in range(50):
        pending.put(messages.act(episode_id, 0, grey=grey))
    for _ in range(49):
        assert next(replies).refusal.code == grpc.StatusCode.ABORTED.value[0]
    eventually(lambda: held() == 1)
    running.model.free.set()
    assert decode_tensor(next(replies).chunk.actions)[0, 0] == 49 and running.model.prepared <= 3
    pending.put(None)


def test_a_request_takes_at_most_what_get_spec_states(calm):
    spec = calm.policy.GetSpec(policy_pb2.GetSpecRequest())
    assert spec.max_request_bytes == max_request_bytes(spec) < 4 * spec.max_image_bytes
    request = messages.act(open_episode(calm), 0)
    request.observation.images["spare"].data = bytes(spec.max_request_bytes - request.ByteSize() - 100)
    assert request.ByteSize() < spec.max_request_bytes
    assert calm.policy.Act(request, timeout=20).HasField("chunk")
    request.decision = 1
    request.observation.images["spare"].data += bytes(200)
    with pytest.raises(grpc.RpcError, match="larger than max") as error:
        calm.policy.Act(request, timeout=20)
    assert error.value.code() == EXHAUSTED


def test_a_compressed_request_is_refused_before_it_takes_the_room_it_would_inflate_to(calm):
    request = messages.act(open_episode(calm), 0, instruction="x" * 10**5)
    with pytest.raises(grpc.RpcError, match="'gzip' is disabled") as error:
        calm.policy.Act(request, timeout=20, compression=grpc.Compression.Gzip)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_weights_come_in_larger_parts_than_any_observation():
    model = FakeWeights()
    model.max_weights_bytes = 2**24
    data = bytes(2 * max_request_bytes(model.spec))
    with administered(model) as (_, stub):
        assert stub.PublishWeights(publication("f" * 64, data, part=len(data)), timeout=60).version == 1


def test_executed_ticks_are_bounded_as_get_spec_states(calm):
    assert calm.policy.GetSpec(policy_pb2.GetSpecRequest()).max_request_ticks == MAX_TICKS
    episode_id = open_episode(calm)
    ticks = [messages.tick(0, index) for index in range(MAX_TICKS + 1)]
    for call, request in (
        (calm.policy.Act, messages.act(episode_id, 0, ticks=ticks)),
        (calm.policy.EndEpisode, messages.end(episode_id, executed=ticks)),
    ):
        refused = refusal(call, request)
        assert (refused.code, refused.field) == (INVALID.value[0], "executed")
        assert f"at most {MAX_TICKS} ticks, got {MAX_TICKS + 1}" in refused.message
    assert calm.policy.EndEpisode(messages.end(episode_id, executed=ticks[1:]), timeout=20) is not None


LONG = "n" * (MAX_NAME + 1)
TOO_LONG = {
    **{
        f"StartEpisode {name}": messages.start(**{name: LONG})
        for name in ("task", "initial_state", "arm", "asset_tree")
    },
    "StartEpisode request_id": messages.start(request_id=LONG),
    "LeaseRollout worker": rollout_pb2.LeaseRolloutRequest(worker=LONG, can_run=["fake/0"]),
    "LeaseRollout can_run": rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/0"] * 1001),
    "LeaseRollout holds": rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/0"], holds=["x"] * 1001),
    "LeaseRollout can_run[1]": rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/0", LONG]),
    "LeaseRollout holds[1]": rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/0"], holds=["x", LONG]),
    "CommitCursor reader": rollout_pb2.CommitCursorRequest(reader=LONG),
    "EnqueueRollouts rollouts[0].rollout_id": rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout(LONG)]),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_what_the_server_would_remember_is_bounded_by_field(tmp_path, what):
    call, _, field = what.partition(" ")
    with serving(FakeModel(), episodes=tmp_path) as running:
        stub = running.policy if hasattr(running.policy, call) else running.rollouts
        refused = refusal(getattr(stub, call), TOO_LONG[what])
    assert (refused.code, refused.field) == (INVALID.value[0], field)


def many_cameras(request: policy_pb2.ActRequest) -> None:
    for camera in range(MAX_CAMERAS):
        request.observation.images[f"camera {camera}"].CopyFrom(request.observation.images["agentview"])


SPOILED = {
    "observation.images": many_cameras,
    "observation.instruction": lambda request: setattr(request.observation, "instruction", "x" * 10**6),
    "observation.state": lambda request: request.observation.state.shape.extend([2**32 - 1] * 10**5),
}


@pytest.mark.parametrize("outcome", [episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_ERROR])
def test_an_end_records_no_more_cameras_than_a_decision_however_it_ended(calm, outcome):
    ended = messages.end(open_episode(calm), outcome=outcome)
    for camera in range(MAX_CAMERAS + 1):
        ended.final_observation.images[f"camera {camera}"].data = b"x"
    refused = refusal(calm.policy.EndEpisode, ended)
    assert (refused.code, refused.field) == (INVALID.value[0], "final_observation.images")


@pytest.mark.parametrize("field", SPOILED)
def test_what_would_cost_the_others_time_is_refused_at_once(calm, field):
    request = messages.act(open_episode(calm), 0)
    SPOILED[field](request)
    began_s = time.monotonic()
    refused = refusal(calm.policy.Act, request)
    assert time.monotonic() - began_s < 2
    assert (refused.code, refused.field) == (INVALID.value[0], field)


def test_a_refusal_is_short_whatever_it_repeats(calm):
    for word in ("x" * 10**6, "\U0001f916" * 10**5, "\n" * 10**5):
        refused = refusal(calm.policy.Act, policy_pb2.ActRequest(episode_id=word))
        assert refused.code == grpc.StatusCode.FAILED_PRECONDITION.value[0] and refused.field == "episode_id"
        assert len(refused.message.encode()) < 1100 and refused.message.startswith("there is no episode")


def test_no_more_than_so_much_work_may_be_outstanding(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.rollout_service.MAX_OUTSTANDING", 3)
    with serving(FakeModel(), episodes=tmp_path) as running:
        two = [messages.rollout("r/0"), messages.rollout("r/1")]
        running.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=two))
        more = [messages.rollout("r/2"), messages.rollout("r/3")]
        refused = refusal(running.rollouts.EnqueueRollouts, rollout_pb2.EnqueueRolloutsRequest(rollouts=more))
        assert refused.code == EXHAUSTED.value[0] and refused.retry_after_ms > 0
        assert running.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).waiting == 2
        bad = rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout("")] * 4)
        assert refusal(running.rollouts.EnqueueRollouts, bad).code == EXHAUSTED.value[0]  # not looked through


def test_streams_of_episodes_are_few_and_one_that_ends_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.rollout_service.MAX_READERS", 1)
    with serving(FakeModel(), episodes=tmp_path) as running:
        follow = rollout_pb2.StreamEpisodesRequest(follow=True)
        parts = running.rollouts.StreamEpisodes(follow)
        assert next(parts).sequence == 0
        assert refusal(running.rollouts.StreamEpisodes, follow).code == EXHAUSTED.value[0]
        parts.cancel()
        once = rollout_pb2.StreamEpisodesRequest()
        eventually(lambda: [part.sequence for part in _or_nothing(running.rollouts.StreamEpisodes, once)] == [0])


def test_a_reader_that_reads_nothing_loses_its_stream_and_the_next_has_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.rollout_service.MAX_READERS", 1)
    monkeypatch.setattr("policy_server.rollout_service.READ_S", 1.0)
    with serving(FakeModel(), episodes=tmp_path) as running, RudeClient(running.address, window=0) as rude:
        call, follow = rude.call("/vla_rl.Rollouts/StreamEpisodes"), rollout_pb2.StreamEpisodesRequest(follow=True)
        rude.send(call, follow.SerializeToString(), end=True)
        eventually(lambda: running.server._rollouts._readers)
        once = rollout_pb2.StreamEpisodesRequest()
        eventually(lambda: [part.sequence for part in _or_nothing(running.rollouts.StreamEpisodes, once)] == [0])
        assert running.server._calls._open, "what it has not read is still its own"
        rude.read_on(call)
        assert rude.status(call) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def _or_nothing(call, request) -> list:
    try:
        return list(call(request))
    except grpc.RpcError:
        return []


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", bytes(range(256))])
def test_bytes_that_are_no_message_are_refused_and_leave_no_traceback(calm, data, caplog):
    assert refusal(lambda *_, timeout: raw(calm, ACT, data)).code == INVALID.value[0]
    stream = calm.channel.stream_stream(STREAM)
    assert refusal(lambda *_, timeout: stream(iter([data]), timeout=timeout)).code == INVALID.value[0]
    assert "Traceback" not in caplog.text and calm.policy.Act(messages.act(open_episode(calm), 0)).HasField("chunk")


def test_a_call_without_a_request_is_refused(calm):
    with RudeClient(calm.address) as rude:
        call = rude.call(ACT)
        rude.end(call)
        assert rude.status(call) == INVALID.value[0]


def test_a_choice_that_there_is_not_is_refused_by_field(calm):
    episode_id = open_episode(calm)
    tick = episode_pb2.Tick(action=[0, 0], source=99)
    for call, request, field in (
        (calm.policy.StartEpisode, messages.start(purpose=99), "purpose"),
        (calm.policy.EndEpisode, messages.end(episode_id, outcome=99), "outcome"),
        (calm.policy.Act, messages.act(episode_id, 0, ticks=[tick]), "executed[0].source"),
    ):
        refused = refusal(call, request)
        assert (refused.code, refused.field) == (INVALID.value[0], field) and "got code 99" in refused.message


@pytest.mark.parametrize("temperature", [1e-40, 1e-7, 1e30, float("inf")])
def test_a_temperature_at_which_there_are_no_probabilities_is_refused(calm, temperature):
    assert refusal(calm.policy.StartEpisode, messages.start(temperature=temperature)).field == "temperature"


@pytest.mark.parametrize("rate_hz", [float("nan"), -1.0])
def test_a_tick_rate_that_is_none_is_refused(calm, rate_hz):
    assert refusal(calm.policy.StartEpisode, messages.start(tick_rate_hz=rate_hz)).field == "tick_rate_hz"


def test_half_a_request_holds_no_place_in_the_queue_and_is_ended_in_time():
    with serving(FakeModel(), max_batch=1, queue=1) as running, RudeClient(running.address) as rude:
        running.server._calls._arrive_s = 0.5
        request = messages.act(open_episode(running), 0).SerializeToString()
        halves = [rude.call(ACT) for _ in range(5)]
        for call in halves:
            rude.send(call, request, part=0.5)
        assert running.server.waiting == 0
        assert running.policy.Act(messages.act(open_episode(running), 0)).HasField("chunk")
        assert {rude.status(call) for call in halves} == {grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}
        eventually(lambda: not running.server._calls._open)


def test_a_stream_that_is_silent_for_long_is_closed_and_the_next_one_is_taken():
    with serving(FakeModel(), episode_idle_s=0.4) as running:
        for opened_once_more in range(2):
            pending: queue.Queue = queue.Queue()
            assert list(running.policy.ActStream(iter(pending.get, None), timeout=20)) == [], opened_once_more
            pending.put(None)
        assert not running.server._service._streams


def test_a_stream_that_asks_now_and_then_is_not_silent():
    with serving(FakeModel(), episode_idle_s=0.6) as running:
        episode_id, pending = open_episode(running), queue.Queue()
        replies = running.policy.ActStream(iter(pending.get, None), timeout=20)
        for decision in range(5):
            time.sleep(0.25)
            pending.put(messages.act(episode_id, decision))
            assert next(replies).HasField("chunk")
        pending.put(None)


def test_a_client_that_reads_no_answer_loses_its_stream_and_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr("policy_server.act_stream.READ_S", 0.5)
    with serving(FakeModel(), episode_idle_s=2.0) as running, RudeClient(running.address, window=0) as rude:
        episode_id, call = open_episode(running), rude.call(STREAM)
        for decision in range(3):
            rude.send(call, messages.act(episode_id, decision).SerializeToString())
        eventually(lambda: running.model.batches)
        (stream,) = running.server._service._streams
        eventually(lambda: stream._unread and not stream._under_way)
        assert running.server.waiting == 0
        assert running.policy.Act(messages.act(open_episode(running), 0)).HasField("chunk")
        rude.read_on(call)
        assert rude.status(call) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    # and the server has stopped, though the answers never left


@pytest.fixture
def watchful(monkeypatch):
    """The server notices a dead connection within a few seconds, instead of half a minute."""
    soon = dict.fromkeys(("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"), 3_000)
    options = [(name, soon.get(name, value)) for name, value in server_module.OPTIONS]
    monkeypatch.setattr(server_module, "OPTIONS", options)


def test_a_client_that_vanishes_without_a_word_leaves_the_queue(watchful):
    with serving(FakeModel(), max_batch=1, max_wait_ms=0, queue=4) as running:
        hole = BlackHole(running.address)
        running.model.gate.clear()
        in_model = running.policy.Act.future(messages.act(open_episode(running), 0))
        eventually(lambda: running.model.batches)
        with grpc.insecure_channel(hole.address) as channel:
            lost = policy_pb2_grpc.PolicyStub(channel)
            call = lost.Act.future(messages.act(open_episode(running), 0))
            stream = lost.ActStream(iter(queue.Queue().get, None))
            eventually(lambda: running.server.waiting == 1 and running.server._service._streams)
            hole.swallow()
            eventually(lambda: running.server.waiting == 0 and not running.server._service._streams, within_s=40)
            running.model.gate.set()
            assert in_model.result(5).HasField("chunk")
            call.cancel(), stream.cancel()
        hole.close()


def test_half_a_publish_is_dropped_when_nothing_more_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.admin.SILENCE_S", 0.5)
    with administered(versions=kept(tmp_path)) as (_, stub):
        pending: queue.Queue = queue.Queue()
        for part in itertools.islice(publication("f" * 64, bytes(5000)), 3):
            pending.put(part)
        refused = refusal(stub.PublishWeights, iter(pending.get, None))
        pending.put(None)
        assert refused.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert not list(tmp_path.glob("incoming-*"))
        assert stub.PublishWeights(publication("f" * 64, b"good"), timeout=20).version == 1


def test_few_publishes_may_be_under_way_and_one_that_is_given_up_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.admin.MAX_UPLOADS", 1)
    with administered(versions=kept(tmp_path)) as (_, stub):
        pending: queue.Queue = queue.Queue()
        pending.put(next(publication("f" * 64, bytes(5000))))
        stalled = stub.PublishWeights.future(iter(pending.get, None))
        eventually(lambda: list(tmp_path.glob("incoming-*")))
        refused = refusal(stub.PublishWeights, publication("f" * 64, b"good"))
        assert refused.code == EXHAUSTED.value[0] and refused.retry_after_ms > 0
        stalled.cancel()
        pending.put(None)
        eventually(lambda: not list(tmp_path.glob("incoming-*")))
        assert stub.PublishWeights(publication("f" * 64, b"good"), timeout=20).version == 1


def test_an_episode_remembers_no_more_ticks_than_were_reported_last(calm):
    episode_id = open_episode(calm)
    for decision in range(20):
        ticks = [messages.tick(decision - 1, index) for index in range(3)] if decision else []
        calm.policy.Act(messages.act(episode_id, decision, ticks=ticks))
    assert len(calm.server._episodes.find(episode_id)._ticks) == 3


def test_a_follower_that_leaves_is_forgotten(tmp_path):
    with serving(FakeModel(), episodes=tmp_path) as running:
        for _ in range(20):
            parts = running.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(follow=True))
            next(parts)
            parts.cancel()
        eventually(lambda: not running.server._rollouts._readers)
        parts = running.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(follow=True))
        next(parts)
        eventually(lambda: len(running.server._store._watchers) == 1)


def test_workers_that_fell_silent_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("policy_server.rollout_queue.HEARD_S", 0.2)
    with serving(FakeModel(), episodes=tmp_path, lease_s=0.4) as running:
        for number in range(20):
            running.rollouts.LeaseRollout(rollout_pb2.LeaseRolloutRequest(worker=f"{number}", can_run=["fake/*"]))
        eventually(lambda: not running.server._work._workers)


@pytest.mark.parametrize("look", ["read_observation", "check_ticks"])
def test_pictures_and_ticks_are_looked_at_beside_the_network_not_in_it(calm, monkeypatch, look):
    threads, looks = [], getattr(service, look)

    def remembering(*args, **options):
        threads.append(threading.current_thread().name)
        return looks(*args, **options)

    monkeypatch.setattr(service, look, remembering)
    episode_id, ticks = open_episode(calm), [messages.tick(0, 0)]
    calm.policy.Act(messages.act(episode_id, 0, ticks=ticks))
    calm.policy.EndEpisode(messages.end(episode_id, executed=ticks, final_observation=messages.observation()))
    assert len(threads) == 2 and all(name.startswith("prepare") for name in threads)
