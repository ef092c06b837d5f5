"""What an ActStream puts on the wire when more is asked than the network takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from robot_client.act_stream import ActStream


class Wire:
    """A stream that answers nothing; the test takes requests off it."""

    def __init__(self) -> None:
        self.requests: Iterator[bytes] = iter(())
        self._over = threading.Event()

    def __call__(self, requests: Iterator[bytes]) -> Wire:
        self.requests = requests
        return self

    def __iter__(self) -> Iterator:
        self._over.wait(20)
        return iter(())

    def cancel(self) -> None:
        self._over.set()


def test_of_a_decision_the_newest_request_is_sent_once_and_none_that_nobody_waits_for() -> None:
    wire = Wire()
    stream = ActStream(wire, "here")  # pyright: ignore[reportArgumentType]
    stream.ask(("e", 0), b"old").cancel()
    stream.ask(("e", 0), b"new")
    stream.ask(("e", 1), b"given up").cancel()
    stream.ask(("e", 2), b"last")
    stream.close()
    assert list(wire.requests) == [b"new", b"last"]
