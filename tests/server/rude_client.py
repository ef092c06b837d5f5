"""A client that speaks HTTP/2 by itself, and so can do what no gRPC library does: send half, and read nothing."""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes


class RudeClient:
    """One connection.  window: how many bytes of an answer it takes, per call, before it has read any.

    source: the address that it calls from, of loopback's many.
    """

    def __init__(self, address: str, *, window: int = 2**16 - 1, source: str = "127.0.0.1"):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), source_address=(source, 0))
        self._http = H2Connection(H2Configuration(client_side=True))
        self._http.initiate_connection()
        self._http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._headers: dict[int, dict[str, str]] = {}
        self._data: dict[int, bytes] = {}
        self._ended: set[int] = set()
        self._flush()

    def __enter__(self) -> RudeClient:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def call(self, method: str) -> int:
        """Begins a call of "/vla_rl.Policy/Act", say, and gives its number; nothing of a request is sent."""
        number = self._http.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "rude")]
        headers += [("te", "trailers"), ("content-type", "application/grpc")]
        self._http.send_headers(number, headers)
        self._headers[number], self._data[number] = {}, b""
        self._flush()
        return number

    def send(self, call: int, message: bytes, *, part: float = 1.0, end: bool = False) -> None:
        """A message, or so much of it."""
        frame = struct.pack(">BI", 0, len(message)) + message
        self._http.send_data(call, frame[: round(part * len(frame))], end_stream=end)
        self._flush()

    def end(self, call: int) -> None:
        """There will be no more messages."""
        self._http.end_stream(call)
        self._flush()

    def read_on(self, call: int) -> None:
        """From now on it takes what comes."""
        self._http.increment_flow_control_window(2**20, call)
        self._flush()

    def status(self, call: int, *, within_s: float = 10.0) -> int:
        """The gRPC status with which the call ends.  Raises TimeoutError."""
        deadline_s = time.monotonic() + within_s
        while call not in self._ended:
            self._read(deadline_s)
        return int(self._headers[call]["grpc-status"])

    def _read(self, deadline_s: float) -> None:
        self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
        data = self._socket.recv(2**16)
        if not data:
            raise ConnectionError("the server has closed the connection")
        for event in self._http.receive_data(data):
            self._take(event)
        self._flush()

    def _take(self, event: Event) -> None:
        if isinstance(event, ResponseReceived | TrailersReceived):
            self._headers[event.stream_id] |= {_text(name): _text(value) for name, value in event.headers}
        elif isinstance(event, DataReceived):
            self._data[event.stream_id] += event.data
        elif isinstance(event, StreamEnded | StreamReset):
            self._ended.add(event.stream_id)

    def _flush(self) -> None:
        self._socket.sendall(self._http.data_to_send())


def _text(word: str | bytes) -> str:
    return word.decode() if isinstance(word, bytes) else word
