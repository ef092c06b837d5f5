"""The trainer's side of the queue: every rollout comes in once, whatever happens to server, worker and disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from policy_server.episode_store import EpisodeStore
from protos import episode_pb2, rollout_pb2
from rl_trainer import rollout_client, rollouts
from rl_trainer.patience import ServerGone
from rl_trainer.rollouts import RolloutQueue
from tests.server import messages
from tests.server.fake_model import FakeModel
from tests.server.running import RunningServer, serving


def rollout(number: int, run: str = "run") -> rollout_pb2.Rollout:
    return rollout_pb2.Rollout(
        rollout_id=f"{run}/0/{number}",
        task="fake/0",
        initial_state=str(number),
        purpose=episode_pb2.PURPOSE_TRAIN,
        temperature=1.0,
    )


def work(server: RunningServer, *, outcome: episode_pb2.Outcome = episode_pb2.OUTCOME_SUCCESS) -> str:
    """Runs one leased rollout with one decision; gives the rollout's id, empty when there was no work."""
    request = rollout_pb2.LeaseRolloutRequest(worker="test", can_run=["fake/*"])
    leased = server.rollouts.LeaseRollout(request)
    if not leased.HasField("rollout"):
        return ""
    episode_id = server.policy.StartEpisode(messages.start(lease_id=leased.lease_id)).episode_id
    server.policy.Act(messages.act(episode_id, 0))
    server.policy.EndEpisode(messages.end(episode_id, outcome=outcome, message="it broke"))
    return leased.rollout.rollout_id


@contextmanager
def worker(server: RunningServer, *, refused: grpc.StatusCode | None = None, **how) -> Iterator[None]:
    """Works until the block ends; a refusal of that code is waited out."""
    over = threading.Event()

    def go() -> None:
        while not over.is_set():
            try:
                worked = work(server, **how)
            except grpc.RpcError as error:
                if error.code() != refused:
                    raise
                worked = ""
            if not worked:
                time.sleep(0.01)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_every_rollout_comes_in_once_and_the_cursor_says_where_to_go_on(tmp_path: Path) -> None:
    with serving(FakeModel(), episodes=tmp_path) as server, worker(server):
        queue = RolloutQueue(server.address, run="run")
        for first in (0, 3):
            queue.enqueue([rollout(number) for number in range(first, first + 3)])
            finished = list(queue.finished())
            assert sorted(item.rollout.initial_state for item in finished) == [str(first + n) for n in range(3)]
            assert all(item.episode is not None and item.episode.decisions for item in finished)
        assert queue.cursor == 6
        queue.commit()
        again = RolloutQueue(server.address, run="run", cursor=3)
        again.enqueue([rollout(4)])  # done already: it is read, not run again
        assert [item.rollout.rollout_id for item in again.finished()] == ["run/0/4"]


def test_what_a_killed_life_of_the_run_had_asked_for_is_kept_until_it_is_asked_for_again(tmp_path: Path) -> None:
    """A checkpoint, two batches asked for and run, a kill; twice the same."""
    with serving(FakeModel(), episodes=tmp_path) as server:
        batches = [[rollout(0), rollout(1)], [rollout(2), rollout(3)]]
        RolloutQueue(server.address, run="run").enqueue([*batches[0], *batches[1]])
        assert [work(server) for _ in range(4)] == [f"run/0/{number}" for number in range(4)]
        resumed = RolloutQueue(server.address, run="run")
        for batch, taken_in in zip(batches, (2, 4), strict=True):
            resumed.enqueue(batch)
            assert [item.rollout for item in resumed.finished()] == batch
            assert resumed.cursor == taken_in
        again = RolloutQueue(server.address, run="run", cursor=2)
        again.enqueue(batches[1])
        assert [item.rollout for item in again.finished()] == batches[1] and again.cursor == 4


