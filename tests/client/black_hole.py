"""A network between a client and a server that swallows everything when told to, without closing a connection."""

from __future__ import annotations

import contextlib
import socket
import threading


class BlackHole:
    """Forwards bytes between its own port and `address`; while `swallowing`, they stay where they are."""

    def __init__(self, address: str):
        host, _, port = address.partition(":")
        self._target = (host, int(port))
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def swallow(self) -> None:
        self._open.clear()

    def let_through(self) -> None:
        self._open.set()

    def close(self) -> None:
        self.let_through()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
