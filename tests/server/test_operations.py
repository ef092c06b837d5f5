"""Starting, being looked at, and stopping."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from policy_server.__main__ import main
from policy_server.config import ServeConfig
from policy_server.errors import CannotStart
from policy_server.loading import load
from protos import policy_pb2, policy_pb2_grpc
from protos.episode_file import read_episode
from tests.server import messages
from tests.server.fake_model import FakeModel
from tests.server.running import eventually, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(channel: grpc.Channel, service: str = ""):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def test_not_serving_until_the_model_is_warm():
    with serving(FakeModel(warm_s=0.3), warm=False) as server:
        assert health(server.channel) == health(server.channel, "vla_rl.Policy") == NOT_SERVING
        assert server.policy.GetSpec(policy_pb2.GetSpecRequest()).model == "fake"
        with pytest.raises(grpc.RpcError) as error:
            server.policy.StartEpisode(messages.start())
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "warming up" in error.value.details()
        warming = asyncio.run_coroutine_threadsafe(server.server.warm_up(), server.loop)
        assert health(server.channel) == NOT_SERVING
        warming.result(5)
        assert health(server.channel) == health(server.channel, "vla_rl.Policy") == SERVING
        server.policy.StartEpisode(messages.start())


def test_a_stop_is_not_serving_from_its_first_moment_and_finishes_what_is_in_flight():
    with serving(FakeModel(), max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        episodes = [server.policy.StartEpisode(messages.start()).episode_id for _ in range(3)]
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        calls = [server.policy.Act.future(messages.act(episode_id, 0)) for episode_id in episodes[:2]]
        stream = server.policy.ActStream(iter([messages.act(episodes[2], 0)]))
        eventually(lambda: server.model.batches and server.server.waiting == 2)
        stopping = server.begin_stop()
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            server.policy.StartEpisode(messages.start())
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        server.model.gate.set()
        assert all(call.result(5).HasField("chunk") for call in calls)
        assert next(stream).HasField("chunk")
        stopping.result(10)


def test_reflection_names_the_services():
    with serving(FakeModel()) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in reply.list_services_response.service}
        assert {"vla_rl.Policy", "vla_rl.Rollouts", "grpc.health.v1.Health"} <= names


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "policy_server", "serve", "--port", "0", *map(str, args)]


def test_sigterm_stops_a_serving_process_cleanly_and_keeps_its_episodes(tiny_vla, tmp_path):
    process = subprocess.Popen(
        command("--model", tiny_vla, "--episodes", tmp_path, "--max-batch", 2), stdout=subprocess.PIPE, text=True
    )
    try:
        word, address, *rest = process.stdout.readline().split()
        assert word == "SERVING" and rest == [tiny_vla.name, "version", "0"]
        with grpc.insecure_channel(address) as channel:
            policy = policy_pb2_grpc.PolicyStub(channel)
            assert health(channel) == SERVING
            opened = policy.StartEpisode(messages.start())
            process.send_signal(signal.SIGTERM)
            assert process.wait(100) == 0
    finally:
        process.kill()
    (path,) = tmp_path.glob("*.episode")
    assert read_episode(path).start.episode_id == opened.episode_id


def broken(tiny_vla: Path, tmp_path: Path, *, spoil) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in tiny_vla.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    return folder


def edit_config(folder: Path, old: str, new: str) -> None:
    path = folder / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def make_sharded_and_lose_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)


NO_CHECKPOINT = {
    "not a checkpoint": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a missing shard": (make_sharded_and_lose_one, "shard model-00002-of-00002.safetensors"),
    "a wrong shape": (lambda folder: edit_config(folder, '"hidden_size": 32', '"hidden_size": 64'), "must have shape"),
    "an unknown architecture": (lambda folder: edit_config(folder, '"openvla"', '"pi0"'), "model_type must be"),
}


@pytest.mark.parametrize("what", NO_CHECKPOINT)
def test_a_folder_that_is_no_checkpoint_is_one_sentence_and_exit_code_2(tiny_vla, tmp_path, capsys, what):
    spoil, sentence = NO_CHECKPOINT[what]
    folder = broken(tiny_vla, tmp_path, spoil=spoil)
    one_sentence(["serve", "--model", str(folder)], sentence, capsys)


def test_a_port_that_is_taken_is_one_sentence_and_exit_code_2(tiny_vla, capsys):
    with serving(FakeModel()) as server:
        port = server.address.rpartition(":")[2]
        one_sentence(["serve", "--model", str(tiny_vla), "--port", port], "is another server running there", capsys)


def test_a_folder_with_nothing_to_compare_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    one_sentence(["compare", str(tmp_path)], "found none", capsys)


def one_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    code = main(args)
    told = capsys.readouterr()
    assert code == 2 and told.out == ""
    (line,) = [line for line in told.err.splitlines() if line.startswith("policy_server: ")]
    assert sentence in line


def test_a_model_that_does_not_exist_ends_the_process_with_code_2_and_no_traceback():
    done = subprocess.run(command("--model", "./nowhere"), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stdout == ""
    assert "there is no such folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda:0x", "cuda"])
def test_a_device_that_there_is_not_is_one_sentence(tiny_vla, device):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one")
    with pytest.raises(CannotStart, match=f"device .*{device!r}"):
        load(ServeConfig(model=str(tiny_vla), device=device))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["--queue", "2", "--max-batch", "4"], "queue must hold at least one batch (4), got 2"),
        (["--keep-gb", "1"], "keep_gb needs episodes"),
        (["--lease-s", "0"], "lease_s must be positive, got 0"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(args, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *args])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