def test_what_nobody_will_ask_for_holds_back_no_cursor(tmp_path: Path) -> None:
    """A life of the run had asked for an evaluation, was killed, and goes on without evaluations."""
    with serving(FakeModel(), episodes=tmp_path) as server:
        RolloutQueue(server.address, run="run").enqueue([rollout(0), rollout(1), rollout(2)])
        assert [work(server) for _ in range(3)] == [f"run/0/{number}" for number in range(3)]
        resumed = RolloutQueue(server.address, run="run")
        resumed.enqueue([rollout(1)])
        assert [item.rollout for item in resumed.finished()] == [rollout(1)] and resumed.cursor == 0
        resumed.enqueue([rollout(2)])
        resumed.forget_unasked()
        assert resumed.cursor == 2
        assert [item.rollout for item in resumed.finished()] == [rollout(2)] and resumed.cursor == 3


def test_another_runs_episodes_are_not_taken_in(tmp_path: Path) -> None:
    with serving(FakeModel(), episodes=tmp_path) as server:
        mine, other = (RolloutQueue(server.address, run=run) for run in ("mine", "other"))
        other.enqueue([rollout(0, "other")])
        assert work(server) == "other/0/0"
        mine.enqueue([rollout(0, "mine")])
        assert work(server) == "mine/0/0"
        assert [item.rollout.rollout_id for item in mine.finished()] == ["mine/0/0"]


def test_a_rollout_that_fails_three_times_comes_in_without_an_episode(tmp_path: Path) -> None:
    with serving(FakeModel(), episodes=tmp_path) as server:
        queue = RolloutQueue(server.address, run="run")
        queue.enqueue([rollout(0)])
        for _ in range(3):
            work(server, outcome=episode_pb2.OUTCOME_ERROR)
        (item,) = queue.finished()
        assert item.episode is None and item.errors == ("it broke",) * 3


def test_work_that_nobody_takes_is_spoken_of_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(rollouts, "LOOK_S", 0.05)
    monkeypatch.setattr(rollout_client, "NOBODY_S", 0.2)
    with serving(FakeModel(), episodes=tmp_path) as server:
        queue = RolloutQueue(server.address, run="run")
        queue.enqueue([rollout(0)])
        threading.Timer(1.0, work, (server,)).start()
        assert len(list(queue.finished())) == 1
        assert capsys.readouterr().out.count(f"nobody takes the 1 rollouts that wait at {server.address}") == 1


def test_what_was_set_aside_may_be_asked_for_by_the_runs_next_life(tmp_path: Path) -> None:
    with serving(FakeModel(), episodes=tmp_path) as server:
        RolloutQueue(server.address, run="run").enqueue([rollout(0), rollout(1)])
        assert work(server) == "run/0/0"
        for _ in range(3):
            work(server, outcome=episode_pb2.OUTCOME_ERROR)
        queue = RolloutQueue(server.address, run="run")
        queue.forgive()
        queue.enqueue([rollout(0), rollout(1)])
        assert work(server) == "run/0/1", "and what is done stays done"
        assert all(item.episode is not None for item in queue.finished())


def test_what_a_restarted_server_forgot_is_asked_for_again(tmp_path: Path) -> None:
    with serving(FakeModel(), store=EpisodeStore(tmp_path)) as server:
        port = int(server.address.rpartition(":")[2])
        queue = RolloutQueue(server.address, run="run")
        queue.enqueue([rollout(number) for number in range(3)])
        assert work(server) == "run/0/0"
    with serving(FakeModel(), store=EpisodeStore(tmp_path), port=port) as server, worker(server):
        finished = list(queue.finished())
    assert sorted(item.rollout.initial_state for item in finished) == ["0", "1", "2"]


def test_a_server_that_stays_away_is_given_up(tmp_path: Path) -> None:
    with serving(FakeModel(), episodes=tmp_path) as server:
        address = server.address
    with pytest.raises(ServerGone, match="has been away for 1 s"):
        RolloutQueue(address, run="run", patience_s=1.0).enqueue([rollout(0)])


def test_a_server_without_a_store_refuses_work() -> None:
    with serving(FakeModel()) as server, pytest.raises(ValueError, match="--episodes"):
        RolloutQueue(server.address, run="run").enqueue([rollout(0)])
