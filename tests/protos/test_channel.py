"""One way to dial: an address is checked at once, a connection is made at the first call, a dead peer is noticed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from protos import policy_pb2, policy_pb2_grpc
from protos.channel import MAX_MESSAGE_BYTES, dial

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
