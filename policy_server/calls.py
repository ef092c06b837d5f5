"""What one client may have under way, whatever it calls: the first thing that a call on any gRPC port meets.

A client is a network address.  Its calls are counted from before anything of a request has arrived until all of the
answer has left: half an upload, and an answer that nobody reads, count against whoever is to blame, and nobody else.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from policy_server.errors import BadRequest, Overloaded, TooSlow
from policy_server.metrics import Metrics
from policy_server.refusals import RETRY_SOON_MS, refusing

DEFAULT_CALLS = 256
ARRIVE_S = 15.0
"""How long the request of a call may take to arrive."""


class Calls(grpc.aio.ServerInterceptor):
    """At most `most` calls of one client at once, over all ports that share this; more are refused with a retry hint.

    A call with one request is ended when that takes longer than arrive_s; bytes that are no message are refused.  What
    it refuses, and what an interceptor behind it does, is counted as turned away.
    """

    def __init__(self, metrics: Metrics, *, most: int = DEFAULT_CALLS, arrive_s: float = ARRIVE_S):
        self._metrics, self._most, self._arrive_s = metrics, most, arrive_s
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self, continuation: Callable[..., Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guarded(handler)

    def _guarded(self, handler: Any) -> Any:
        """The same handler as one of a stream of requests: such a one is called before the first has arrived."""
        respond = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        @refusing
        async def guarded(requests: AsyncIterator[Any], context: Any) -> Any:
            client = client_of(context.peer())
            with self._metrics.door():  # a service's own refusals do not come here: they have ended the call by then
                self.enter(client)
                context.add_done_callback(lambda _: self.leave(client))
                if handler.response_streaming:  # or gRPC cannot end a call whose first answer is never read
                    await context.send_initial_metadata(())
                answer = respond(requests if handler.request_streaming else await self._first(context), context)
                if not inspect.isasyncgen(answer):
                    return await answer
                async for message in answer:
                    await context.write(message)

        make = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        return make(guarded, _checked(handler.request_deserializer), handler.response_serializer)

    def enter(self, client: str) -> None:
        """One more; whoever enters leaves.  Raises Overloaded."""
        if self._open[client] >= self._most:
            raise Overloaded(
                f"this client has {self._most} calls under way, and may no more", retry_after_ms=RETRY_SOON_MS
            )
        self._open[client] += 1

    def leave(self, client: str) -> None:
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]

    async def _first(self, context: Any) -> Any:
        """The one request.  Raises TooSlow, BadRequest."""
        try:
            request = await asyncio.wait_for(context.read(), self._arrive_s)
        except asyncio.TimeoutError:
            raise TooSlow(f"the request must arrive within {self._arrive_s:g} s, and did not") from None
        if request is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue] (its stubs lack it)
            raise BadRequest("there must be a request, got none")
        return request


def client_of(peer: str) -> str:
    """The address of a peer as gRPC names it, "ipv4:10.0.0.7:51234" or "ipv6:[fe80::7]:51234", without the port."""
    return unquote(peer).rpartition(":")[0]


def client_at(host: str) -> str:
    """The same client, of whom only the address is known."""
    return f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"


def _checked(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Turns bytes that are no message into a refusal: gRPC itself would tell of a fault of ours."""
    if parse is None:
        return None

    def checked(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            raise BadRequest(f"must be a message of this method, got {len(data)} bytes that are none") from None

    return checked
