"""One way to dial a policy server, for robots and trainers: token, TLS, keep-alive, message size, deadlines."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 64 * 2**20
DEFAULT_PORT = 50051
DEFAULT_DEADLINE_S = 30.0
TOKEN = re.compile(r"[!-~]{16,}")
A_TOKEN = "one token, at least 16 characters (ASCII) without spaces"
CERTIFICATE, PAIR = "a certificate (PEM)", "a certificate and its key (PEM), without a pass phrase"

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A dead peer is noticed within about 15 s even while no call is under way.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # newer gRPC waits for the longer of the two, by default a minute
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect quickly: a robot holds while it waits.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two clients in one process must not share a connection: one robot's flow control is not another's.
    ("grpc.use_local_subchannel_pool", 1),
]

REMEDIES = {
    9: "set the clocks of both machines",
    10: "renew it, or set this machine's clock",
    62: "dial a name that is in it, or renew it with this one",
    64: "dial an address that is in it, or renew it with this one",
}
"""OpenSSL's verify code -> what to do: not valid yet, expired, another name's, another address's."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the server is shown, and whose server it must be; nothing given: no token, no encryption."""

    token_file: Path | None = None
    """File with the token that the server knows this client by, and nothing else."""
    tls_ca: Path | None = None
    """Certificate (PEM) of the authority that signed the server's.  Given, every call is encrypted."""
    tls_cert: Path | None = None
    """This client's own certificate (PEM), for a server that wants one."""
    tls_key: Path | None = None
    """The key (PEM) of it."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together, got one of them")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ValueError("tls_cert needs tls_ca, to know the servers that may see it, got none")

    def __repr__(self) -> str:
        return given(self)

    @property
    def flags(self) -> list[str]:
        """What a child process is told: where the files are, never what is in them."""
        paths = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return [word for name, path in paths.items() if path is not None for word in (f"--{name}", str(path))]

    def token(self) -> str:
        """The token; "" without a file of it.  Raises ValueError, in a sentence that shows nothing of the file."""
        if self.token_file is None:
            return ""
        with readable("token_file", "text"):
            token = self.token_file.read_text(encoding="ascii").strip()
        if not TOKEN.fullmatch(token):
            raise ValueError(f"token_file must hold {A_TOKEN}, got {len(token)} characters")
        return token

    def token_for(self, host: str) -> str:
        """The same.  Raises ValueError too where it would leave this machine unencrypted."""
        token = self.token()
        if token and self.tls_ca is None and not is_loopback(host):
            raise ValueError(f"a token must not travel to {host} unencrypted: use --tls-ca")
        return token

    def tls(self) -> ssl.SSLContext | None:
        """How to speak TLS to the server; None where calls are not encrypted.  Raises ValueError as token() does."""
        if self.tls_ca is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with readable("tls_ca", CERTIFICATE):
            context.load_verify_locations(self.tls_ca)
        if self.tls_cert is not None:
            with readable("tls_cert and tls_key", PAIR):
                context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        return context


def given(files: Any) -> str:
    """A dataclass of files and choices for a log: which of them are given, never where they are."""
    names = [field.name for field in fields(files) if getattr(files, field.name)]
    return f"{type(files).__name__}({', '.join(names)})"


@contextlib.contextmanager
def readable(name: str, expected: str) -> Iterator[None]:
    """Turns a file that cannot be read, or holds something else, into a ValueError that shows neither path nor file."""
    try:
        yield
    except (ssl.SSLError, UnicodeDecodeError):
        raise ValueError(f"{name} must be {expected}, got something else") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def dial(address: str, credentials: Credentials | None = None) -> grpc.Channel:
    """A channel to `HOST:PORT` (the port defaults to 50051).  Lazy: the first call connects.

    Raises ValueError for an address that is not HOST or HOST:PORT, for credentials that are of no use, and for a token
    that would leave this machine unencrypted.
    """
    host, port = endpoint(address)
    credentials = credentials or Credentials()
    token, is_encrypted = credentials.token_for(host), credentials.tls() is not None
    # No proxy is to see what stays on this machine.
    options = [*OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(host)))]
    if is_encrypted:
        channel = grpc.secure_channel(f"{host}:{port}", _channel_credentials(credentials), options=options)
    else:
        channel = grpc.insecure_channel(f"{host}:{port}", options=options)
    return grpc.intercept_channel(channel, _Bearer(token)) if token else channel


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of `HOST` or `HOST:PORT`.  Raises ValueError for anything else."""
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(DEFAULT_PORT))
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"a server address must be HOST:PORT with a port in 1..65535, got {address!r}")
    return host, int(port)


def address_of(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine, whoever answers for names."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def tls_trouble(address: str, credentials: Credentials | None = None, *, wait_s: float = 2.0) -> str:
    """Why the two sides cannot agree on TLS, and what to do, in a sentence; "" where that is not the trouble.

    gRPC says only that it could not connect.  This asks the server, for up to wait_s.
    """
    host, port = endpoint(address)
    tls = (credentials or Credentials()).tls()
    try:
        is_tls, goes_on = _greet(host.strip("[]"), port, tls or _trusting(), wait_s)
    except ssl.SSLCertVerificationError as error:
        remedy = REMEDIES.get(error.verify_code, "--tls-ca must be the authority that signed it")
        return f"{address} shows a certificate that is not good ({error.verify_message.rstrip('.')}): {remedy}"
    except OSError:  # nobody is there
        return ""
    if tls is None:
        hint = "use --tls-ca, the certificate of the authority that signed its own"
        return f"{address} wants TLS: {hint}" if is_tls else ""
    if not is_tls:
        return f"{address} speaks no TLS: serve it with --tls-cert and --tls-key, or leave out --tls-ca"
    return "" if goes_on else f"{address} wants another certificate of this client: see --tls-cert and --tls-key"


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows the token with every call.  (gRPC's own call credentials know no unencrypted channel, be it loopback.)"""

    def __init__(self, token: str):
        self._shown = ("authorization", f"Bearer {token}")

    # gRPC calls by position.
    def _show(self, call: Any, details: Any, request: Any) -> Any:
        return call(details._replace(metadata=[*(details.metadata or ()), self._shown]), request)

    intercept_unary_unary = intercept_unary_stream = _show  # pyright: ignore[reportAssignmentType]
    intercept_stream_unary = intercept_stream_stream = _show  # pyright: ignore[reportAssignmentType]


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """The same files for gRPC, which says nothing of one that is no PEM: tls() has."""
    files = (credentials.tls_ca, credentials.tls_key, credentials.tls_cert)
    return grpc.ssl_channel_credentials(*(None if path is None else path.read_bytes() for path in files))


def _trusting() -> ssl.SSLContext:
    """Only to hear whether somebody speaks TLS: nothing is sent to him."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _greet(host: str, port: int, context: ssl.SSLContext, wait_s: float) -> tuple[bool, bool]:
    """Whether the server speaks TLS, and whether it goes on once it has seen our certificate, or that we have none.

    Raises SSLCertVerificationError when its own is not good, OSError when nobody is there.
    """
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout=wait_s) as link:
        try:
            greeted = context.wrap_socket(link, server_hostname=host)
        except (ssl.SSLCertVerificationError, ssl.SSLEOFError):
            raise
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or ""), False
        with greeted:
            try:
                return True, greeted.recv(1) != b""
            except TimeoutError:  # it waits for us to speak
                return True, True
            except OSError:
                return True, False
