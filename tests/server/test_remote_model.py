"""The model in processes of its own: it answers as one in this process, and its death is told."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from policy_server.config import ServeConfig
from policy_server.errors import BadRequest, CannotStart, EngineGone, InternalFault
from policy_server.loading import load, opened
from policy_server.remote_model import FIRST, RemoteModel, _Process
from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint, weights_fingerprint
from protos import admin_pb2_grpc, policy_pb2, policy_pb2_grpc
from protos.codec import decode_tensor
from tests.server import messages
from tests.server.publishing import LORA, act, adapter, listed, publication, publish, scored, start
from tests.server.running import RunningServer, eventually, serving
from tests.server.test_served_vla import observation


@pytest.fixture(scope="module")
def remote(tiny_vla: Path) -> Iterator[RemoteModel]:
    with opened(ServeConfig(model=str(tiny_vla), devices=("cpu", "cpu"))) as model:
        assert isinstance(model, RemoteModel)
        yield model


@pytest.fixture
def server(remote: RemoteModel) -> Iterator[RunningServer]:
    store = VersionStore(None, first=remote.fingerprint(remote.first))
    with serving(remote, max_batch=4, queue=64, versions=store, admin_port=0) as running:
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[admin_pb2_grpc.AdminStub]:
    with grpc.insecure_channel(server.admin_address) as channel:
        yield admin_pb2_grpc.AdminStub(channel)


def test_it_is_the_model_that_it_loaded(remote, tiny_vla):
    local = load(ServeConfig(model=str(tiny_vla)))
    assert (remote.spec, remote.max_weights_bytes) == (local.spec, local.max_weights_bytes)
    assert remote.fingerprint(remote.first) == local.fingerprint(local.first)


def test_either_lane_answers_as_a_model_in_this_process(server, tiny_vla):
    with serving(load(ServeConfig(model=str(tiny_vla)))) as local:
        expected = [act(local, start(local).episode_id, number=number) for number in range(6)]

    def ask(number: int):
        return act(server, start(server).episode_id, number=number)

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, range(6)))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(decode_tensor(ours.token_logprobs), decode_tensor(theirs.token_logprobs), atol=5e-5)


def test_passes_of_two_lanes_run_beside_each_other(remote, tiny_vla, monkeypatch):
    """Both are asked before either has answered."""
    asked: list[int] = []
    decode = RemoteModel.decode

    def meet(self, requests, weights, lane=0):
        asked.append(lane)
        eventually(lambda: {0, 1} <= {*asked})
        return decode(self, requests, weights, lane)

    monkeypatch.setattr(RemoteModel, "decode", meet)
    with serving(remote, max_batch=4, max_wait_ms=0) as server, ThreadPoolExecutor(2) as pool:
        episodes = [start(server).episode_id for _ in range(2)]
        assert len(list(pool.map(lambda episode: act(server, episode), episodes))) == 2


def test_what_is_published_is_built_by_every_lane(server, admin, tiny_vla, tmp_path):
    base = load_checkpoint(tiny_vla).model
    fingerprint = weights_fingerprint(base)
    publish(admin, base, 0.5)
    learner, data, config = adapter(base, tmp_path / "adapter")
    reply = admin.PublishWeights(publication(fingerprint, data, kind=LORA, adapter_config=config), timeout=60)
    assert reply.device_fingerprint == weights_fingerprint(learner)
    assert len({info.device_fingerprint for info in listed(admin).versions}) == 3
    for version in (1, 2, 0) * 3:
        chunk = act(server, start(server, version=version).episode_id)
        tokens = decode_tensor(chunk.token_ids)
        assert chunk.version == version
        np.testing.assert_allclose(scored(admin, version, tokens), decode_tensor(chunk.token_logprobs), atol=5e-5)


def test_weights_go_with_their_key(remote, tmp_path, tiny_vla):
    adapter(load_checkpoint(tiny_vla).model, tmp_path)
    key = remote.build(tmp_path, "lora")
    request = remote.prepare, key.number
    number = key.number
    del key, request
    gc.collect()
    remote._processes[1].change("fingerprint", FIRST)
    with pytest.raises(InternalFault, match="the model failed to fingerprint"):
        remote._processes[1].change("fingerprint", number)


def test_bad_weights_are_the_same_refusal(remote, tmp_path):
    with pytest.raises(BadRequest, match="not a readable adapter"):
        remote.build(tmp_path, "lora")


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with (
        pytest.raises(CannotStart, match="cannot serve the model"),
        opened(ServeConfig(model=str(tmp_path), devices=("cpu", "cpu"))),
    ):
        pass


def test_when_a_process_dies_the_server_says_so_and_stops(tiny_vla, tmp_path):
    line = [sys.executable, "-m", "policy_server", "serve", "--port", "0", "--model", str(tiny_vla)]
    line += ["--devices", "cpu", "--episodes", str(tmp_path)]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[1]
        (engine,) = children(server.pid)
        with grpc.insecure_channel(address) as channel:
            policy = policy_pb2_grpc.PolicyStub(channel)
            episode_id = policy.StartEpisode(messages.start()).episode_id
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(grpc.RpcError) as refused:
                policy.Act(policy_pb2.ActRequest(episode_id=episode_id, observation=observation(0)), timeout=30)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        _, said = server.communicate(timeout=60)
        assert server.returncode == 1 and "the process that ran the model died" in said
        assert len(list(tmp_path.glob("*.episode"))) == 1
    finally:
        server.kill()


def children(pid: int) -> list[int]:
    """Of a process, those that are engines."""
    listed = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [child for child in listed if parent(child) == pid and "spawn_main" in line_of(child)]


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def line_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_weights_that_one_process_cannot_build_are_left_in_none(remote, tmp_path, tiny_vla, monkeypatch):
    adapter(load_checkpoint(tiny_vla).model, tmp_path)
    change, first = _Process.change, remote._processes[0]
    numbers: list[int] = []

    def fail(process: _Process, what: str, *args):
        if what == "build":
            numbers.append(args[0])
            if process is first:
                raise InternalFault("no room")
        return change(process, what, *args)

    with monkeypatch.context() as patch, pytest.raises(InternalFault, match="no room"):
        patch.setattr(_Process, "change", fail)
        remote.build(tmp_path, "lora")
    assert len({*numbers}) == 1
    with pytest.raises(InternalFault, match="the model failed to fingerprint"):
        remote._processes[1].change("fingerprint", numbers[0])


def test_a_proof_is_of_every_device(remote, monkeypatch):
    change, second = _Process.change, remote._processes[1]
    monkeypatch.setattr(
        _Process, "change", lambda self, what, *args: "another" if self is second else change(self, what, *args)
    )
    with pytest.raises(InternalFault, match="different weights"):
        remote.fingerprint(remote.first)


def test_a_gone_process_is_one_error_whatever_it_is_asked(tiny_vla):
    with opened(ServeConfig(model=str(tiny_vla), devices=("cpu",))) as model:
        model._processes[0]._process.kill()
        with pytest.raises(EngineGone):
            model.warm_up()
