"""openpi's protocol as openpi-client 0.1.2 and its server speak it, written down apart from protos/openpi_codec.py."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve


def packb(message: Any) -> bytes:
    return msgpack.packb(message, default=_packed)


def unpackb(data: bytes) -> Any:
    return msgpack.unpackb(data, object_hook=_unpacked)


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def _unpacked(value: dict) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


class Robot:
    """What WebsocketClientPolicy does."""

    def __init__(self, address: str, *, api_key: str = ""):
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        connecting = connect(f"ws://{address}", compression=None, max_size=None, additional_headers=headers)
        self.socket = connecting.__enter__()
        self.metadata = unpackb(self.socket.recv(10))

    def __enter__(self) -> Robot:
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def send(self, observation: Any) -> None:
        self.socket.send(packb(observation))

    def receive(self) -> Any:
        """A text stays one."""
        said = self.socket.recv(10)
        return said if isinstance(said, str) else unpackb(said)

    def infer(self, observation: Any) -> Any:
        self.send(observation)
        return self.receive()


class StockServer:
    """What WebsocketPolicyServer does: where the policy raises, a traceback is sent and the connection closed.

    Keeps the observations that came and the headers of each connection.
    """

    def __init__(self, infer: Callable[[dict], dict], *, metadata: dict | None = None):
        self.infer, self.metadata = infer, metadata or {}
        self.observations: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self._connections: list[ServerConnection] = []
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"openpi://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = serve(self._talk, "127.0.0.1", self._port, compression=None, max_size=None)
        self._port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Gone, with all its connections; start() brings it back."""
        self._server.shutdown()
        for connection in self._connections:
            connection.close_socket()
        self._connections.clear()

    def _talk(self, socket: ServerConnection) -> None:
        self._connections.append(socket)
        assert socket.request is not None
        self.headers.append(dict(socket.request.headers.raw_items()))
        try:
            socket.send(packb(self.metadata))
            for data in socket:
                self.observations.append(unpackb(data))  # type: ignore[arg-type]
                try:
                    socket.send(packb(self.infer(self.observations[-1])))
                except ConnectionClosed:
                    raise
                except Exception:
                    socket.send(traceback.format_exc())
                    socket.close(CloseCode.INTERNAL_ERROR, "Internal server error.")
        except ConnectionClosed:
            pass
