"""How a refusal leaves the server: as the status of its call, with the Refusal in the trailing metadata."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc

from policy_server.errors import InternalFault, Overloaded, Refused, Unavailable
from policy_server.logs import Sparing, about

log = logging.getLogger(__name__)
log.addFilter(Sparing())

REFUSAL_KEY = "vla-rl-refusal-bin"
RETRY_SOON_MS = 500
FULL_DISK_RETRY_MS = 10_000
IDS = {"episode": "episode_id", "decision": "decision"}
"""In the log -> in a request."""
MAX_ID = 100
"""Characters of them in a line."""
WARMING = "the model is warming up"
TURNING_IN = "the server is about to sleep: it takes no new episodes"
ASLEEP = "the server is asleep until it is told to Wake"
DRAINING = "the server is draining: it takes no more work"
STOPPING = "the server is stopping"
FOR_GOOD = (DRAINING, STOPPING)

E = TypeVar("E", bound=BaseException)


class Door:
    """Whether requests are taken: not before the model is warm, nor while it sleeps; never again after FOR_GOOD."""

    def __init__(self) -> None:
        self._closed_because = WARMING

    def open(self) -> None:
        if self._closed_because not in FOR_GOOD:
            self._closed_because = ""

    def close(self, because: str) -> None:
        if because in FOR_GOOD or self._closed_because not in FOR_GOOD:
            self._closed_because = because

    def check(self, *, leased: bool = False) -> None:
        """Raises Unavailable while it is closed; for work that was handed out, not while it is only about to sleep."""
        if self._closed_because and not (leased and self._closed_because == TURNING_IN):
            raise Unavailable(self._closed_because, retry_after_ms=RETRY_SOON_MS)


@contextlib.contextmanager
def refusals_only() -> Iterator[None]:
    """Turns a fault of ours into a refusal: it costs one request, and nothing of it travels."""
    try:
        yield
    except (Refused, grpc.aio.BaseError):  # gRPC knows what to do with its own
        raise
    except Exception as error:
        log.exception("a request failed inside the server")
        raise InternalFault("the server failed on this request; its log says why") from error


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Turns a disk that refuses into a refusal: what lies there takes nothing more."""
    try:
        yield
    except OSError as error:
        raise Overloaded(f"{what} takes nothing more: {error.strerror}", retry_after_ms=FULL_DISK_RETRY_MS) from error


def refusing(handler):
    """A handler of one request whose Refused becomes the call's status; what it returns, if anything, is the reply."""

    @functools.wraps(handler)
    async def answer(*args):
        context = args[-1]
        with about(peer=caller(context), **ids(args[-2])):
            try:
                with refusals_only():
                    return await handler(*args)
            except Refused as error:
                refused = bare(error)
            del args  # the request may be large, and its client slow to hear why it is refused
            await refuse(context, refused)

    return answer


async def refuse(context, refused: Refused) -> None:
    """Ends the call of this context with the refusal as its status."""
    note(refused)
    metadata = ((REFUSAL_KEY, refused.message.SerializeToString()),)
    await context.abort(refused.status, _sentence(refused), trailing_metadata=metadata)


def note(refused: Refused) -> None:
    """A line in the log, as sparing as such lines are."""
    log.info("refused, %s: %s", refused.status.name, _sentence(refused), extra={"refusal": refused.status.name})


def caller(context: Any) -> str:
    """Address and port of the client of a gRPC call."""
    return unquote(context.peer()).partition(":")[2]


def ids(request: Any) -> dict[str, Any]:
    """What the log calls a request by."""
    found = {name: getattr(request, field) for name, field in IDS.items() if hasattr(request, field)}
    return {name: value[:MAX_ID] if isinstance(value, str) else value for name, value in found.items()}


def bare(error: E) -> E:
    """Without where, and from what, it was raised: those frames hold the request."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _sentence(refused: Refused) -> str:
    return f"{refused.field}: {refused}" if refused.field else str(refused)
