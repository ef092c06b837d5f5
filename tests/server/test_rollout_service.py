"""Work out, experience back, over real sockets: leases, late episodes, restarts, cursors and damaged files."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest

from policy_server.episode_store import EpisodeStore
from policy_server.episodes import Episodes
from policy_server.errors import UnknownVersion
from policy_server.refusals import REFUSAL_KEY
from policy_server.rollout_queue import ATTEMPTS, RolloutQueue
from policy_server.rollout_service import TICK_S
from protos import episode_pb2, policy_pb2, rollout_pb2
from tests.server import messages
from tests.server.fake_model import FakeModel
from tests.server.running import RunningServer, eventually, serving
from tests.server.test_recording import FillingStore, whole

LEASE_S = 0.4
ERROR, SUCCESS = episode_pb2.OUTCOME_ERROR, episode_pb2.OUTCOME_SUCCESS


@pytest.fixture
def server(tmp_path: Path):
    with serving(FakeModel(), episodes=tmp_path) as running:
        yield running


def enqueue(server: RunningServer, *rollouts: rollout_pb2.Rollout) -> int:
    return server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts)).added


def wish(worker: str = "w", can_run: Iterable[str] = ("fake/*",), **fields) -> rollout_pb2.LeaseRolloutRequest:
    return rollout_pb2.LeaseRolloutRequest(worker=worker, can_run=can_run, **fields)


def lease(server: RunningServer, worker: str = "w", **fields) -> rollout_pb2.LeaseRolloutReply:
    return server.rollouts.LeaseRollout(wish(worker, **{"wait_ms": 5000, **fields}), timeout=10)


def start(server: RunningServer, leased: rollout_pb2.LeaseRolloutReply, **fields) -> policy_pb2.StartEpisodeReply:
    return server.policy.StartEpisode(policy_pb2.StartEpisodeRequest(lease_id=leased.lease_id, **fields))


def end(server: RunningServer, episode_id: str, outcome: episode_pb2.Outcome = SUCCESS, message: str = "") -> int:
    return server.policy.EndEpisode(messages.end(episode_id, outcome=outcome, message=message)).sequence


def run(server: RunningServer, outcome: episode_pb2.Outcome = SUCCESS, message: str = "") -> int:
    """Leases a rollout, runs it and gives the sequence number of its episode."""
    episode_id = start(server, lease(server)).episode_id
    server.policy.Act(messages.act(episode_id, 0))
    return end(server, episode_id, outcome, message)


def counts(server: RunningServer, run: str = "") -> tuple[int, int, int, int]:
    status = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(run=run))
    return status.waiting, status.leased, status.done, len(status.set_aside)


def stream(server: RunningServer, **fields):
    return server.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(**fields), timeout=20)


def commit(server: RunningServer, reader: str, cursor: int = 0, *, leave: bool = False) -> None:
    server.rollouts.CommitCursor(rollout_pb2.CommitCursorRequest(reader=reader, cursor=cursor, leave=leave))


def rollouts_in(parts: Iterable[rollout_pb2.EpisodePart]) -> list[str]:
    return [part.record.start.rollout_id for part in parts if part.record.HasField("start")]


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Leases and episodes.


def test_a_leased_rollout_says_what_its_episode_is_and_the_episode_completes_it(server, tmp_path):
    sampling = {"version": 0, "temperature": 1.5, "noise_correlation": 0.5, "seed": 9}
    asked = messages.rollout("r/0", "fake/3", initial_state="17", purpose=episode_pb2.PURPOSE_EVALUATE, **sampling)
    assert enqueue(server, asked) == 1 and counts(server) == (1, 0, 0, 0)
    leased = lease(server)
    assert leased.rollout == asked and leased.lease_ms == 30_000 and counts(server) == (0, 1, 0, 0)
    opened = start(
        server, leased, task="other/0", purpose=episode_pb2.PURPOSE_DEPLOY, temperature=0.1, seed=1, follow_live=True
    )
    assert end(server, opened.episode_id) == 1 and counts(server) == (0, 0, 1, 0)
    (episode,) = whole(tmp_path)
    told = episode.start
    assert (told.rollout_id, told.task, told.initial_state) == ("r/0", "fake/3", "17")
    assert told.purpose == episode_pb2.PURPOSE_EVALUATE
    assert (told.temperature, told.noise_correlation, told.seed) == (1.5, 0.5, 9)
    assert (told.version, told.follow_live) == (0, False)


def test_a_rollout_without_a_seed_gets_one_of_the_servers(server):
    enqueue(server, messages.rollout("r/0"), messages.rollout("r/1"))
    first, second = (start(server, lease(server), seed=5) for _ in range(2))
    assert first.seed != second.seed


def test_a_repeated_start_gives_the_same_episode_whatever_became_of_the_lease(server):
    enqueue(server, messages.rollout("r/0"))
    leased = lease(server)
    opened = start(server, leased, request_id="once")
    end(server, opened.episode_id)
    assert start(server, leased, request_id="once") == opened


def test_an_episode_is_not_started_under_a_lease_that_is_not_held(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, lease_s=LEASE_S) as server:
        enqueue(server, messages.rollout("r/0"))
        lost = lease(server)
        eventually(lambda: counts(server) == (1, 0, 0, 0))
        for lease_id in (lost.lease_id, "never given"):
            with pytest.raises(grpc.RpcError) as error:
                server.policy.StartEpisode(messages.start(lease_id=lease_id))
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            refusal = policy_pb2.Refusal.FromString(dict(error.value.trailing_metadata())[REFUSAL_KEY])
            assert refusal.field == "lease_id" and "is not held" in refusal.message


def test_two_workers_share_the_work(server):
    enqueue(server, *(messages.rollout(f"r/{n}", f"fake/{n % 2}") for n in range(10)))

    def work(worker: str) -> None:
        with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            own = RunningServer(
                address=server.address, channel=channel, server=server.server, loop=server.loop, model=server.model
            )
            while (leased := lease(own, worker, wait_ms=0)).HasField("rollout"):
                end(own, start(own, leased).episode_id)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in ("u", "v")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counts(server) == (0, 0, 10, 0)
    assert sorted(rollouts_in(stream(server))) == [f"r/{n}" for n in range(10)]
    assert list(server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).workers) == ["u", "v"]


def test_a_worker_may_wait_for_work(server):
    began = time.monotonic()
    assert not lease(server, wait_ms=200).HasField("rollout")
    assert 0.15 < time.monotonic() - began < 2
    began = time.monotonic()
    for n in range(4):
        call = server.rollouts.LeaseRollout.future(wish(wait_ms=10_000))
        time.sleep(0.05)
        assert not call.done()
        enqueue(server, messages.rollout(f"r/{n}"))
        assert call.result(5).rollout.rollout_id == f"r/{n}"
    assert time.monotonic() - began < 3 * TICK_S  # as it comes, not as the clock ticks


def test_work_goes_to_the_waiting_worker_that_holds_its_task(server):
    stranger = server.rollouts.LeaseRollout.future(wish("stranger", wait_ms=10_000))
    eventually(lambda: list(server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).workers) == ["stranger"])
    holder = server.rollouts.LeaseRollout.future(wish("holder", holds=["fake/7"], wait_ms=10_000))
    eventually(lambda: len(server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).workers) == 2)
    enqueue(server, messages.rollout("r/0", "fake/7"))
    assert holder.result(2).rollout.rollout_id == "r/0" and not stranger.done()
    enqueue(server, messages.rollout("r/1", "fake/7"))
    assert stranger.result(2).rollout.rollout_id == "r/1"


def test_a_lease_that_is_not_renewed_goes_to_a_worker_that_waits(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, lease_s=1.0) as server:
        enqueue(server, messages.rollout("r/0"))
        first = lease(server, "first")
        for _ in range(4):
            time.sleep(0.3)
            assert server.rollouts.RenewLease(rollout_pb2.RenewLeaseRequest(lease_id=first.lease_id)).held
        second = lease(server, "second")
        assert second.rollout.rollout_id == "r/0"
        assert not server.rollouts.RenewLease(rollout_pb2.RenewLeaseRequest(lease_id=first.lease_id)).held


def test_a_late_episode_counts_and_the_other_workers_ends_as_an_error(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, lease_s=LEASE_S) as server:
        enqueue(server, messages.rollout("r/0"))
        late = start(server, lease(server, "late"))
        other = start(server, lease(server, "other"))
        end(server, late.episode_id)
        end(server, other.episode_id)
        assert counts(server) == (0, 0, 1, 0)
    counted, not_counted = whole(tmp_path)
    assert (counted.start.episode_id, counted.end.outcome) == (late.episode_id, SUCCESS)
    assert (not_counted.start.episode_id, not_counted.end.outcome) == (other.episode_id, ERROR)
    assert "not counted: rollout 'r/0'" in not_counted.end.message


def test_the_third_error_sets_a_rollout_aside_and_the_run_goes_on(server):
    enqueue(server, messages.rollout("r/0"), messages.rollout("r/1"))
    for n in range(ATTEMPTS):
        run(server, ERROR, f"the arm broke {n}")
    (aside,) = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(run="r")).set_aside
    assert aside.rollout.rollout_id == "r/0"
    assert list(aside.errors) == ["the arm broke 0", "the arm broke 1", "the arm broke 2"]
    run(server)
    assert counts(server) == (0, 0, 1, 1)


def test_an_episode_that_fell_silent_is_an_error_of_its_rollout(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, episode_idle_s=0.2) as server:
        enqueue(server, messages.rollout("r/0"))
        for _ in range(ATTEMPTS):
            start(server, lease(server))
        eventually(lambda: counts(server) == (0, 0, 0, 1))
        (aside,) = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).set_aside
        assert list(aside.errors) == ["nothing was heard of it for 0.2 s"] * ATTEMPTS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("call", ["Act", "EndEpisode"])
def test_an_episode_that_the_disk_did_not_take_gives_its_rollout_back(tmp_path, call):
    with serving(FakeModel(), store=FillingStore(tmp_path)) as server:
        enqueue(server, messages.rollout("r/0"))
        episode_id = start(server, lease(server)).episode_id
        request = {"Act": messages.act(episode_id, 0), "EndEpisode": messages.end(episode_id)}[call]
        with pytest.raises(grpc.RpcError):
            getattr(server.policy, call)(request)
        assert counts(server) == (1, 0, 0, 0)


def test_a_rollout_whose_weights_are_gone_has_failed():
    queue = RolloutQueue()
    queue.enqueue([messages.rollout("r/0", version=7)])
    episodes = Episodes(None, queue)

    def make(*_) -> episode_pb2.EpisodeStart:
        raise UnknownVersion("there is no version 7")

    for _ in range(ATTEMPTS):
        leased = queue.lease("w", ["fake/*"])
        with pytest.raises(UnknownVersion):
            episodes.start(policy_pb2.StartEpisodeRequest(lease_id=leased.lease_id), make)
    assert list(queue.status().set_aside[0].errors) == ["there is no version 7"] * ATTEMPTS


def test_an_episode_of_a_cancelled_run_ends_as_an_error_of_nobody(server, tmp_path):
    enqueue(server, messages.rollout("r/0"), messages.rollout("r/1"), messages.rollout("s/0"))
    under_way = start(server, lease(server))
    reply = server.rollouts.CancelRollouts(rollout_pb2.CancelRolloutsRequest(run="r"))
    assert reply.cancelled == 2 and counts(server) == (1, 0, 0, 0)
    end(server, under_way.episode_id)
    assert [episode.end.outcome for episode in whole(tmp_path)] == [ERROR]
    assert counts(server) == (1, 0, 0, 0)


BAD = {
    "no name": (messages.rollout(""), "rollouts[0].rollout_id", "must not be empty"),
    "no task": (messages.rollout("r/0", ""), "rollouts[0].task", "must not be empty"),
    "deployment": (messages.rollout("r/0", purpose=3), "rollouts[0].purpose", "PURPOSE_TRAIN or PURPOSE_EVALUATE"),
    "a purpose of the future": (messages.rollout("r/0", purpose=99), "rollouts[0].purpose", "got code 99"),
    "cold": (
        messages.rollout("r/0", temperature=-1),
        "rollouts[0].temperature",
        "must be 0, or in 1e-06 to 1000, got -1",
    ),
    "no number": (messages.rollout("r/0", temperature=float("nan")), "rollouts[0].temperature", "to 1000, got nan"),
    "one noise": (messages.rollout("r/0", noise_correlation=1), "rollouts[0].noise_correlation", "in [0, 1), got 1"),
    "no such weights": (messages.rollout("r/0", version=7), "rollouts[0].version", "there is no version 7"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_rollout_is_refused_and_none_of_its_neighbours_is_taken(server, what):
    bad, field, sentence = BAD[what]
    with pytest.raises(grpc.RpcError) as error:
        enqueue(server, bad, messages.rollout("r/9"))
    assert field in error.value.details() and sentence in error.value.details()
    assert counts(server) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("LeaseRollout", wish(""), "worker"),
        ("LeaseRollout", wish(can_run=[]), "can_run"),
        ("CancelRollouts", rollout_pb2.CancelRolloutsRequest(), "run"),
        ("CommitCursor", rollout_pb2.CommitCursorRequest(), "reader"),
    ],
)
def test_a_request_that_lacks_a_name_is_refused(server, call, request_, field):
    with pytest.raises(grpc.RpcError) as error:
        getattr(server.rollouts, call)(request_)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(f"{field}: must ")


def test_a_server_without_a_store_takes_no_work_and_says_how_it_would():
    with serving(FakeModel()) as server:
        for call in (
            lambda: enqueue(server, messages.rollout("r/0")),
            lambda: lease(server),
            lambda: commit(server, "r"),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "start it with --episodes DIR" in error.value.details()
        assert counts(server) == (0, 0, 0, 0)


def test_no_work_goes_out_before_the_model_is_warm_nor_while_the_server_stops(tmp_path):
    with serving(FakeModel(), episodes=tmp_path, warm=False) as server:
        for call in (lambda: lease(server), lambda: enqueue(server, messages.rollout("r/0"))):
            with pytest.raises(grpc.RpcError, match="warming up"):
                call()
        asyncio.run_coroutine_threadsafe(server.server.warm_up(), server.loop).result(5)
        waiting = server.rollouts.LeaseRollout.future(wish(wait_ms=10_000))
        eventually(lambda: server.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).workers)
        server.begin_stop().result(10)
        refused = waiting.exception(5)
        assert (refused.code(), refused.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping")


# Episodes from a cursor.


def test_a_stream_gives_what_was_recorded_record_by_record_and_says_when_it_has_caught_up(server, tmp_path):
    enqueue(server, messages.rollout("r/0"))
    run(server)
    *parts, last = stream(server)
    (episode,) = whole(tmp_path)
    assert [part.record.WhichOneof("record") for part in parts] == ["start", "decision", "end"]
    assert {part.sequence for part in parts} == {1}
    assert parts[0].record.start == episode.start and parts[1].record.decision == episode.decisions[0]
    assert (last.sequence, last.HasField("record"), last.damaged) == (1, False, "")


def test_a_stream_goes_on_from_its_cursor_and_gives_one_run_or_all(server):
    enqueue(server, *(messages.rollout(name) for name in ("r/0", "s/0", "r/1", "rr/0")))
    for _ in range(4):
        run(server)
    plain = server.policy.StartEpisode(messages.start()).episode_id
    end(server, plain)
    assert rollouts_in(stream(server)) == ["r/0", "s/0", "r/1", "rr/0", ""]
    assert rollouts_in(stream(server, cursor=2)) == ["r/1", "rr/0", ""]
    *_, last = parts = list(stream(server, cursor=1, run="r"))
    assert rollouts_in(parts) == ["r/1"] and last.sequence == 5
    assert rollouts_in(stream(server, cursor=5)) == []


def test_a_stream_that_follows_gives_episodes_as_they_are_finished(server):
    enqueue(server, messages.rollout("s/0"), messages.rollout("r/0"))
    parts = stream(server, run="r", follow=True)
    assert next(parts) == rollout_pb2.EpisodePart(sequence=0)
    run(server)
    assert next(parts) == rollout_pb2.EpisodePart(sequence=1)  # another run's
    run(server)
    assert [next(parts).record.WhichOneof("record") for _ in range(3)] == ["start", "decision", "end"]
    assert next(parts) == rollout_pb2.EpisodePart(sequence=2)
    parts.cancel()


def test_a_stop_ends_streams_with_the_last_episode(tmp_path):
    with serving(FakeModel(), episodes=tmp_path) as server:
        enqueue(server, messages.rollout("r/0"))
        start(server, lease(server))
        parts = stream(server, follow=True)
        assert next(parts).sequence == 0
        stopping = server.begin_stop()
        rest = list(parts)  # raises when the stream does not end well
        assert rest[1].record.end.message == "the server stopped" and rest[-1].sequence == 1
        stopping.result(10)


@pytest.mark.parametrize("call", [lambda s: list(stream(s, cursor=3)), lambda s: commit(s, "r", 3)])
def test_a_cursor_beyond_the_newest_episode_is_from_another_store(server, call):
    enqueue(server, messages.rollout("r/0"))
    run(server)
    with pytest.raises(grpc.RpcError, match="must be at most 1, the newest episode here, got 3") as error:
        call(server)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_damaged_episode_is_reported_by_name_to_every_reader_and_its_rollout_may_run_again(tmp_path, caplog):
    with serving(FakeModel(), episodes=tmp_path) as server:
        enqueue(server, *(messages.rollout(f"r/{n}") for n in range(3)))
        for _ in range(3):
            run(server)
        (path,) = tmp_path.glob("00000002-*")
        spoil(path)
        for _ in range(2):
            parts = list(stream(server, run="r"))
            (damaged,) = (part for part in parts if part.damaged)
            assert damaged.sequence == 2 and path.name in damaged.damaged and str(tmp_path) not in damaged.damaged
            assert rollouts_in(parts) == ["r/0", "r/2"]
        assert [aside.name for aside in (tmp_path / "set_aside").iterdir()] == [path.name]
        assert path.name in caplog.text
        assert enqueue(server, *(messages.rollout(f"r/{n}") for n in range(3))) == 1
    with serving(FakeModel(), episodes=tmp_path) as server:
        assert [part.sequence for part in stream(server, run="r") if part.damaged] == [2]
        assert enqueue(server, *(messages.rollout(f"r/{n}") for n in range(3))) == 1
        assert run(server) == 4 and counts(server) == (0, 0, 3, 0)


# Restarts.


def test_a_restarted_server_knows_what_was_counted_and_takes_the_rest_again(tmp_path):
    work = [messages.rollout(f"r/{n}") for n in range(4)]
    with serving(FakeModel(), episodes=tmp_path) as server:
        enqueue(server, *work)
        run(server)
        run(server, ERROR)  # comes back first
        run(server)
        start(server, lease(server))
    with serving(FakeModel(), episodes=tmp_path) as server:
        assert counts(server, "r") == (0, 0, 2, 0)
        assert enqueue(server, *work) == 2
        run(server), run(server)
        assert counts(server, "r") == (0, 0, 4, 0)
    finished = [episode.start.rollout_id for episode in whole(tmp_path) if episode.end.outcome == SUCCESS]
    assert sorted(finished) == ["r/0", "r/1", "r/2", "r/3"]


def test_nothing_is_deleted_that_a_reader_has_yet_to_read_not_even_after_a_restart(tmp_path, caplog):
    def numbers() -> list[int]:
        return sorted(int(path.name[:8]) for path in tmp_path.glob("*.episode"))

    with serving(FakeModel(), store=EpisodeStore(tmp_path, keep_bytes=1)) as server:
        enqueue(server, *(messages.rollout(f"r/{n}") for n in range(4)))
        commit(server, "r"), commit(server, "s")
        run(server), run(server)
        assert numbers() == [1, 2] and "what reader 'r' has not read" in caplog.text
        commit(server, "s", 2)
    with serving(FakeModel(), store=EpisodeStore(tmp_path, keep_bytes=1)) as server:
        enqueue(server, *(messages.rollout(f"r/{n}") for n in range(4)))
        run(server)
        assert numbers() == [1, 2, 3]
        commit(server, "r", 1)
        assert numbers() == [2, 3]
        commit(server, "r", 3)
        assert numbers() == [3]  # s has not read it, and it is the newest
        run(server)
        assert numbers() == [3, 4]
        commit(server, "s", leave=True)
        assert numbers() == [4]
        assert rollouts_in(stream(server, cursor=3)) == ["r/3"]
