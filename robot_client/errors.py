"""What can go wrong on the robot's side.

RobotError
├── ArmError              the arm or its simulator failed; ends the episode as an error
├── UnknownArm            no such entry point; says which there are
├── CameraError           a camera failed, shows nothing, or cannot do what was asked of it
├── UnknownCamera         no such entry point, or what it needs is not installed
├── PilotError            a device that a person intervenes with cannot be had, or is lost
├── CannotView            there is no viewer, or no place for its files (robot_client/view.py)
├── CannotExport          these episodes make no such data set (robot_client/export.py)
├── BadProfile            the arm's profile cannot be used; raised before anything moves
├── SpecMismatch          policy and arm do not fit; raised before anything moves
└── PolicyError           the policy server gave no usable answer (code, field, message, retry_after_s)
    ├── BadRequest        the request is at fault, or its episode is unknown: repeating it is useless
    ├── NotAdmitted       the server wants a token, another one, or one of another role
    ├── TlsMismatch       the two sides cannot agree on TLS: a certificate is not good, or only one side speaks it
    ├── TooLong           more ticks without a decision than the server takes in a request
    ├── BadAnswer         the answer breaks the contract: the server is at fault, the arm must not follow it
    ├── Superseded        a newer observation of the same episode took its place
    ├── Overloaded        the server's queue is full; says when to try again
    ├── DeadlineExceeded  no answer in time
    ├── ServerLost        the server cannot be reached, or is going away
    └── ServerFault       the server failed inside
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos import policy_pb2
from protos.channel import Credentials, tls_trouble

REFUSAL_METADATA = "vla-rl-refusal-bin"


class RobotError(Exception):
    """Root of the tree."""


class ArmError(RobotError):
    """The arm or its simulator failed."""


class UnknownArm(RobotError):
    """No arm of that name is installed."""


class CameraError(RobotError):
    """A camera failed, shows nothing, or cannot do what was asked of it."""


class UnknownCamera(RobotError):
    """No camera of that make is installed."""


class PilotError(RobotError):
    """A device with which a person intervenes cannot be had, or is lost: says which, and why."""


class BadProfile(RobotError):
    """The arm's profile cannot be used: names the file, the entry, what was got and what there is."""


class SpecMismatch(RobotError):
    """Policy and arm do not fit; `mismatches` has a line for each difference: what was got, what is expected."""

    def __init__(self, mismatches: list[str]):
        super().__init__("this policy cannot drive this arm:\n" + "\n".join(f"  - {line}" for line in mismatches))
        self.mismatches = mismatches


class PolicyError(RobotError):
    """The policy server gave no usable answer."""

    repeatable = False
    """Whether the same request may succeed later."""

    def __init__(self, message: str, *, field: str = "", retry_after_s: float = 0.0):
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.retry_after_s = retry_after_s


class BadRequest(PolicyError):
    """The request is at fault, or its episode is unknown to the server."""


class NotAdmitted(PolicyError):
    """The server wants a token, another one, or one of another role; the message says which."""


class TlsMismatch(PolicyError):
    """The two sides cannot agree on TLS; the message says why, and what to do."""


class TooLong(PolicyError):
    """More ticks without a decision than the server takes in a request."""


class BadAnswer(PolicyError):
    """The answer breaks the contract."""


class Superseded(PolicyError):
    """A newer observation of the same episode took the request's place."""

    repeatable = True


class Overloaded(PolicyError):
    """The server's queue is full."""

    repeatable = True


class DeadlineExceeded(PolicyError):
    """No answer in time."""

    repeatable = True


class ServerLost(PolicyError):
    """The server cannot be reached, or is going away."""

    repeatable = True


class ServerFault(PolicyError):
    """The server failed inside."""

    repeatable = True


OF_CODE: dict[int, type[PolicyError]] = {
    grpc.StatusCode.CANCELLED.value[0]: ServerLost,
    grpc.StatusCode.INVALID_ARGUMENT.value[0]: BadRequest,
    grpc.StatusCode.NOT_FOUND.value[0]: BadRequest,
    grpc.StatusCode.FAILED_PRECONDITION.value[0]: BadRequest,
    grpc.StatusCode.OUT_OF_RANGE.value[0]: BadRequest,
    grpc.StatusCode.UNIMPLEMENTED.value[0]: BadRequest,
    grpc.StatusCode.UNAUTHENTICATED.value[0]: NotAdmitted,
    grpc.StatusCode.PERMISSION_DENIED.value[0]: NotAdmitted,
    grpc.StatusCode.ABORTED.value[0]: Superseded,
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE.value[0]: ServerLost,
}
"""gRPC status code -> error; every other code is a ServerFault."""


def of_refusal(refusal: policy_pb2.Refusal) -> PolicyError:
    """The error that a Refusal stands for."""
    kind = OF_CODE.get(refusal.code, ServerFault)
    return kind(refusal.message, field=refusal.field, retry_after_s=refusal.retry_after_ms / 1000)


def of_rpc(error: grpc.RpcError, address: str) -> PolicyError:
    """The error that a failed call stands for: its Refusal when the trailing metadata carries one, else its status."""
    assert isinstance(error, grpc.Call)
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == REFUSAL_METADATA and isinstance(value, bytes):
            try:
                return of_refusal(policy_pb2.Refusal.FromString(value))
            except DecodeError:
                break
    code = error.code()
    kind = OF_CODE.get(code.value[0], ServerFault)
    return kind(f"{address}: {code.name}: {error.details()}")


def looked_into(error: PolicyError, address: str, credentials: Credentials | None) -> PolicyError:
    """The same error; or a TlsMismatch where that is why a server seems lost.

    It asks the server, for up to two seconds: not for whoever has an arm to move meanwhile.
    """
    says_why = error.retry_after_s > 0
    if isinstance(error, ServerLost) and not says_why and (trouble := tls_trouble(address, credentials)):
        return TlsMismatch(trouble)
    return error
