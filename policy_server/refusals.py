"""How a refusal leaves the server: as the status of its call, with the Refusal in the trailing metadata."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

from policy_server.errors import InternalFault, Refused, Unavailable

log = logging.getLogger(__name__)

REFUSAL_KEY = "vla-rl-refusal-bin"
RETRY_SOON_MS = 500


class Door:
    """Whether requests are taken: from when the model is warm until the server stops."""

    def __init__(self) -> None:
        self._closed_because = "the model is warming up"

    def open(self) -> None:
        self._closed_because = ""

    def close(self) -> None:
        self._closed_because = "the server is stopping"

    def check(self) -> None:
        """Raises Unavailable while it is closed."""
        if self._closed_because:
            raise Unavailable(self._closed_because, retry_after_ms=RETRY_SOON_MS)


@contextlib.contextmanager
def refusals_only() -> Iterator[None]:
    """Turns a fault of ours into a refusal: it costs one request, and nothing of it travels."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        log.exception("a request failed inside the server")
        raise InternalFault("the server failed on this request; its log says why") from error


def refusing(handler):
    """A handler of one request whose Refused becomes the call's status; what it returns, if anything, is the reply."""

    @functools.wraps(handler)
    async def answer(self, request, context):
        try:
            with refusals_only():
                return await handler(self, request, context)
        except Refused as refused:
            metadata = ((REFUSAL_KEY, refused.message.SerializeToString()),)
            await context.abort(refused.status, _sentence(refused), trailing_metadata=metadata)

    return answer


def _sentence(refused: Refused) -> str:
    return f"{refused.field}: {refused}" if refused.field else str(refused)
