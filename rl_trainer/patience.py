"""Calls that outlive a server that is killed and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

import grpc

RETRY_S = 1.0

T = TypeVar("T")


class ServerGone(RuntimeError):
    """The policy server could not be reached for as long as the run is patient."""


def patiently(
    call: Callable[[], T],
    *,
    address: str,
    patience_s: float,
    passing: Collection[grpc.StatusCode] = (grpc.StatusCode.UNAVAILABLE,),
) -> T:
    """The call's answer, tried again while it fails in a way that passes.

    Raises ServerGone after patience_s of that, and ValueError for a refusal.
    """
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        if code not in passing:
            raise ValueError(f"{address} refused ({code.name}): {details}")
        if time.monotonic() > give_up_at:
            raise ServerGone(f"{address} has been away for {patience_s:.0f} s: {details}")
        time.sleep(RETRY_S)
