"""Who may call what: tokens from a file, their roles, and TLS, the same for every port.

The gRPC ports ask a Doorkeeper, the HTTP ports Guard.check().  What a log or a refusal says shows no token, no
certificate and no path.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc

from policy_server.errors import CannotStart, Forbidden, Refused, Unauthenticated
from protos.channel import A_TOKEN, CERTIFICATE, PAIR, TOKEN, given, readable

log = logging.getLogger(__name__)

Role = Literal["robot", "trainer", "admin"]
Roles = tuple[Role, ...]

ROBOTS: Roles = ("robot", "trainer", "admin")
"""All roles there are: a trainer may do what a robot may, an admin everything."""
TRAINERS: Roles = ("trainer", "admin")
ADMINS: Roles = ("admin",)

HEALTH = "/grpc.health.v1.Health/"
"""Open to all: whoever watches over the server needs no token."""
POLICY_PORT: Mapping[str, Roles] = {
    # There is none: whoever is told so asks for the older one.
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": ROBOTS,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ROBOTS,
    "/vla_rl.Policy/GetSpec": ROBOTS,
    "/vla_rl.Policy/StartEpisode": ROBOTS,
    "/vla_rl.Policy/Act": ROBOTS,
    "/vla_rl.Policy/ActStream": ROBOTS,
    "/vla_rl.Policy/EndEpisode": ROBOTS,
    "/vla_rl.Rollouts/LeaseRollout": ROBOTS,
    "/vla_rl.Rollouts/RenewLease": ROBOTS,
    "/vla_rl.Rollouts/ReturnLease": ROBOTS,
    "/vla_rl.Rollouts/EnqueueRollouts": TRAINERS,
    "/vla_rl.Rollouts/CancelRollouts": TRAINERS,
    "/vla_rl.Rollouts/GetQueue": TRAINERS,
    "/vla_rl.Rollouts/StreamEpisodes": TRAINERS,
    "/vla_rl.Rollouts/CommitCursor": TRAINERS,
}
"""Who may call what; a method that is not here is for admins."""
ADMIN_PORT: Mapping[str, Roles] = {}
"""Everything there is for admins."""

COMMENT = re.compile(r"(^|\s)#.*")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may reach this server."""

    tls_cert: Path | None = None
    """Certificate (PEM) of this server, with those that lead to its authority: every port then speaks TLS only.  Read
    once, as all certificates are: a renewed one takes a restart."""

    tls_key: Path | None = None
    """The key (PEM) of it."""

    tls_client_ca: Path | None = None
    """Certificate (PEM) of an authority: whoever calls must have a certificate signed by it, probes too."""

    tokens: Path | None = None
    """File of who may call: a line `ROLE TOKEN` for each token, ROLE being robot, trainer or admin, and # before a
    comment.  It is read again when it changes.  Absent, whoever reaches a port may do all that it offers."""

    allow_public: bool = False
    """Serve an address that is not loopback without tokens or without TLS: for a network where everybody is trusted, or
    behind a proxy that asks for both."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together, got one of them")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key, got none")

    def __repr__(self) -> str:
        return given(self)

    @property
    def may_be_public(self) -> bool:
        """Whether an address may be served that others reach."""
        return self.allow_public or (self.tokens is not None and self.tls_cert is not None)

    def tls(self) -> ssl.SSLContext | None:
        """For the HTTP ports; None without a certificate.  Raises ValueError for files that are of no use."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with readable("tls_cert and tls_key", PAIR):
            context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        if self.tls_client_ca is not None:
            with readable("tls_client_ca", CERTIFICATE):
                context.load_verify_locations(self.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """The same for the gRPC ports, which say nothing of a file that is of no use: tls() has."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return grpc.ssl_server_credentials(
            [(self.tls_key.read_bytes(), self.tls_cert.read_bytes())],
            root_certificates=self.tls_client_ca.read_bytes() if self.tls_client_ca is not None else None,
            require_client_auth=self.tls_client_ca is not None,
        )


class Tokens:
    """The tokens of a file.  When the file changes it is read again; one that is of no use then changes nothing.

    Raises ValueError for a file that is of no use to begin with, in a sentence that shows nothing of it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._read_at = _stamp(path)
        self._roles = read_tokens(path)

    def role(self, token: str) -> Role | None:
        """None for a token that is none of these.  How long it takes says nothing about how near a guess is."""
        self._read_again()
        shown, found = _digest(token), None
        for digest, role in self._roles.items():
            if hmac.compare_digest(digest, shown):
                found = role
        return found

    def _read_again(self) -> None:
        if (now := _stamp(self._path)) == self._read_at:
            return
        self._read_at = now
        try:
            self._roles = read_tokens(self._path)
            log.info("the tokens have changed: %d are known", len(self._roles))
        except ValueError as error:
            log.error("the tokens stay as they were: %s", error)


class Guard:
    """Lets in whoever may come in.  Raises CannotStart when a file that Access names is of no use."""

    def __init__(self, access: Access):
        try:
            self._tokens = None if access.tokens is None else Tokens(access.tokens)
            self.tls = access.tls()
            self.server_credentials = access.server_credentials()
        except ValueError as error:
            raise CannotStart(str(error)) from None

    def check(self, authorization: str | None, roles: Collection[Role]) -> None:
        """Returns when the caller may go on.  Raises Unauthenticated or Forbidden.

        authorization: as HTTP's header has it, `Bearer TOKEN`, `Api-Key TOKEN`, or `Basic` with the token as password.
        """
        if self._tokens is None:
            return
        if not (token := _token(authorization or "")):
            raise Unauthenticated("must be a token, got none: see --token-file", field="authorization")
        role = self._tokens.role(token)
        if role is None:
            raise Unauthenticated("must be one of this server's, got another: see --token-file", field="authorization")
        if role not in roles:
            raise Forbidden(
                f"must be a token of role {_either(roles)}, got one of role {role}: see --token-file",
                field="authorization",
            )

    def doorkeepers(self, port: Mapping[str, Roles]) -> list[grpc.aio.ServerInterceptor]:
        """Interceptors for a gRPC port, behind Calls."""
        return [] if self._tokens is None else [Doorkeeper(self, port)]


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Asks the guard about every call of a gRPC port, before anything of it is read; Calls refuses what it raises."""

    def __init__(self, guard: Guard, port: Mapping[str, Roles]):
        self._guard, self._port = guard, port

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        method, metadata = handler_call_details.method, dict(handler_call_details.invocation_metadata)
        if not method.startswith(HEALTH):
            try:
                self._guard.check(metadata.get("authorization"), self._port.get(method, ADMINS))
            except Refused as refused:
                return _always(refused)
        return await continuation(handler_call_details)


def read_tokens(path: Path) -> dict[bytes, Role]:
    """SHA-256 of each token -> its role.  Raises ValueError, in a sentence that shows nothing of the file."""
    with readable("tokens", "text"):
        lines = path.read_text(encoding="utf-8").splitlines()
    roles: dict[bytes, Role] = {}
    for number, line in enumerate(lines, start=1):
        words = COMMENT.sub("", line).split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"tokens, line {number}: must be ROLE TOKEN, got {len(words)} words")
        named, token = words
        if named not in ROBOTS:
            raise ValueError(f"tokens, line {number}: the role must be {_either(ROBOTS)}, got another word")
        if not TOKEN.fullmatch(token):
            raise ValueError(f"tokens, line {number}: must be {A_TOKEN}, got {len(token)}")
        role = ROBOTS[ROBOTS.index(named)]
        if roles.setdefault(_digest(token), role) != role:
            raise ValueError(f"tokens, line {number}: a token must have one role, got a second one")
    if not roles:
        raise ValueError("tokens must hold at least one line ROLE TOKEN, got none")
    return roles


def _token(authorization: str) -> str:
    """The token of an authorization header; "" where there is none."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() in ("bearer", "api-key"):
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def _always(refused: Refused) -> grpc.RpcMethodHandler:
    """A handler of calls of any kind: as a stream is served, since a stream is refused before any of it is read."""

    async def answer(requests: Any, context: Any) -> None:
        raise refused

    return grpc.stream_stream_rpc_method_handler(answer)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Another one when the file is another or was written again; None when there is none."""
    try:
        said = path.stat()
    except OSError:
        return None
    return said.st_ino, said.st_size, said.st_mtime_ns


def _either(words: Collection[str]) -> str:
    return " or ".join(words)
