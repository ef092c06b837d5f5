"""One way to dial: an address is checked at once, a connection is made at the first call, a dead peer is noticed; a
token goes with every call, but never where others hear it.
"""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from protos.channel import MAX_MESSAGE_BYTES, Credentials, dial, free_port, is_loopback, tls_trouble

BIG = 8 * 2**20  # gRPC's own limit is 4 MiB


class Policy(policy_pb2_grpc.PolicyServicer):
    def GetSpec(self, request, context):
        return policy_pb2.PolicySpec(model="m" * BIG)


def serve(port: int = 0) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    policy_pb2_grpc.add_PolicyServicer_to_server(Policy(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


@pytest.fixture
def server():
    server, port = serve()
    yield server, port
    server.stop(None).wait()


def ask(channel: grpc.Channel, **options) -> policy_pb2.PolicySpec:
    return policy_pb2_grpc.PolicyStub(channel).GetSpec(policy_pb2.GetSpecRequest(), timeout=5, **options)


def test_messages_larger_than_grpcs_default_pass(server):
    assert BIG < MAX_MESSAGE_BYTES
    with dial(f"127.0.0.1:{server[1]}") as channel:
        assert len(ask(channel).model) == BIG


@pytest.mark.parametrize("address", ["", ":50051", "host:", "host:http", "host:0", "host:65536", "host:-1", "a b:1:x"])
def test_what_is_not_an_address_is_refused_at_once(address):
    with pytest.raises(ValueError, match=r"must be HOST:PORT with a port in 1\.\.65535, got"):
        dial(address)


def test_nothing_connects_before_the_first_call():
    with dial("127.0.0.1:1"):
        pass


def test_a_port_is_not_needed():
    with dial("localhost") as channel, pytest.raises(grpc.RpcError) as failure:
        policy_pb2_grpc.PolicyStub(channel).GetSpec(policy_pb2.GetSpecRequest(), timeout=2)
    assert "50051" in failure.value.details() or failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_server_that_comes_back_is_reached_again_within_the_back_off(server):
    running, port = server
    with dial(f"127.0.0.1:{port}") as channel:
        ask(channel)
        running.stop(None).wait()
        with pytest.raises(grpc.RpcError):
            ask(channel)
        time.sleep(1.0)
        again, _ = serve(port)
        try:
            began = time.monotonic()
            ask(channel, wait_for_ready=True)
            assert time.monotonic() - began < 3  # the longest back-off is 2 s
        finally:
            again.stop(None).wait()


def test_two_channels_of_one_process_share_no_connection(server):
    peers: set[str] = set()
    lock = threading.Lock()

    class Peers(policy_pb2_grpc.PolicyServicer):
        def GetSpec(self, request, context):
            with lock:
                peers.add(context.peer())
            return policy_pb2.PolicySpec()

    other = grpc.server(ThreadPoolExecutor(4))
    policy_pb2_grpc.add_PolicyServicer_to_server(Peers(), other)
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with dial(f"127.0.0.1:{port}") as one, dial(f"127.0.0.1:{port}") as two:
        ask(one), ask(two), ask(one)
    other.stop(None).wait()
    assert len(peers) == 2


TOKEN = "robot-0123456789abcdef"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "vault" / "token"
    path.parent.mkdir()
    path.write_text(TOKEN + "\n")
    return path


class Listener(policy_pb2_grpc.PolicyServicer, rollout_pb2_grpc.RolloutsServicer, admin_pb2_grpc.AdminServicer):
    """A call of each kind; what they were shown."""

    def __init__(self) -> None:
        self.shown: list[object] = []

    def GetSpec(self, request, context):
        self.shown.append(dict(context.invocation_metadata()).get("authorization"))
        return policy_pb2.PolicySpec()

    def ActStream(self, requests, context):
        self.GetSpec(None, context)
        return iter([])

    def StreamEpisodes(self, request, context):
        self.GetSpec(None, context)
        return iter([])

    def PublishWeights(self, requests, context):
        self.GetSpec(None, context)
        return admin_pb2.PublishWeightsReply()


@pytest.fixture
def listener():
    server, listener = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)]), Listener()
    policy_pb2_grpc.add_PolicyServicer_to_server(listener, server)
    rollout_pb2_grpc.add_RolloutsServicer_to_server(listener, server)
    admin_pb2_grpc.add_AdminServicer_to_server(listener, server)
    listener.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield listener
    server.stop(None).wait()


def call_each_kind(channel: grpc.Channel) -> None:
    policy, rollouts = policy_pb2_grpc.PolicyStub(channel), rollout_pb2_grpc.RolloutsStub(channel)
    ask(channel)
    ask(channel, metadata=[("other", "word")])
    policy.GetSpec.future(policy_pb2.GetSpecRequest(), timeout=5).result()
    list(policy.ActStream(iter([]), timeout=5))
    list(rollouts.StreamEpisodes(rollout_pb2.StreamEpisodesRequest(), timeout=5))
    admin_pb2_grpc.AdminStub(channel).PublishWeights(iter([]), timeout=5)


