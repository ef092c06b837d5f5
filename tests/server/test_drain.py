"""The way out: no new episodes from its first moment, open ones to their end or the drain's, then a clean stop."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import admin_pb2, admin_pb2_grpc, episode_pb2, policy_pb2_grpc, rollout_pb2
from protos.episode_file import read_episode
from tests.server import messages
from tests.server.fake_admin import FakeWeights, administered
from tests.server.fake_model import FakeModel
from tests.server.rude_client import RudeClient
from tests.server.running import RunningServer, eventually, serving

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def health(running: RunningServer) -> int:
    return health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest()).status


def status(stub) -> admin_pb2.ServerStatus:
    return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=20)


def drain(stub, within_s: float) -> int:
    return stub.Drain(admin_pb2.DrainRequest(within_s=within_s), timeout=20).open_episodes


def code(call, *args) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call(*args, timeout=20)
    return error.value.code()


def drained(running: RunningServer):
    """The end of the drain, to wait for."""
    return asyncio.run_coroutine_threadsafe(running.server.drained(), running.loop)


def test_a_status_says_how_the_server_is():
    model = FakeWeights()
    with administered(model, warm=False, queue=9) as (running, stub):
        assert status(stub).state == admin_pb2.SERVER_STATE_WARMING
        asyncio.run_coroutine_threadsafe(running.server.warm_up(), running.loop).result(20)
        for outcome in (episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE, episode_pb2.OUTCOME_SUCCESS):
            episode_id = running.policy.StartEpisode(messages.start()).episode_id
            running.policy.EndEpisode(messages.end(episode_id, outcome=outcome))
        model.gate.clear()
        episodes = [running.policy.StartEpisode(messages.start()).episode_id for _ in range(2)]
        in_model = running.policy.Act.future(messages.act(episodes[0], 0))
        eventually(lambda: model.batches)
        waiting = running.policy.Act.future(messages.act(episodes[1], 0))
        eventually(lambda: running.server.waiting == 1)
        now = status(stub)
        model.gate.set()
        assert in_model.result(5) and waiting.result(5)
    assert (now.state, now.model, now.live_version) == (admin_pb2.SERVER_STATE_SERVING, "fake", 0)
    assert (now.open_episodes, now.waiting, now.queue) == (2, 1, 9)
    assert (now.successes, now.failures, now.errors) == (2, 1, 0)
    assert 0 < now.uptime_s < 60 and not now.HasField("drain_left_s")


def test_a_drain_takes_no_new_episode_and_lets_those_there_are_come_to_their_end():
    with administered() as (running, stub):
        episode_id = running.policy.StartEpisode(messages.start()).episode_id
        running.policy.Act(messages.act(episode_id, 0))
        over = drained(running)
        assert drain(stub, 60) == 1
        assert health(running) == NOT_SERVING
        assert code(running.policy.StartEpisode, messages.start()) == UNAVAILABLE
        now = status(stub)
        assert (now.state, now.open_episodes) == (admin_pb2.SERVER_STATE_DRAINING, 1) and 0 < now.drain_left_s <= 60
        assert running.policy.Act(messages.act(episode_id, 1)).HasField("chunk")
        replies = running.policy.ActStream(iter([messages.act(episode_id, 2)]))
        assert [reply.HasField("chunk") for reply in replies] == [True]
        assert not over.done()
        running.policy.EndEpisode(messages.end(episode_id))
        over.result(10)
        assert status(stub).successes == 1


def test_an_episode_that_outlasts_the_drain_is_closed_as_an_error(tmp_path):
    with administered(episodes=tmp_path) as (running, stub):
        running.policy.StartEpisode(messages.start())
        began_s = time.monotonic()
        drain(stub, 0.5)
        drained(running).result(10)
        assert time.monotonic() - began_s >= 0.5 and status(stub).open_episodes == 1
    (path,) = tmp_path.glob("*.episode")
    assert read_episode(path).end.message == "the server stopped"


def test_a_later_drain_sets_the_time_anew():
    with administered() as (running, stub):
        running.policy.StartEpisode(messages.start())
        over = drained(running)
        drain(stub, 3600)
        assert drain(stub, 0) == 1
        over.result(10)


def test_work_is_neither_given_out_nor_taken_in_while_episodes_under_a_lease_go_on(tmp_path):
    with administered(episodes=tmp_path) as (running, stub):
        enqueue = rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout("r/0"), messages.rollout("r/1")])
        running.rollouts.EnqueueRollouts(enqueue)
        wish = rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"])
        lease = running.rollouts.LeaseRollout(wish)
        opened = running.policy.StartEpisode(messages.start(lease_id=lease.lease_id))
        parts = running.rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(follow=True))
        assert next(parts).sequence == 0
        waiting = running.rollouts.LeaseRollout.future(
            rollout_pb2.LeaseRolloutRequest(worker="v", can_run=["other/*"], wait_ms=30_000)
        )
        eventually(lambda: running.server._rollouts._waiting)
        drain(stub, 60)
        assert waiting.exception(5).code() == UNAVAILABLE
        assert code(running.rollouts.LeaseRollout, wish) == UNAVAILABLE
        assert code(running.rollouts.EnqueueRollouts, enqueue) == UNAVAILABLE
        assert running.rollouts.RenewLease(rollout_pb2.RenewLeaseRequest(lease_id=lease.lease_id)).held
        running.policy.EndEpisode(messages.end(opened.episode_id))
        assert [part.sequence for part in itertools.islice(parts, 2)] == [1, 1]  # a trainer still reads
        assert running.rollouts.GetQueue(rollout_pb2.GetQueueRequest()).done == 1


@pytest.mark.parametrize("within_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_a_time_that_is_none_is_refused_and_nothing_is_drained(within_s):
    with administered() as (running, stub):
        with pytest.raises(grpc.RpcError, match=r"within_s: must be in 0\.\.86400, got") as error:
            drain(stub, within_s)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert health(running) == SERVING and status(stub).state == admin_pb2.SERVER_STATE_SERVING


def test_a_server_that_is_drained_before_it_is_warm_never_serves():
    with administered(warm=False) as (running, stub):
        assert drain(stub, 60) == 0
        asyncio.run_coroutine_threadsafe(running.server.warm_up(), running.loop).result(20)
        assert health(running) == NOT_SERVING
        assert code(running.policy.StartEpisode, messages.start()) == UNAVAILABLE
        drained(running).result(10)


def test_one_who_watches_and_does_not_read_holds_up_neither_a_drain_nor_a_stop():
    with serving(FakeModel()) as running, RudeClient(running.address, window=0) as rude:
        call = rude.call("/grpc.health.v1.Health/Watch")
        rude.send(call, b"", end=True)
        eventually(lambda: running.server._calls._open)
        draining = asyncio.run_coroutine_threadsafe(running.server.drain(0), running.loop)
        assert draining.result(10) == 0


class Process:
    """A server of its own, with an open episode and its stream."""

    def __init__(self, model, folder, *options: str):
        command = [
            sys.executable,
            "-m",
            "policy_server",
            "serve",
            "--port",
            "0",
            "--admin-port",
            "0",
            "--max-batch",
            "2",
        ]
        command += ["--model", str(model), "--episodes", str(folder), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.channel, self.admin_channel = (
            grpc.insecure_channel(self.process.stdout.readline().split()[1]) for _ in range(2)
        )
        self.policy = policy_pb2_grpc.PolicyStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.admin_channel)
        self.episode_id = self.policy.StartEpisode(messages.start(), timeout=20).episode_id

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.admin_channel.close()
        self.process.kill()
        self.process.wait(20)

    def drains(self) -> bool:
        return status(self.admin).state == admin_pb2.SERVER_STATE_DRAINING


def outcomes(folder) -> list[int]:
    return [read_episode(path).end.outcome for path in folder.glob("*.episode")]


@pytest.mark.parametrize("how", ["Drain", "SIGTERM"])
def test_a_process_waits_for_its_episodes_and_then_ends_with_code_0(tiny_vla, tmp_path, how):
    with Process(tiny_vla, tmp_path, "--drain-s", "120") as server:
        if how == "Drain":
            assert drain(server.admin, 120) == 1
        else:
            server.process.send_signal(signal.SIGTERM)
        eventually(server.drains)
        assert code(server.policy.StartEpisode, messages.start()) == UNAVAILABLE
        assert server.process.poll() is None
        server.policy.EndEpisode(messages.end(server.episode_id), timeout=20)
        assert server.process.wait(60) == 0
    assert outcomes(tmp_path) == [episode_pb2.OUTCOME_SUCCESS]


def test_a_second_signal_does_not_wait(tiny_vla, tmp_path):
    with Process(tiny_vla, tmp_path, "--drain-s", "3600") as server:
        server.process.send_signal(signal.SIGINT)
        eventually(server.drains)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    assert outcomes(tmp_path) == [episode_pb2.OUTCOME_ERROR]
