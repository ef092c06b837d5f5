"""openpi's side of benchmarks/transport.py; run by an interpreter with openpi-client, and imports nothing of ours.

    python benchmarks/openpi_instant.py serve K A                            prints its port
    python benchmarks/openpi_instant.py ask HOST PORT SIDE_PX STATE PROMPT   reads numbers of calls, prints ms of each

The server does what openpi's own does, on the same library: its metadata first, then an answer to each message.  Its
policy is a chunk of zeros, K actions of A numbers.
"""

# pyright: reportMissingImports=false
# (openpi-client lives in an environment of its own)

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.asyncio.server import serve as listen


async def serve(ticks: int, width: int) -> None:
    chunk = np.zeros((ticks, width), np.float32)

    async def answer(connection) -> None:
        packer = msgpack_numpy.Packer()
        await connection.send(packer.pack({}))
        async for message in connection:
            began_s = time.monotonic()
            msgpack_numpy.unpackb(message)
            taken_ms = 1e3 * (time.monotonic() - began_s)
            await connection.send(packer.pack({"actions": chunk, "server_timing": {"infer_ms": taken_ms}}))

    async with listen(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


def ask(host: str, port: int, side_px: int, state: int, prompt: str) -> None:
    draw = np.random.default_rng(0)
    observation = {
        "observation/image": draw.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8),
        "observation/wrist_image": draw.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8),
        "observation/state": draw.normal(size=state).astype(np.float32),
        "prompt": prompt,
    }
    policy = WebsocketClientPolicy(host, port)
    for line in sys.stdin:
        taken_ms = []
        for _ in range(int(line)):
            began_s = time.perf_counter()
            policy.infer(observation)
            taken_ms.append(1e3 * (time.perf_counter() - began_s))
        print(json.dumps(taken_ms), flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        asyncio.run(serve(*map(int, arguments)))
    else:
        host, port, side_px, state, prompt = arguments
        ask(host, int(port), int(side_px), int(state), prompt)
