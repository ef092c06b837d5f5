"""Calls that outlive a server that is killed and comes back, or that has no room on its disk for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

import grpc

from protos.channel import Credentials, tls_trouble

RETRY_S = 1.0

T = TypeVar("T")


class Refusal(ValueError):
    """What the server says no to, in its own words; `code` is why."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str | None):
        super().__init__(f"{address} refused ({code.name}): {details}")
        self.code = code


class ServerGone(RuntimeError):
    """The policy server was away, or its disk full, for as long as the run is patient."""


PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
REPEATABLE = (*PASSING, grpc.StatusCode.DEADLINE_EXCEEDED)
"""For calls that may be made twice, so that a lost answer is asked for again."""
TROUBLE = {grpc.StatusCode.RESOURCE_EXHAUSTED: "has had no room"}
"""What the server's silence is called, where it is not just away."""


def patiently(
    call: Callable[[], T],
    *,
    address: str,
    credentials: Credentials | None = None,
    patience_s: float,
    passing: Collection[grpc.StatusCode] = PASSING,
) -> T:
    """The call's answer, tried again while it fails in a way that passes.

    Raises ServerGone after patience_s of that, Refusal, and ValueError where the sides cannot agree on TLS.
    """
    give_up_at, told = time.monotonic() + patience_s, False
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        if code not in passing:
            raise Refusal(address, code, details)
        if code is grpc.StatusCode.UNAVAILABLE and (trouble := tls_trouble(address, credentials)):
            raise ValueError(trouble)
        if time.monotonic() > give_up_at:
            raise ServerGone(f"{address} {TROUBLE.get(code, 'has been away')} for {patience_s:.0f} s: {details}")
        if code in TROUBLE and not told:
            print(f"waiting for {address}: {details}", flush=True)
            told = True
        time.sleep(RETRY_S)
