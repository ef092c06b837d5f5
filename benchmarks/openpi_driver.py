"""A robot's program as openpi's examples have it; run by an interpreter with openpi-client (see openpi_libero.py).

    python benchmarks/openpi_driver.py HOST PORT < observations > answers

Imports nothing of ours.  What comes in and goes out is a length (four bytes, little-endian) and so many bytes that
openpi_client.msgpack_numpy packs: first the server's metadata, then for each observation the actions of its chunk, as
ActionChunkBroker hands them out tick by tick, and the seconds that the server took there and back.
"""

# pyright: reportMissingImports=false
# (openpi-client lives in an environment of its own)

from __future__ import annotations

import struct
import sys
import time

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

LENGTH = struct.Struct("<I")


def main(host: str, port: int) -> None:
    policy = WebsocketClientPolicy(host, port)
    metadata = policy.get_server_metadata()
    broker = ActionChunkBroker(policy, action_horizon=metadata["chunk_length"])
    say({**metadata, "numpy": np.__version__})
    while head := sys.stdin.buffer.read(LENGTH.size):
        observation = msgpack_numpy.unpackb(sys.stdin.buffer.read(*LENGTH.unpack(head)))
        began_s = time.perf_counter()
        actions = [broker.infer(observation)["actions"]]
        round_trip_s = time.perf_counter() - began_s
        actions += [broker.infer(observation)["actions"] for _ in range(1, metadata["chunk_length"])]
        say({"actions": np.stack(actions), "round_trip_s": round_trip_s})


def say(message: dict) -> None:
    data = msgpack_numpy.packb(message)
    sys.stdout.buffer.write(LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
