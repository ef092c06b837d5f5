"""The Admin service on real sockets: weights in, pinned episodes, and versions that outlive a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from policy_server.config import ServeConfig
from policy_server.loading import load
from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint, weights_fingerprint
from policy_server.vla.lora import load_lora, lora_tensors
from protos import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc
from protos.codec import decode_tensor, encode_tensor
from tests.server import messages
from tests.server.publishing import FULL, LORA, act, adapter, listed, moved, publication, publish, scored, start
from tests.server.running import eventually, serving
from tests.server.test_served_vla import observation


def test_full_weights_become_a_version_whose_tensors_are_proved(admin_server, admin, base):
    reply = publish(admin, base, 0.5, set_live=True)
    base.load_state_dict({**base.state_dict(), **moved(base, 0.5)})
    assert (reply.version, reply.device_fingerprint) == (1, weights_fingerprint(base))
    versions = listed(admin)
    assert versions.live == 1
    first, published = versions.versions
    assert (first.version, first.kind, first.device_fingerprint) == (
        0,
        0,
        admin_server.model.fingerprint(admin_server.model.first),
    )
    assert (published.version, published.parent, published.kind, published.note) == (1, 0, FULL, "a test")
    assert published.device_fingerprint == reply.device_fingerprint and published.published_unix_ns > 0
    spec = admin_server.policy.GetSpec(policy_pb2.GetSpecRequest())
    assert (spec.live_version, list(spec.versions)) == (1, [0, 1])


def test_an_adapter_becomes_a_version_equal_to_the_learners(admin_server, admin, base, tmp_path):
    fingerprint = weights_fingerprint(base)
    learner, data, config = adapter(base, tmp_path / "adapter")
    reply = admin.PublishWeights(publication(fingerprint, data, kind=LORA, adapter_config=config), timeout=60)
    assert reply.device_fingerprint == weights_fingerprint(learner) != fingerprint
    assert listed(admin).live == 0  # nobody asked for more


def test_a_version_answers_with_its_own_weights(admin_server, admin, base):
    publish(admin, base, 0.5)
    chunks = [act(admin_server, start(admin_server, version=version).episode_id) for version in (0, 1)]
    assert [chunk.version for chunk in chunks] == [0, 1]
    for chunk in chunks:
        tokens, logprobs = decode_tensor(chunk.token_ids), decode_tensor(chunk.token_logprobs)
        np.testing.assert_allclose(scored(admin, chunk.version, tokens), logprobs, atol=5e-5)
        assert np.abs(scored(admin, 1 - chunk.version, tokens) - logprobs).max() > 1e-2


def test_a_probe_is_scored_at_its_temperature_and_in_any_number(admin_server, admin, base):
    config = base.config
    tokens = np.arange(config.action_begin, config.action_begin + config.action_tokens, dtype=np.int32)
    probes = [admin_pb2.Probe(observation=observation(i), token_ids=encode_tensor(tokens)) for i in range(11)]
    reply = admin.ScoreProbe(admin_pb2.ScoreProbeRequest(probes=probes, temperature=2.0), timeout=60)
    together = decode_tensor(reply.token_logprobs, dtype="float32", shape=(11, config.action_tokens))
    alone = np.stack([scored(admin, 0, tokens, i, temperature=2.0) for i in range(11)])
    np.testing.assert_allclose(together, alone, atol=5e-5)
    assert np.abs(together[3] - scored(admin, 0, tokens, 3, temperature=1.0)).max() > 1e-2


def test_an_episode_stays_with_its_version_while_live_moves(admin_server, admin, base):
    pinned, following = start(admin_server).episode_id, start(admin_server, follow_live=True).episode_id
    versions = [(act(admin_server, pinned, 0).version, act(admin_server, following, 0).version)]
    publish(admin, base, 0.5, set_live=True)
    versions.append((act(admin_server, pinned, 1).version, act(admin_server, following, 1).version))
    assert start(admin_server).version == 1
    assert admin.SetLive(admin_pb2.SetLiveRequest(version=0), timeout=30).previous == 1
    versions.append((act(admin_server, pinned, 2).version, act(admin_server, following, 2).version))
    assert versions == [(0, 0), (0, 1), (0, 0)]
    assert [info.open_episodes for info in listed(admin).versions] == [2, 1]


def test_an_episode_of_a_version_that_is_no_longer_held_gets_it_back(admin_server, admin, base):
    for by in (0.1, 0.2, 0.3, 0.4):
        publish(admin, base, by)
    versions = admin_server.server._versions
    assert not versions.holds(1)
    opened = start(admin_server, version=1)
    assert versions.holds(1)  # before the robot asks for anything
    chunk = act(admin_server, opened.episode_id)
    tokens = decode_tensor(chunk.token_ids)
    assert chunk.version == 1
    np.testing.assert_allclose(scored(admin, 1, tokens), decode_tensor(chunk.token_logprobs), atol=5e-5)


def test_robots_are_answered_while_weights_come_in_each_by_the_version_of_its_episode(admin_server, admin, base):
    done, seen = threading.Event(), []

    def robot(number: int) -> int:
        answered = 0
        while not done.is_set():
            opened = start(admin_server)
            for decision in range(3):
                chunk = act(admin_server, opened.episode_id, decision, number)
                seen.append((opened.version, chunk.version, decision))
                tokens = decode_tensor(chunk.token_ids)
                truth = scored(admin, opened.version, tokens, number)
                np.testing.assert_allclose(decode_tensor(chunk.token_logprobs), truth, atol=5e-5)
                answered += 1
            admin_server.policy.EndEpisode(messages.end(opened.episode_id), timeout=30)
        return answered

    with ThreadPoolExecutor(4) as robots:
        calls = [robots.submit(robot, number) for number in range(4)]
        try:
            for step in range(6):
                version = publish(admin, base, 0.1 * (step + 1), set_live=True).version
                eventually(lambda version=version: any(answered == version for _, answered, _ in seen), within_s=60)
        finally:
            done.set()
        assert all(call.result(60) >= 3 for call in calls)
    assert all(opened == answered for opened, answered, _ in seen)


def test_reflection_on_the_admin_port_names_its_service_and_not_the_robots(admin_server):
    with grpc.insecure_channel(admin_server.admin_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in reply.list_services_response.service}
    assert "vla_rl.Admin" in names and "vla_rl.Policy" not in names


def test_robots_cannot_publish_on_their_own_port(admin_server, base):
    with pytest.raises(grpc.RpcError) as error:
        publish(admin_pb2_grpc.AdminStub(admin_server.channel), base, 1.0)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_published_weights_are_over_the_base_also_where_the_server_began_with_an_adapter(tiny_vla, base, tmp_path):
    fingerprint = weights_fingerprint(base)
    learner, data, config = adapter(base, tmp_path / "adapter")
    model = load(ServeConfig(model=str(tiny_vla), adapter=tmp_path / "adapter", admin_port=0))
    first = model.fingerprint(model.first)
    assert model.spec.base_fingerprint == fingerprint and first == weights_fingerprint(learner)
    store = VersionStore(None, first=first)
    with serving(model, versions=store, admin_port=0) as server, grpc.insecure_channel(server.admin_address) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        reply = stub.PublishWeights(publication(fingerprint, data, kind=LORA, adapter_config=config), timeout=60)
    assert reply.device_fingerprint == first  # once, not twice


def test_a_server_without_an_admin_service_serves_the_live_version_that_it_finds(tiny_model, base, tmp_path):
    def store() -> VersionStore:
        return VersionStore(tmp_path, first=tiny_model.fingerprint(tiny_model.first))

    with serving(tiny_model, versions=store(), admin_port=0) as server:
        with grpc.insecure_channel(server.admin_address) as channel:
            publish(admin_pb2_grpc.AdminStub(channel), base, 0.5, set_live=True)
        first = act(server, start(server).episode_id)
    with serving(tiny_model, versions=store()) as server:
        assert act(server, start(server).episode_id).token_logprobs == first.token_logprobs
        assert server.server.live_version == first.version == 1 and server.server.admin_port is None


@pytest.mark.parametrize(
    ("options", "folder", "several"),
    [
        ({}, None, False),
        ({"admin_port": 0}, None, True),
        ({"episodes": "e"}, "e/versions", False),
        ({"episodes": "e", "admin_port": 0}, "e/versions", True),
        ({"episodes": "kept"}, "kept/versions", True),
        ({"episodes": "e", "versions": "v"}, "v", False),
    ],
)
def test_versions_are_kept_beside_the_episodes_unless_told_otherwise(tmp_path, options, folder, several):
    (tmp_path / "kept" / "versions").mkdir(parents=True)
    paths = {name: value if name == "admin_port" else tmp_path / value for name, value in options.items()}
    config = ServeConfig(**paths)
    assert config.versions_folder == (folder and tmp_path / folder) and config.has_versions == several


class Process:
    """A server of its own, with its two addresses."""

    def __init__(self, model: Path, versions: Path):
        command = [sys.executable, "-m", "policy_server", "serve", "--port", "0", "--admin-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--model", str(model), "--versions", str(versions)], stdout=subprocess.PIPE, text=True
        )
        self.line = self.process.stdout.readline().split()
        self.channels = [grpc.insecure_channel(self.line[1]), grpc.insecure_channel(self._admin_address())]
        self.policy = policy_pb2_grpc.PolicyStub(self.channels[0])
        self.admin = admin_pb2_grpc.AdminStub(self.channels[1])

    def _admin_address(self) -> str:
        word, address = self.process.stdout.readline().split()
        assert word == "ADMIN"
        return address

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        for channel in self.channels:
            channel.close()
        return self.process.wait(60)


def test_a_killed_server_comes_back_with_every_acknowledged_version_and_the_same_live_one(tiny_vla, base, tmp_path):
    acknowledged: list[int] = []
    first = Process(tiny_vla, tmp_path)

    def keep_publishing() -> None:
        while True:
            try:
                acknowledged.append(publish(first.admin, base, 0.1 * (len(acknowledged) + 1)).version)
            except (grpc.RpcError, ValueError):  # ValueError: the channel is closed
                return

    try:
        assert first.line[-2:] == ["version", "0"]
        publish(first.admin, base, 0.5, set_live=True)
        publisher = threading.Thread(target=keep_publishing)
        publisher.start()
        while len(acknowledged) < 4:
            assert publisher.is_alive()
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        publisher.join(60)
    finally:
        first.process.kill()
    again = Process(tiny_vla, tmp_path)
    try:
        assert again.line[-2:] == ["version", "1"]
        versions = listed(again.admin)
        known = [info.version for info in versions.versions]
        assert versions.live == 1 and {0, 1, *acknowledged} <= set(known)
        assert len({info.device_fingerprint for info in versions.versions}) == len(known)
        chunk = act(again, start(again).episode_id)
        tokens = decode_tensor(chunk.token_ids)
        assert chunk.version == 1
        np.testing.assert_allclose(scored(again.admin, 1, tokens), decode_tensor(chunk.token_logprobs), atol=5e-5)
        assert publish(again.admin, base, 3.0).version > max(known)
        assert not list(tmp_path.glob("incoming-*"))
        assert again.end(signal.SIGTERM) == 0
    finally:
        again.process.kill()


def test_a_version_on_disk_is_an_adapter_that_anyone_can_load(admin_server, admin, base, tiny_vla, tmp_path):
    fingerprint = weights_fingerprint(base)
    learner, data, config = adapter(base, tmp_path / "adapter")
    admin.PublishWeights(publication(fingerprint, data, kind=LORA, adapter_config=config), timeout=60)
    loaded = load_checkpoint(tiny_vla).model
    load_lora(loaded, tmp_path / "versions" / "00000001")
    assert all(torch.equal(lora_tensors(loaded)[name], tensor) for name, tensor in lora_tensors(learner).items())
