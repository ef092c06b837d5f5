"""One way to dial a policy server, for robots and trainers: keep-alive, message size, deadlines."""

from __future__ import annotations

import socket

import grpc

MAX_MESSAGE_BYTES = 64 * 2**20
DEFAULT_PORT = 50051
DEFAULT_DEADLINE_S = 30.0

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A dead peer is noticed within about 15 s even while no call is under way.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect quickly: a robot holds while it waits.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two clients in one process must not share a connection: one robot's flow control is not another's.
    ("grpc.use_local_subchannel_pool", 1),
]


def dial(address: str) -> grpc.Channel:
    """A channel to `HOST:PORT` (the port defaults to 50051).  Lazy: the first call connects.

    Raises ValueError for an address that is not HOST or HOST:PORT.
    """
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(DEFAULT_PORT))
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"a server address must be HOST:PORT with a port in 1..65535, got {address!r}")
    return grpc.insecure_channel(f"{host}:{port}", options=OPTIONS)


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
