"""Why a request got no answer, as exceptions; each knows its gRPC status.

PolicyServerError
├── CannotStart         the configuration, checkpoint or address does not allow a server
├── EngineGone          the process that runs the model died: the server stops
└── Refused             one request, refused: what was got and what is expected
    ├── BadRequest      INVALID_ARGUMENT     the request itself is wrong; repeating it does not help
    ├── OutOfOrder      FAILED_PRECONDITION  the episode is unknown, closed, or elsewhere in its sequence
    ├── EpisodeLost     FAILED_PRECONDITION  the disk failed while the episode was open
    ├── UnknownVersion  NOT_FOUND            no such weights
    ├── UnknownSession  NOT_FOUND            no such session
    ├── Unauthenticated UNAUTHENTICATED      no token, or none of this server's
    ├── Forbidden       PERMISSION_DENIED    the token's role may not do this
    ├── Overloaded      RESOURCE_EXHAUSTED   the queue, the disk, the device or the client's share is full; try later
    ├── TooSlow         DEADLINE_EXCEEDED    the client did not send, or read, in time
    ├── Superseded      ABORTED              a newer observation of the episode, or its end, came first
    ├── Abandoned       CANCELLED            nobody waits for the answer any more
    ├── InternalFault   INTERNAL             the model, or the server itself, raised
    │   └── NoNumber                         the weights compute what is no number
    └── Unavailable     UNAVAILABLE          not warm yet, asleep, draining or stopping
"""

from __future__ import annotations

import grpc

from protos import policy_pb2

MAX_SENTENCE_BYTES, MAX_FIELD_BYTES = 1000, 200
"""Of a refusal: it repeats what was got, and travels in headers, which hold little."""


class PolicyServerError(Exception):
    """Root of this package's errors."""


class CannotStart(PolicyServerError):
    """No server can run as configured.  The message is one sentence for whoever typed the command."""


class EngineGone(PolicyServerError):
    """The model is lost, and every decision with it, until the server is started again."""


class Refused(PolicyServerError):
    """One request gets no chunk.

    field: path of the field at fault, e.g. "observation.images[agentview]", or "".
    retry_after_ms: when to try again; 0 means do not repeat the request.
    """

    status = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, field: str = "", retry_after_ms: int = 0):
        super().__init__(_shortened(message, MAX_SENTENCE_BYTES))
        self.field = _shortened(field, MAX_FIELD_BYTES)
        self.retry_after_ms = retry_after_ms

    @property
    def message(self) -> policy_pb2.Refusal:
        """This refusal as it travels."""
        return policy_pb2.Refusal(
            code=self.status.value[0], field=self.field, message=str(self), retry_after_ms=self.retry_after_ms
        )


class BadRequest(Refused):
    status = grpc.StatusCode.INVALID_ARGUMENT


class OutOfOrder(Refused):
    status = grpc.StatusCode.FAILED_PRECONDITION


class EpisodeLost(Refused):
    status = grpc.StatusCode.FAILED_PRECONDITION


class UnknownVersion(Refused):
    status = grpc.StatusCode.NOT_FOUND


class UnknownSession(Refused):
    status = grpc.StatusCode.NOT_FOUND


class Unauthenticated(Refused):
    status = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(Refused):
    status = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(Refused):
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class TooSlow(Refused):
    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Superseded(Refused):
    status = grpc.StatusCode.ABORTED


class Abandoned(Refused):
    status = grpc.StatusCode.CANCELLED


class InternalFault(Refused):
    status = grpc.StatusCode.INTERNAL


class NoNumber(InternalFault):
    """The message says of which version."""


class Unavailable(Refused):
    status = grpc.StatusCode.UNAVAILABLE


def _shortened(text: str, most_bytes: int) -> str:
    encoded = text.encode()
    return text if len(encoded) <= most_bytes else f"{encoded[:most_bytes].decode(errors='ignore')} ..."
