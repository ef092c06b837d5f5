"""What the server writes down of an episode, and when it says that it is safe."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from policy_server import episode_store, episodes, service
from policy_server.episode_store import EpisodeStore
from policy_server.observation import read_observation
from protos import episode_pb2, policy_pb2_grpc, rollout_pb2
from protos.codec import encode_image
from protos.episode_file import Episode, EpisodeWriter, read_episode
from tests.server import messages
from tests.server.fake_model import SIDE_PX, FakeModel
from tests.server.running import eventually, serving


@pytest.fixture
def server(tmp_path: Path):
    with serving(FakeModel(), episodes=tmp_path) as running:
        yield running


def whole(folder: Path) -> list[Episode]:
    return [read_episode(path) for path in sorted(folder.glob("*.episode"))]


def refused_because(call, request) -> str:
    """Why a request that comes too late is refused."""
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return error.value.details()


def test_a_stored_episode_can_be_read_without_the_server_that_made_it(server, tmp_path):
    opened = server.policy.StartEpisode(
        messages.start(task="libero_object/3", initial_state="17", temperature=0.5, arm="libero", asset_tree="stand-in")
    )
    jpeg = messages.observation()
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    jpeg.images["agentview"].CopyFrom(encode_image(pixels, "jpeg"))
    first = server.policy.Act(messages.act(opened.episode_id, 0))
    second_request = messages.act(opened.episode_id, 1, ticks=[messages.tick(0, i) for i in range(3)])
    second_request.observation.CopyFrom(jpeg)
    second = server.policy.Act(second_request)
    final = messages.observation(grey=99)
    server.policy.EndEpisode(
        messages.end(
            opened.episode_id,
            outcome=episode_pb2.OUTCOME_FAILURE,
            terminal=False,
            executed=[messages.tick(1, 0)],
            final_observation=final,
        )
    )
    (episode,) = whole(tmp_path)
    start = episode.start
    assert (start.task, start.initial_state, start.purpose) == ("libero_object/3", "17", episode_pb2.PURPOSE_TRAIN)
    assert (start.temperature, start.seed, start.version) == (0.5, opened.seed, opened.version)
    assert (start.base_fingerprint, start.image_path, start.unnorm_key) == ("f" * 64, "plain", "fake")
    assert (start.asset_tree, start.arm, list(start.state_names)) == ("stand-in", "libero", ["px", "py", "pz"])
    assert [d.chunk for d in episode.decisions] == [first.chunk, second.chunk]
    assert episode.decisions[1].observation == jpeg  # as received: the bytes of the JPEG, not its pixels
    assert [(tick.decision, tick.index) for tick in episode.ticks] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert (episode.end.outcome, episode.end.terminal) == (episode_pb2.OUTCOME_FAILURE, False)
    assert episode.end.final_observation == final
    assert start.started_unix_ns < episode.end.ended_unix_ns


def test_an_acknowledged_episode_is_on_disk_and_a_second_end_is_a_no_op(server, tmp_path):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    reply = server.policy.EndEpisode(messages.end(episode_id))
    assert reply.sequence == 1 and len(whole(tmp_path)) == 1
    again = server.policy.EndEpisode(messages.end(episode_id, outcome=episode_pb2.OUTCOME_FAILURE))
    assert again == reply
    assert [episode.end.outcome for episode in whole(tmp_path)] == [episode_pb2.OUTCOME_SUCCESS]


def test_a_second_end_is_a_no_op_even_after_a_restart(tmp_path):
    with serving(FakeModel(), episodes=tmp_path) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        reply = server.policy.EndEpisode(messages.end(episode_id))
    with serving(FakeModel(), episodes=tmp_path) as server:
        assert server.policy.EndEpisode(messages.end(episode_id)) == reply
        following = server.policy.StartEpisode(messages.start()).episode_id
        assert server.policy.EndEpisode(messages.end(following)).sequence == reply.sequence + 1


def test_simultaneous_ends_close_an_episode_once(server, tmp_path):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    calls = [server.policy.EndEpisode.future(messages.end(episode_id)) for _ in range(5)]
    assert {call.result(5).sequence for call in calls} == {1}
    assert len(whole(tmp_path)) == 1


def test_retries_and_refusals_leave_no_trace(server, tmp_path):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    ticks = [messages.tick(0, 0), messages.tick(0, 1)]
    server.policy.Act(messages.act(episode_id, 0))
    refused = messages.act(episode_id, 1, ticks=ticks)
    refused.observation.instruction = ""
    with pytest.raises(grpc.RpcError):
        server.policy.Act(refused)
    for _ in range(2):
        server.policy.Act(messages.act(episode_id, 1, ticks=ticks))
    server.policy.EndEpisode(messages.end(episode_id, executed=[*ticks, messages.tick(1, 0)]))
    (episode,) = whole(tmp_path)
    assert [decision.decision for decision in episode.decisions] == [0, 1]
    assert [(tick.decision, tick.index) for tick in episode.ticks] == [(0, 0), (0, 1), (1, 0)]


def test_a_full_episode_takes_no_more_decisions_and_ends_well(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "MAX_EPISODE_BYTES", 1000)
    with serving(FakeModel(), episodes=tmp_path) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        with pytest.raises(grpc.RpcError) as refused:
            for decision in range(20):
                server.policy.Act(messages.act(episode_id, decision))
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "the episode is full" in refused.value.details() and decision > 1
        assert server.policy.EndEpisode(messages.end(episode_id)).sequence == 1
    (path,) = tmp_path.glob("*.episode")
    assert len(read_episode(path).decisions) == decision


def test_a_silent_episode_is_closed_as_an_error(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, episode_idle_s=1.0) as server:
        silent, busy = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(2))
        decisions = itertools.count()

        def closed() -> list[Episode]:
            server.policy.Act(messages.act(busy, next(decisions)))
            return whole(tmp_path)

        eventually(closed)
        (episode,) = whole(tmp_path)
        assert episode.start.episode_id == silent
        assert episode.end.outcome == episode_pb2.OUTCOME_ERROR
        assert "nothing was heard of it for 1 s" in episode.end.message


def test_a_server_that_stops_closes_its_open_episodes_as_errors(tmp_path):
    with serving(FakeModel(), episodes=tmp_path) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        server.policy.Act(messages.act(episode_id, 0))
    (episode,) = whole(tmp_path)
    assert len(episode.decisions) == 1
    assert (episode.end.outcome, episode.end.message) == (episode_pb2.OUTCOME_ERROR, "the server stopped")


def test_a_stop_closes_all_episodes_at_once(tmp_path):
    together = threading.Barrier(3, timeout=10)

    class MeetingStore(EpisodeStore):
        def finish(self, writer, end):
            together.wait()
            return super().finish(writer, end)

    with serving(FakeModel(), store=MeetingStore(tmp_path)) as server:
        for _ in range(3):
            server.policy.StartEpisode(messages.start())
    assert [episode.end.message for episode in whole(tmp_path)] == ["the server stopped"] * 3


@pytest.mark.parametrize("how", ["stop", "silence"])
def test_neither_a_stop_nor_silence_overtakes_an_end_that_is_looked_at(tmp_path, monkeypatch, how):
    looking, seen = threading.Event(), threading.Event()

    def slowly(*args, **options):
        looking.set()
        assert seen.wait(10)
        return read_observation(*args, **options)

    monkeypatch.setattr(service, "read_observation", slowly)
    with serving(FakeModel(), episodes=tmp_path, episode_idle_s=0.2 if how == "silence" else 600.0) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        ended = messages.end(episode_id, final_observation=messages.observation())
        call = server.policy.EndEpisode.future(ended)
        assert looking.wait(10)
        if how == "stop":
            server.begin_stop()
        time.sleep(0.5)
        seen.set()
        assert call.result(10).sequence == 1
    (episode,) = whole(tmp_path)
    assert episode.end.outcome == episode_pb2.OUTCOME_SUCCESS


def test_an_end_of_an_episode_that_the_server_closed_is_refused_and_says_why(tmp_path):
    with serving(FakeModel(), episodes=tmp_path) as server:
        broken = messages.end(
            server.policy.StartEpisode(messages.start()).episode_id, outcome=episode_pb2.OUTCOME_ERROR
        )
        reply = server.policy.EndEpisode(broken)
        assert server.policy.EndEpisode(broken) == reply
    with serving(FakeModel(), episodes=tmp_path, episode_idle_s=0.2) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        eventually(lambda: len(whole(tmp_path)) == 2)
        for call, request in (
            (server.policy.EndEpisode, messages.end(episode_id)),
            (server.policy.EndEpisode, messages.end(episode_id, outcome=episode_pb2.OUTCOME_ERROR)),
            (server.policy.Act, messages.act(episode_id, 0)),
        ):
            assert refused_because(call, request).endswith("as an error: nothing was heard of it for 0.2 s")
    with serving(FakeModel(), episodes=tmp_path) as server:
        assert refused_because(server.policy.EndEpisode, messages.end(episode_id)).endswith("is stored as an error")
        assert server.policy.EndEpisode(broken) == reply


def test_a_stop_does_not_disturb_an_episode_that_is_being_closed(tmp_path):
    closing, disk_is_free = threading.Event(), threading.Event()

    class SlowStore(EpisodeStore):
        def finish(self, writer, end):
            closing.set()
            assert disk_is_free.wait(10)
            return super().finish(writer, end)

    with serving(FakeModel(), store=SlowStore(tmp_path), episode_idle_s=0.2) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        assert closing.wait(10)
        too_late = server.policy.EndEpisode.future(messages.end(episode_id))
        threading.Timer(0.5, disk_is_free.set).start()  # when the server is stopping
        server.begin_stop()
        assert too_late.exception(10).code() == grpc.StatusCode.FAILED_PRECONDITION
    (episode,) = whole(tmp_path)
    assert "nothing was heard of it" in episode.end.message


def test_a_full_disk_refuses_new_episodes_before_any_work(tmp_path):
    store = EpisodeStore(tmp_path, reserve_bytes=2**60)
    with serving(FakeModel(), store=store) as server:
        with pytest.raises(grpc.RpcError) as error:
            server.policy.StartEpisode(messages.start())
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the episode store is full" in error.value.details()
    assert list((tmp_path / "open").iterdir()) == []


class FillingStore(EpisodeStore):
    """The disk is full from the moment an episode is open."""

    def open(self, start: episode_pb2.EpisodeStart) -> EpisodeWriter:
        writer = super().open(start)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, writer._file.fileno())
        os.close(full)
        return writer


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
@pytest.mark.parametrize("call", ["Act", "EndEpisode"])
def test_an_episode_that_the_disk_took_no_more_of_is_never_acknowledged(tmp_path, call):
    with serving(FakeModel(), store=FillingStore(tmp_path)) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        request = {"Act": messages.act(episode_id, 0), "EndEpisode": messages.end(episode_id)}[call]
        for attempt in (
            lambda: getattr(server.policy, call)(request),
            lambda: server.policy.EndEpisode(messages.end(episode_id)),
        ):
            with pytest.raises(grpc.RpcError) as error:
                attempt()
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "is lost: No space left on device" in error.value.details()
    assert whole(tmp_path) == []


@pytest.mark.parametrize("call", ["Act", "EndEpisode"])
def test_a_disk_that_goes_read_only_loses_its_episodes_and_holds_up_nothing(tmp_path, monkeypatch, call):
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with serving(FakeModel(), episodes=tmp_path) as server:
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout("r/0")]))
        lease = server.rollouts.LeaseRollout(rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"]))
        episode_id = server.policy.StartEpisode(messages.start(lease_id=lease.lease_id)).episode_id
        server.policy.StartEpisode(messages.start())  # open when the server stops
        with monkeypatch.context() as disk:
            disk.setattr(EpisodeWriter, "_write", read_only)
            disk.setattr(Path, "unlink", read_only)
            request = {"Act": messages.act(episode_id, 0), "EndEpisode": messages.end(episode_id)}[call]
            for method, attempt in (
                (getattr(server.policy, call), request),
                (getattr(server.policy, call), request),
                (server.policy.EndEpisode, messages.end(episode_id)),
            ):
                assert "is lost: Read-only file system" in refused_because(method, attempt)
            assert len(server.server._episodes.open) == 1
            assert server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).waiting == 1
            server.begin_stop().result(10)
    assert whole(tmp_path) == []


def test_a_decision_that_was_not_recorded_was_not_answered_either(server, monkeypatch, caplog):
    episode_id = server.policy.StartEpisode(messages.start()).episode_id
    episode = server.server._episodes.find(episode_id)
    with monkeypatch.context() as fault:
        fault.setattr(EpisodeWriter, "decision", lambda *_: 1 / 0)
        assert "is lost: the server failed" in refused_because(server.policy.Act, messages.act(episode_id, 0))
    assert "is lost: the server failed" in refused_because(server.policy.Act, messages.act(episode_id, 0))
    assert episode.decisions == 0 and not server.server._episodes.open and "ZeroDivisionError" in caplog.text


def test_decisions_are_recorded_in_their_order_though_a_later_one_is_decoded_first(tmp_path):
    class Lanes(FakeModel):
        lanes = 2

        def __init__(self):
            super().__init__()
            self.second_is_decoded = threading.Event()

        def decode(self, requests, weights, lane):
            answers = super().decode(requests, weights, lane)
            if requests[0].decision == 0:
                assert self.second_is_decoded.wait(10)
                time.sleep(0.2)  # time for what must not be: that the second one is recorded
            else:
                self.second_is_decoded.set()
            return answers

    with serving(Lanes(), episodes=tmp_path) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        first = server.policy.Act.future(messages.act(episode_id, 0))
        eventually(lambda: server.model.batches)
        second = server.policy.Act(messages.act(episode_id, 1, ticks=[messages.tick(0, 0)]), timeout=20)
        assert first.result(5).decision == 0
        assert server.policy.Act(messages.act(episode_id, 1)) == second
        assert len(server.model.batches) == 2
        server.policy.EndEpisode(messages.end(episode_id))
    (episode,) = whole(tmp_path)
    assert [decision.decision for decision in episode.decisions] == [0, 1]


def test_nobody_waits_for_a_disk_that_only_others_need(tmp_path, monkeypatch):
    with serving(FakeModel(), episodes=tmp_path) as server:
        done, ending, also_ending, at_work = (server.policy.StartEpisode(messages.start()).episode_id for _ in range(4))
        reply = server.policy.EndEpisode(messages.end(done))
        syncing, disk_is_free = threading.Event(), threading.Event()

        def slow(path: Path) -> None:
            syncing.set()
            assert disk_is_free.wait(20)

        monkeypatch.setattr(episode_store, "sync", slow)
        calls = [server.policy.EndEpisode.future(messages.end(ending))]
        assert syncing.wait(10)
        calls.append(server.policy.EndEpisode.future(messages.end(also_ending)))
        time.sleep(0.2)  # it is on its way
        assert server.policy.Act(messages.act(at_work, 0), timeout=10).HasField("chunk")
        assert server.policy.EndEpisode(messages.end(done), timeout=10) == reply
        assert next(server.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(), timeout=10)).sequence == 1
        disk_is_free.set()
        assert [call.result(10).sequence for call in calls] == [2, 3]


SERVER_THAT_WILL_BE_KILLED = """
import sys, threading
from pathlib import Path
from tests.server.fake_model import FakeModel
from tests.server.running import serving
with serving(FakeModel(), episodes=Path(sys.argv[1])) as server:
    print(server.address, flush=True)
    threading.Event().wait()
"""


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(tmp_path, caplog):
    line = [sys.executable, "-c", SERVER_THAT_WILL_BE_KILLED, str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with grpc.insecure_channel(process.stdout.readline().strip()) as channel:
            policy = policy_pb2_grpc.PolicyStub(channel)
            ended, unfinished = (policy.StartEpisode(messages.start()).episode_id for _ in range(2))
            for episode_id in (ended, unfinished):
                policy.Act(messages.act(episode_id, 0))
            sequence = policy.EndEpisode(messages.end(ended)).sequence
            process.kill()
            process.wait(10)
    finally:
        process.kill()
    with serving(FakeModel(), episodes=tmp_path) as server:
        assert server.policy.EndEpisode(messages.end(ended)).sequence == sequence
        with pytest.raises(grpc.RpcError) as error:
            server.policy.Act(messages.act(unfinished, 1))
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        following = server.policy.StartEpisode(messages.start()).episode_id
        assert server.policy.EndEpisode(messages.end(following)).sequence > sequence
    assert [episode.start.episode_id for episode in whole(tmp_path)] == [ended, following]
    assert f"{unfinished}.episode.partial" in caplog.text
