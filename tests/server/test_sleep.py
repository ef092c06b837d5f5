"""Sleep and Wake: the weights leave their device and come back as they were; meanwhile nothing is taken."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from policy_server.batcher import DecodeRequest
from policy_server.config import ServeConfig
from policy_server.errors import InternalFault, Overloaded, Unavailable
from policy_server.loading import opened
from policy_server.observation import Observed
from policy_server.remote_model import _Process
from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint, weights_fingerprint
from protos import admin_pb2, admin_pb2_grpc, rollout_pb2
from protos.codec import decode_tensor, encode_tensor
from tests.server import messages
from tests.server.fake_admin import FakeWeights, administered
from tests.server.fake_model import ACTIONS, CHUNK
from tests.server.publishing import LORA, act, adapter, publication, publish, scored, start
from tests.server.running import RunningServer, eventually, serving
from tests.server.test_remote_model import children

EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
SLEEP, WAKE = admin_pb2.SleepRequest(), admin_pb2.WakeRequest()
CPUS = ("cpu", "cpu")


def state(stub) -> int:
    return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=20).state


def serves(running: RunningServer) -> bool:
    status = health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest()).status
    return status == health_pb2.HealthCheckResponse.SERVING


def refused(call, request) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    return error.value.code(), error.value.details()


def test_a_server_that_sleeps_takes_nothing_until_it_wakes():
    with administered() as (running, stub):
        assert serves(running)
        for _ in range(2):  # one that sleeps sleeps on
            stub.Sleep(SLEEP, timeout=20)
            assert running.model.asleep and not serves(running)
            assert state(stub) == admin_pb2.SERVER_STATE_ASLEEP
        tokens = encode_tensor(np.full(CHUNK * ACTIONS, 999, np.int32))
        probe = admin_pb2.Probe(observation=messages.observation(), token_ids=tokens)
        for call, request in (
            (running.policy.StartEpisode, messages.start()),
            (stub.PublishWeights, publication("f" * 64, b"weights")),
            (stub.SetLive, admin_pb2.SetLiveRequest(version=0)),
            (stub.ScoreProbe, admin_pb2.ScoreProbeRequest(temperature=1, probes=[probe])),
        ):
            code, said = refused(call, request)
            assert code == UNAVAILABLE and "asleep" in said
        for _ in range(2):
            stub.Wake(WAKE, timeout=20)
            assert serves(running) and not running.model.asleep
            assert state(stub) == admin_pb2.SERVER_STATE_SERVING
        episode_id = running.policy.StartEpisode(messages.start()).episode_id
        assert running.policy.Act(messages.act(episode_id, 0), timeout=20).chunk.version == 0


def test_it_does_not_sleep_while_an_episode_is_open():
    with administered() as (running, stub):
        episode_id = running.policy.StartEpisode(messages.start()).episode_id
        assert refused(stub.Sleep, SLEEP) == (EXHAUSTED, "1 episodes are at work, and must end first")
        assert serves(running) and not running.model.asleep
        other_id = running.policy.StartEpisode(messages.start()).episode_id  # it serves on
        for each in (episode_id, other_id):
            running.policy.EndEpisode(messages.end(each))
        stub.Sleep(SLEEP, timeout=20)
        assert running.model.asleep


def test_those_at_work_may_end_within_a_time_in_which_only_their_like_begin(tmp_path):
    """An open episode, and a lease whose episode begins in that time."""
    with administered(episodes=tmp_path) as (running, stub):
        running.rollouts.EnqueueRollouts(
            rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout(f"r/{n}") for n in range(2)])
        )
        wish = rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"])
        lease = running.rollouts.LeaseRollout(wish)
        open_id = running.policy.StartEpisode(messages.start()).episode_id
        going = stub.Sleep.future(admin_pb2.SleepRequest(within_s=60))
        eventually(lambda: running.server._rollouts._asleep)
        assert refused(running.policy.StartEpisode, messages.start())[0] == UNAVAILABLE
        assert not running.rollouts.LeaseRollout(wish).lease_id
        leased_id = running.policy.StartEpisode(messages.start(lease_id=lease.lease_id)).episode_id
        for each in (open_id, leased_id):
            assert running.policy.Act(messages.act(each, 0), timeout=20).chunk.version == 0
            assert not going.done() and not running.model.asleep
            running.policy.EndEpisode(messages.end(each))
        going.result(20)
        assert running.model.asleep
        queue = running.rollouts.GetQueue(rollout_pb2.GetQueueRequest())
        assert (queue.done, queue.waiting, list(queue.set_aside)) == (1, 1, [])


def test_an_episode_whose_lease_is_lost_is_not_waited_for(tmp_path):
    with administered(episodes=tmp_path, lease_s=0.2) as (running, stub):
        running.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout("r/0")]))
        lease = running.rollouts.LeaseRollout(rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"]))
        lost_id = running.policy.StartEpisode(messages.start(lease_id=lease.lease_id)).episode_id
        stub.Sleep(admin_pb2.SleepRequest(within_s=60), timeout=20)
        assert refused(running.policy.Act, messages.act(lost_id, 0))[0] == UNAVAILABLE


def test_a_drain_does_not_wait_for_a_server_that_is_about_to_sleep():
    with administered() as (running, stub):
        running.policy.StartEpisode(messages.start())
        going = stub.Sleep.future(admin_pb2.SleepRequest(within_s=3600))
        eventually(lambda: running.server._rollouts._asleep)
        stub.Drain(admin_pb2.DrainRequest(within_s=0), timeout=20)
        assert going.exception(20).code() == UNAVAILABLE
        assert not running.model.asleep
        assert refused(running.policy.StartEpisode, messages.start())[0] == UNAVAILABLE


@pytest.mark.parametrize("within_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_a_time_that_is_none_is_refused(within_s):
    with administered() as (running, stub):
        code, said = refused(stub.Sleep, admin_pb2.SleepRequest(within_s=within_s))
        assert code == grpc.StatusCode.INVALID_ARGUMENT and said.startswith("within_s: must be in 0..86400, got")
        assert serves(running)


def test_it_does_not_sleep_before_it_is_warm():
    with administered(warm=False) as (running, stub):
        assert refused(stub.Sleep, SLEEP) == (UNAVAILABLE, "the model is warming up")
        assert not running.model.asleep
        asyncio.run_coroutine_threadsafe(running.server.warm_up(), running.loop).result(20)
        assert serves(running)


def test_where_the_device_has_no_room_it_sleeps_on():
    with administered() as (running, stub):
        stub.Sleep(SLEEP, timeout=20)
        running.model.no_room = True
        assert refused(stub.Wake, WAKE) == (EXHAUSTED, "the device has no room for the weights")
        assert state(stub) == admin_pb2.SERVER_STATE_ASLEEP and not serves(running)
        running.model.no_room = False
        stub.Wake(WAKE, timeout=20)
        assert serves(running)


def test_a_model_that_fails_to_lie_down_serves_on():
    class Restless(FakeWeights):
        def sleep(self) -> int:
            raise MemoryError("the host has no room")

    with administered(Restless()) as (running, stub):
        assert refused(stub.Sleep, SLEEP)[0] == grpc.StatusCode.INTERNAL
        assert serves(running) and state(stub) == admin_pb2.SERVER_STATE_SERVING
        episode_id = running.policy.StartEpisode(messages.start()).episode_id
        assert running.policy.Act(messages.act(episode_id, 0), timeout=20).chunk.version == 0


def test_rollouts_are_taken_in_and_handed_out_when_it_wakes(tmp_path):
    with administered(episodes=tmp_path) as (running, stub):
        stub.Sleep(SLEEP, timeout=20)
        waiting = running.rollouts.LeaseRollout.future(
            rollout_pb2.LeaseRolloutRequest(worker="w", can_run=["fake/*"], wait_ms=30_000)
        )
        eventually(lambda: running.server._rollouts._waiting)
        running.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[messages.rollout("r/0")]))
        wish = rollout_pb2.LeaseRolloutRequest(worker="v", can_run=["fake/*"])
        assert not running.rollouts.LeaseRollout(wish).lease_id and not waiting.done()
        stub.Wake(WAKE, timeout=20)
        assert waiting.result(10).rollout.rollout_id == "r/0"


def test_a_server_that_drains_stays_closed_when_it_wakes():
    with administered() as (running, stub):
        stub.Sleep(SLEEP, timeout=20)
        assert stub.Drain(admin_pb2.DrainRequest(within_s=60)).open_episodes == 0
        stub.Wake(WAKE, timeout=20)
        assert not serves(running)
        assert refused(running.policy.StartEpisode, messages.start())[0] == UNAVAILABLE


@pytest.fixture(scope="module", params=[(), CPUS], ids=["in this process", "in two others"])
def model(request, tiny_vla) -> Iterator:
    with opened(ServeConfig(model=str(tiny_vla), devices=request.param)) as model:
        yield model


def test_answers_of_every_version_are_as_before(model, tiny_vla: Path, tmp_path: Path):
    """Of the base, of a whole model that shares most of it, of an adapter; and of one that is published afterwards."""
    base = load_checkpoint(tiny_vla).model
    fingerprint = weights_fingerprint(base)
    store = VersionStore(None, first=model.fingerprint(model.first))
    with (
        serving(model, max_batch=4, queue=64, versions=store, admin_port=0) as server,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        admin = admin_pb2_grpc.AdminStub(channel)
        publish(admin, base, 0.5)
        _, data, config = adapter(load_checkpoint(tiny_vla).model, tmp_path / "adapter")
        admin.PublishWeights(publication(fingerprint, data, kind=LORA, adapter_config=config), timeout=60)

        def answers() -> list[tuple[bytes, np.ndarray]]:
            chunks = []
            for version in (0, 1, 2):
                episode_id = start(server, version=version).episode_id
                chunks.append(act(server, episode_id))
                server.policy.EndEpisode(messages.end(episode_id))
            return [(chunk.token_ids.data, decode_tensor(chunk.token_logprobs)) for chunk in chunks]

        before = answers()
        for _ in range(2):
            assert admin.Sleep(SLEEP, timeout=60).bytes > 10_000
            admin.Wake(WAKE, timeout=60)
            for (tokens, logprobs), (tokens_before, logprobs_before) in zip(answers(), before, strict=True):
                assert tokens == tokens_before
                np.testing.assert_array_equal(logprobs, logprobs_before)
        assert model.fingerprint(model.first) == fingerprint
        version = publish(admin, base, 0.25).version
        tokens_N = np.frombuffer(before[0][0], np.int32)
        assert not np.array_equal(scored(admin, version, tokens_N), scored(admin, 1, tokens_N))


def test_what_sleeps_takes_no_memory_on_the_device_and_computes_nothing(tiny_vla: Path, tmp_path: Path):
    with opened(ServeConfig(model=str(tiny_vla))) as model:
        adapter(load_checkpoint(tiny_vla).model, tmp_path / "adapter")
        adapted = model.build(tmp_path / "adapter", "lora")
        request = model._example()
        model.decode([request, request], [model.first, adapted])
        # On a CPU, tensors that nobody has laid out anew are still the checkpoint's file, mapped into memory.
        storages = [tensor.untyped_storage() for tensor in adapted.tensors if tensor.untyped_storage().resizable()]
        awake = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert len(awake) >= 5  # the adapter's, and q, k, v and gate, up of two layers
        assert model.sleep() == sum(awake.values())
        assert not any(storage.nbytes() for storage in storages)
        assert model._adapters._batch is None
        with pytest.raises(Unavailable, match="asleep"):
            model.decode([request], [adapted])
        with pytest.raises(Unavailable, match="asleep"):
            model.score([request.prepared], np.zeros((1, 1), np.int32), 1.0, model.first)
        model.wake()
        assert sorted({s.data_ptr(): s.nbytes() for s in storages}.values()) == sorted(awake.values())


def test_a_wake_that_fails_half_way_leaves_the_device_empty_and_may_be_tried_again(tiny_vla: Path, monkeypatch):
    with opened(ServeConfig(model=str(tiny_vla))) as model:
        request = model._example()
        (before,) = model.decode([request], [model.first])
        storages = [t.untyped_storage() for t in model.first.tensors if t.untyped_storage().resizable()]
        model.sleep()

        def fail(weights: object) -> None:
            assert any(storage.nbytes() for storage in storages)
            raise RuntimeError("CUDA error: out of memory")

        with monkeypatch.context() as patch, pytest.raises(Overloaded, match="has no room for the weights"):
            patch.setattr(model, "_capture", fail)
            model.wake()
        assert not any(storage.nbytes() for storage in storages)
        with pytest.raises(Unavailable, match="asleep"):
            model.decode([request], [model.first])
        model.wake()
        (after,) = model.decode([request], [model.first])
        np.testing.assert_array_equal(after.token_logprobs_N, before.token_logprobs_N)


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_of_two_processes_neither_is_left_in_another_state_than_the_other(tiny_vla: Path, monkeypatch, what: str):
    with opened(ServeConfig(model=str(tiny_vla), devices=CPUS)) as model:
        observed = Observed(
            images={"agentview": np.zeros((40, 48, 3), np.uint8)}, state_S=np.zeros(8, np.float32), instruction="pick"
        )
        request = DecodeRequest(prepared=model.prepare(observed), version=0, temperature=0.0, seed=0, decision=0)
        if what == "wake":
            model.sleep()
        change, second = _Process.change, model._processes[1]

        def fail(process: _Process, asked: str, *args):
            if process is second and asked == what:
                raise InternalFault("no room")
            return change(process, asked, *args)

        with monkeypatch.context() as patch, pytest.raises(InternalFault, match="no room"):
            patch.setattr(_Process, "change", fail)
            getattr(model, what)()
        for lane in (0, 1):
            if what == "sleep":
                assert len(model.decode([request], [model.first], lane)) == 1
            else:
                with pytest.raises(Unavailable, match="asleep"):
                    model.decode([request], [model.first], lane)


def test_an_engine_that_dies_in_its_sleep_ends_the_server(tiny_vla: Path, tmp_path: Path):
    line = [sys.executable, "-m", "policy_server", "serve", "--port", "0", "--admin-port", "0", "--devices", "cpu"]
    server = subprocess.Popen([*line, "--model", str(tiny_vla)], stdout=subprocess.PIPE, text=True)
    try:
        server.stdout.readline()
        with grpc.insecure_channel(server.stdout.readline().split()[1]) as channel:
            admin_pb2_grpc.AdminStub(channel).Sleep(SLEEP, timeout=60)
        (engine,) = children(server.pid)
        os.kill(engine, signal.SIGKILL)
        assert server.wait(60) == 1
    finally:
        server.kill()