@pytest.mark.parametrize("with_token", [True, False])
def test_a_token_goes_with_every_kind_of_call(listener, token_file, with_token):
    with dial(listener.address, Credentials(token_file=token_file) if with_token else None) as channel:
        call_each_kind(channel)
    assert listener.shown == [f"Bearer {TOKEN}" if with_token else None] * 6


def test_a_failed_call_that_carries_a_token_is_an_rpc_error_like_any_other(listener, token_file):
    with dial(listener.address, Credentials(token_file=token_file)) as channel:
        stub = policy_pb2_grpc.PolicyStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Act(policy_pb2.ActRequest(), timeout=5)
        future = stub.Act.future(policy_pb2.ActRequest(), timeout=5)
        for failed in (failure.value, future.exception()):
            assert isinstance(failed, grpc.Call) and failed.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("host", ["192.168.1.7", "robots.lab", "0.0.0.0", "127.0.0.1.robots.lab", "[2001:db8::1]"])
def test_a_token_does_not_leave_this_machine_unencrypted(token_file, lab, host):
    with pytest.raises(ValueError, match=r"must not travel to \S+ unencrypted: use --tls-ca"):
        dial(f"{host}:50051", Credentials(token_file=token_file))
    dial(f"{host}:50051", Credentials(token_file=token_file, tls_ca=lab.ca)).close()
    dial(f"{host}:50051").close()


def test_loopback_is_what_the_standards_say_and_the_one_name_for_it():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.10", "localhost", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "::", "10.0.0.1", "localhost.lab", "128.0.0.1"))


def test_no_proxy_sees_what_stays_on_this_machine(listener, token_file, monkeypatch):
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with dial(listener.address, Credentials(token_file=token_file)) as channel:
        ask(channel)
    assert listener.shown == [f"Bearer {TOKEN}"]


def test_credentials_are_handed_on_as_names_of_files_and_logged_without_them(token_file, lab):
    pair = lab.pair("robot-7")
    credentials = Credentials(token_file=token_file, tls_ca=lab.ca, tls_cert=pair.cert, tls_key=pair.key)
    token, ca, cert, key = (str(path) for path in (token_file, lab.ca, pair.cert, pair.key))
    assert credentials.flags == ["--token-file", token, "--tls-ca", ca, "--tls-cert", cert, "--tls-key", key]
    assert Credentials().flags == []
    assert repr(credentials) == "Credentials(token_file, tls_ca, tls_cert, tls_key)"


def test_credentials_of_no_use_are_refused_before_anything_is_dialed_in_a_sentence_that_shows_no_path(token_file, lab):
    good, other = lab.pair("robot-7"), lab.pair("robot-8")
    nowhere, junk = token_file.with_name("nowhere"), token_file.with_name("junk")
    junk.write_text("short")
    pair = "tls_cert and tls_key must be a certificate and its key"
    for files, sentence in [
        ({"token_file": nowhere}, "token_file cannot be read: No such file"),
        ({"token_file": junk}, "token_file must hold one token, at least 16 characters .* got 5 characters"),
        ({"token_file": lab.ca}, "token_file must hold one token"),
        ({"tls_ca": nowhere}, "tls_ca cannot be read: No such file"),
        ({"tls_ca": junk}, "tls_ca must be a certificate .*, got something else"),
        ({"tls_ca": lab.ca, "tls_cert": nowhere, "tls_key": good.key}, "tls_cert and tls_key cannot be read"),
        ({"tls_ca": lab.ca, "tls_cert": good.cert, "tls_key": other.key}, pair),
        ({"tls_ca": lab.ca, "tls_cert": junk, "tls_key": good.key}, pair),
        ({"tls_ca": lab.ca, "tls_cert": good.cert}, "tls_cert and tls_key must be given together"),
        ({"tls_cert": good.cert, "tls_key": good.key}, "tls_cert needs tls_ca"),
    ]:
        with pytest.raises(ValueError, match=sentence) as refused:
            dial("127.0.0.1:1", Credentials(**files))
        assert not any(str(path.parent) in str(refused.value) for path in files.values())


def test_nobody_there_and_a_server_in_the_open_are_no_trouble_with_tls(server):
    assert tls_trouble(f"127.0.0.1:{free_port()}") == tls_trouble(f"127.0.0.1:{server[1]}") == ""


def test_a_server_that_never_answers_is_no_trouble_with_tls_and_costs_no_more_than_the_wait(lab):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, began = f"127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        assert tls_trouble(address, Credentials(tls_ca=lab.ca), wait_s=0.2) == ""
        assert time.monotonic() - began < 2
