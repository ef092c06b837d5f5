"""Who may do what: each role on each port, without, with a wrong and with the right credential; and TLS, both sides."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import logging
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from policy_server import access as access_module
from policy_server.__main__ import main
from policy_server.access import ADMINS, POLICY_PORT, ROBOTS, TRAINERS, Access, Guard, Tokens
from policy_server.config import ServeConfig
from policy_server.errors import CannotStart, Forbidden, Unauthenticated
from policy_server.refusals import REFUSAL_KEY
from protos import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc, rollout_pb2
from protos.channel import Credentials, dial, tls_trouble
from robot_client.errors import TlsMismatch, looked_into, of_rpc
from tests.certificates import Authority
from tests.server.fake_admin import administered
from tests.server.running import RunningServer
from tests.server.test_operations import command, one_sentence

TOKENS = {role: f"{role}-0123456789abcdef" for role in ("robot", "trainer", "admin")}
WRONG = "nobody-0123456789abcdef"
SHOWN = {"nothing": None, "a wrong token": WRONG, **TOKENS}
SERVICES = {
    "policy": [
        policy_pb2.DESCRIPTOR.services_by_name["Policy"],
        rollout_pb2.DESCRIPTOR.services_by_name["Rollouts"],
    ],
    "admin": [admin_pb2.DESCRIPTOR.services_by_name["Admin"]],
}
EVERY_PORT = [health_pb2.DESCRIPTOR.services_by_name["Health"], *reflection_pb2.DESCRIPTOR.services_by_name.values()]
METHODS = [
    pytest.param(port, method, id=f"{port} {service.name}.{method.name}")
    for port, services in SERVICES.items()
    for service in [*services, *EVERY_PORT]
    for method in service.methods
]
PATHS = {
    ("http", "/"): {"trainer", "admin"},
    ("http", "/state"): {"trainer", "admin"},
    ("http", "/metrics"): {"trainer", "admin"},
    ("http", "/healthz"): {*SHOWN},
    ("openpi", "/"): {"robot", "trainer", "admin"},
    ("openpi", "/healthz"): {*SHOWN},
}
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


@contextlib.contextmanager
def running(access: Access) -> Iterator[RunningServer]:
    """With every port there is."""
    with administered(guard=Guard(access), http_port=0, openpi_port=0) as (server, _):
        yield server


def written(folder: Path, text: str) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return written(tmp_path, "# our lab\n" + "\n".join(f"{role} {token}" for role, token in TOKENS.items()))


@pytest.fixture
def server(tokens: Path) -> Iterator[RunningServer]:
    with running(Access(tokens=tokens)) as server:
        yield server


def address_of(server: RunningServer, port: str) -> str:
    if port == "policy":
        return server.address
    return f"127.0.0.1:{getattr(server.server, f'{port}_port')}"


def let_in(port: str, method: MethodDescriptor) -> set[str]:
    """The contract: who may call it."""
    service = method.containing_service.name
    if service == "Health":
        return {*SHOWN}
    if port == "admin":
        return {"admin"}
    if service == "Rollouts" and method.name not in ("LeaseRollout", "RenewLease", "ReturnLease"):
        return {"trainer", "admin"}
    return {"robot", "trainer", "admin"}


def told(address: str, method: MethodDescriptor, token: str | None) -> tuple[grpc.StatusCode, policy_pb2.Refusal]:
    """What becomes of a call that says nothing; with a refusal where there is one."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    path = f"/{method.containing_service.full_name}/{method.name}"
    # Draining is no way to treat a server that others still have to ask, nor is sleep: those requests cannot be read.
    request = b"\xff" if method.name in ("Drain", "Sleep") else b""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(path)(iter([request]), metadata=metadata, timeout=20)
        try:
            next(call, None)
            return grpc.StatusCode.OK, policy_pb2.Refusal()
        except grpc.RpcError:
            said = dict(call.trailing_metadata() or ()).get(REFUSAL_KEY, b"")
            return call.code(), policy_pb2.Refusal.FromString(said)
        finally:
            call.cancel()


@pytest.mark.parametrize(("port", "method"), METHODS)
def test_each_role_on_each_port_may_do_what_the_contract_says_and_no_more(server, port, method):
    for who, token in SHOWN.items():
        code, refusal = told(address_of(server, port), method, token)
        if who in let_in(port, method):
            assert code not in REFUSED, who
            continue
        expected = grpc.StatusCode.PERMISSION_DENIED if who in TOKENS else grpc.StatusCode.UNAUTHENTICATED
        assert (code, refusal.code, refusal.field) == (expected, expected.value[0], "authorization"), who
        assert refusal.message.startswith("must be ") and refusal.retry_after_ms == 0, who


@pytest.mark.parametrize("scheme", ["Bearer", "Api-Key", "Basic"])
@pytest.mark.parametrize(("port", "path"), PATHS)
def test_each_role_on_each_http_port_may_see_what_the_contract_says_and_no_more(server, port, path, scheme):
    for who, token in SHOWN.items():
        shown = None if token is None else basic(token) if scheme == "Basic" else f"{scheme} {token}"
        connection = http.client.HTTPConnection(address_of(server, port), timeout=20)
        code, _ = asked_over_http(connection, path, shown)
        refused = 403 if who in TOKENS else 401
        assert code not in (401, 403) if who in PATHS[port, path] else code == refused, who


def asked_over_http(
    connection: http.client.HTTPConnection, path: str, authorization: str | None = None
) -> tuple[int, str]:
    """Status, and all that is heard besides."""
    with contextlib.closing(connection):
        connection.request("GET", path, headers={} if authorization is None else {"Authorization": authorization})
        response = connection.getresponse()
        return response.status, f"{response.getheaders()} {response.read()}"


@pytest.mark.parametrize(("port", "method"), METHODS)
def test_without_tokens_whoever_reaches_a_port_may_do_what_it_offers(port, method):
    with running(Access()) as server:
        assert told(address_of(server, port), method, None)[0] not in REFUSED


def test_the_right_token_is_answered_on_each_port(server, tmp_path):
    with dial(server.address, Credentials(token_file=written(tmp_path, TOKENS["robot"]))) as channel:
        assert policy_pb2_grpc.PolicyStub(channel).GetSpec(policy_pb2.GetSpecRequest(), timeout=10).model == "fake"
    with dial(server.admin_address, Credentials(token_file=written(tmp_path, TOKENS["admin"]))) as channel:
        assert admin_pb2_grpc.AdminStub(channel).ListVersions(admin_pb2.ListVersionsRequest(), timeout=10).live == 0


def test_the_table_names_every_method_of_the_policy_port():
    named = {f"/{service.full_name}/{method.name}" for service in SERVICES["policy"] for method in service.methods}
    assert named == {method for method in POLICY_PORT if method.startswith("/vla_rl.")}


def test_a_robot_that_asks_for_newer_reflection_is_told_that_there_is_none(server):
    """And then asks for the older, as grpcurl does."""
    ask = server.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as refused:
        next(ask(iter([b""]), metadata=[("authorization", f"Bearer {TOKENS['robot']}")], timeout=20))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["Act", "ActStream"])
def test_a_call_is_refused_before_any_of_it_has_arrived(server, method):
    never = threading.Event()
    try:
        call = server.channel.stream_stream(f"/vla_rl.Policy/{method}")(iter(never.wait, True), timeout=20)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        never.set()


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


HEADERS = {
    f"Bearer {TOKENS['trainer']}": None,
    f"bearer {TOKENS['admin']}": None,
    f"Api-Key {TOKENS['trainer']}": None,
    basic(TOKENS["trainer"]): None,
    f"Bearer {TOKENS['robot']}": Forbidden,
    basic(TOKENS["robot"]): Forbidden,
    f"Bearer {WRONG}": Unauthenticated,
    f"Bearer {TOKENS['trainer']}x": Unauthenticated,
    f"Bearer {TOKENS['trainer'][:-1]}": Unauthenticated,
    "Bearer": Unauthenticated,
    "Bearer träiner": Unauthenticated,
    "Bearer \udcff": Unauthenticated,
    TOKENS["trainer"]: Unauthenticated,
    f"Digest {TOKENS['trainer']}": Unauthenticated,
    "Basic ????": Unauthenticated,
    "Basic /w==": Unauthenticated,
    "Basic ü": Unauthenticated,
    "": Unauthenticated,
    None: Unauthenticated,
}


@pytest.mark.parametrize("header", HEADERS)
def test_an_authorization_header_is_read_as_http_has_it(tokens, header):
    guard, refusal = Guard(Access(tokens=tokens)), HEADERS[header]
    if refusal is None:
        guard.check(header, TRAINERS)
    else:
        with pytest.raises(refusal):
            guard.check(header, TRAINERS)


def test_every_token_is_compared_in_constant_time_whichever_is_shown(tokens, monkeypatch):
    compared = []
    compare = access_module.hmac.compare_digest
    monkeypatch.setattr(access_module.hmac, "compare_digest", lambda *two: compared.append(two) or compare(*two))
    known = Tokens(tokens)
    assert [known.role(token) for token in [*TOKENS.values(), WRONG]] == ["robot", "trainer", "admin", None]
    assert len(compared) == 4 * len(TOKENS) and {len(one) for two in compared for one in two} == {32}


def test_a_file_of_tokens_that_changes_is_read_again(tokens, caplog):
    caplog.set_level(logging.INFO)
    guard = Guard(Access(tokens=tokens))
    guard.check(f"Bearer {TOKENS['robot']}", ROBOTS)
    written(tokens.parent, f"robot {WRONG} # the arm by the window\n")
    guard.check(f"Bearer {WRONG}", ROBOTS)
    with pytest.raises(Unauthenticated):
        guard.check(f"Bearer {TOKENS['robot']}", ROBOTS)
    assert "1 are known" in caplog.text


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("robot"), lambda path: path.unlink()])
def test_a_file_that_is_spoiled_while_serving_changes_nothing_and_is_reported_once(tokens, caplog, spoil):
    guard = Guard(Access(tokens=tokens))
    spoil(tokens)
    for _ in range(3):
        guard.check(f"Bearer {TOKENS['admin']}", ADMINS)
        with pytest.raises(Unauthenticated):
            guard.check(f"Bearer {WRONG}", ADMINS)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "the tokens stay as they were" in record.getMessage()
    assert str(tokens.parent) not in caplog.text


NO_TOKENS = {
    "": "must hold at least one line ROLE TOKEN, got none",
    "# robot 0123456789abcdef\n\n": "must hold at least one line ROLE TOKEN, got none",
    "robot": "line 1: must be ROLE TOKEN, got 1 words",
    "robot 0123456789abcdef left arm": "line 1: must be ROLE TOKEN, got 4 words",
    "# ours\nrobot 0123456789abcde": "line 2: must be one token, at least 16 characters (ASCII) without spaces, got 15",
    "robot 0123456789abcdéf": "line 1: must be one token, at least 16 characters (ASCII) without spaces, got 16",
    "operator 0123456789abcdef": "line 1: the role must be robot or trainer or admin, got another word",
    "0123456789abcdef robot": "line 1: the role must be robot or trainer or admin, got another word",
    "robot 0123456789abcdef\nadmin 0123456789abcdef": "line 2: a token must have one role, got a second one",
}


@pytest.mark.parametrize("text", NO_TOKENS)
def test_a_file_of_tokens_that_is_of_no_use_refuses_to_start_and_shows_nothing_of_it(tmp_path, capsys, text):
    path = written(tmp_path, text)
    one_sentence(["serve", "--tokens", str(path)], NO_TOKENS[text], capsys)
    with pytest.raises(CannotStart) as refused:
        Guard(Access(tokens=path))
    assert not {word for word in re.findall(r"\S{6,}", text)} & {*str(refused.value).split()}
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "tokens cannot be read: No such file or directory"),
        (lambda path: path.unlink() or path.mkdir(), "tokens cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"robot \xff\xff"), "tokens must be text, got something else"),
    ],
)
def test_tokens_that_cannot_be_read_refuse_to_start(tokens, capsys, spoil, sentence):
    spoil(tokens)
    one_sentence(["serve", "--tokens", str(tokens)], sentence, capsys)


def encrypted(path: Path) -> Path:
    """The same key, under a pass phrase."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    layout, format = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = path.with_suffix(".locked")
    locked.write_bytes(key.private_bytes(layout, format, serialization.BestAvailableEncryption(b"sesame")))
    return locked


def test_certificates_that_are_of_no_use_refuse_to_start(lab: Authority, tmp_path, capsys):
    ours, other = lab.pair("127.0.0.1"), lab.pair("other.lab")
    nowhere, junk = tmp_path / "nowhere", written(tmp_path, "-----BEGIN CERTIFICATE-----\nnone\n")
    pair = "tls_cert and tls_key must be a certificate and its key (PEM), without a pass phrase"
    for cert, key, authority, sentence in [
        (nowhere, ours.key, lab.ca, "tls_cert and tls_key cannot be read: No such file"),
        (ours.cert, nowhere, lab.ca, "tls_cert and tls_key cannot be read: No such file"),
        (junk, ours.key, lab.ca, pair),
        (ours.cert, other.key, lab.ca, pair),
        (ours.cert, encrypted(ours.key), lab.ca, pair),
        (ours.cert, ours.key, nowhere, "tls_client_ca cannot be read: No such file"),
        (ours.cert, ours.key, junk, "tls_client_ca must be a certificate (PEM), got something else"),
    ]:
        files = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority)]
        one_sentence(["serve", *files], sentence, capsys)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tls-cert", "x"], "tls_cert and tls_key must be given together"),
        (["--tls-key", "x"], "tls_cert and tls_key must be given together"),
        (["--tls-client-ca", "x"], "tls_client_ca needs tls_cert and tls_key"),
        (["--host", "0.0.0.0"], "host must be a loopback address"),
        (["--host", "::"], "host must be a loopback address"),
        (["--host", "robots.lab"], "host must be a loopback address"),
        (["--host", "192.168.1.7", "--tokens", "x"], "host must be a loopback address"),
        (["--host", "192.168.1.7", "--tls-cert", "x", "--tls-key", "x"], "host must be a loopback address"),
    ],
)
def test_what_would_be_open_to_others_is_not_served(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *flags])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_public_address_is_served_with_tokens_and_tls_or_when_told_to():
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"):
        assert ServeConfig(host=host).host == host.strip("[]")
    ServeConfig(host="0.0.0.0", access=Access(allow_public=True))
    ServeConfig(host="0.0.0.0", access=Access(tokens=Path("x"), tls_cert=Path("x"), tls_key=Path("x")))


PLAIN, TLS, MUTUAL = "plain", "TLS", "mutual TLS"
SIDES = [
    (PLAIN, PLAIN, ""),
    (TLS, TLS, ""),
    (MUTUAL, MUTUAL, ""),
    (TLS, PLAIN, "wants TLS: use --tls-ca"),
    (MUTUAL, PLAIN, "wants TLS: use --tls-ca"),
    (PLAIN, TLS, "speaks no TLS: serve it with --tls-cert and --tls-key, or leave out --tls-ca"),
    ("expired", TLS, "certificate has expired"),
    ("another's name", TLS, "dial an address that is in it"),
    (TLS, "TLS of another lab", "--tls-ca must be the authority that signed it"),
    (MUTUAL, TLS, "wants another certificate of this client: see --tls-cert and --tls-key"),
    (MUTUAL, "mutual TLS, expired", "wants another certificate of this client"),
    (MUTUAL, "mutual TLS of another lab", "wants another certificate of this client"),
]


def served_as(how: str, lab: Authority) -> Access:
    if how == PLAIN:
        return Access()
    pair = lab.pair("elsewhere.lab" if how == "another's name" else "127.0.0.1", expired=how == "expired")
    return Access(tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=lab.ca if how == MUTUAL else None)


def dialed_as(how: str, lab: Authority, other_lab: Authority) -> Credentials:
    if how == PLAIN:
        return Credentials()
    if not how.startswith(MUTUAL):
        return Credentials(tls_ca=(other_lab if "another lab" in how else lab).ca)
    pair = (other_lab if "another lab" in how else lab).pair("robot-7", expired="expired" in how)
    return Credentials(tls_ca=lab.ca, tls_cert=pair.cert, tls_key=pair.key)


def trouble(port: str, address: str, credentials: Credentials) -> str:
    """What a client is told that asks how the server is; "" when it is answered."""
    if port in ("http", "openpi"):
        tls, connect = credentials.tls(), http.client.HTTPConnection
        if tls is not None:
            connect = functools.partial(http.client.HTTPSConnection, context=tls)
        try:
            return "" if asked_over_http(connect(address, timeout=20), "/healthz")[0] == 200 else "another answer"
        except (OSError, http.client.HTTPException):
            return tls_trouble(address, credentials)
    with dial(address, credentials) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            return ""
        except grpc.RpcError as failure:
            error = looked_into(of_rpc(failure, address), address, credentials)
    assert isinstance(error, TlsMismatch) and not error.repeatable, error
    return str(error)


@pytest.mark.parametrize("port", ["policy", "admin", "http", "openpi"])
@pytest.mark.parametrize(("serves", "dials", "says"), SIDES)
def test_both_sides_of_tls_agree_or_the_client_says_what_to_do(lab, other_lab, port, serves, dials, says):
    with running(served_as(serves, lab)) as server:
        address = address_of(server, port)
        told = trouble(port, address, dialed_as(dials, lab, other_lab))
    assert (told.startswith(f"{address} ") and says in told) if says else told == ""
    assert str(lab.ca.parent) not in told


def test_no_token_certificate_path_or_traceback_is_ever_logged_or_sent(tiny_vla, lab, tmp_path):
    vault = tmp_path / "vault"
    vault.mkdir()
    pair = lab.pair("127.0.0.1")
    tokens = written(vault, "\n".join(f"{role} {token}" for role, token in TOKENS.items()))
    flags = ["--tokens", tokens, "--tls-cert", pair.cert, "--tls-key", pair.key]
    flags += ["--admin-port", 0, "--openpi-port", 0, "--http-port", 0]
    heard, logged = [], tmp_path / "log"
    with logged.open("w") as log:
        process = subprocess.Popen(command("--model", tiny_vla, *flags), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        ports = [process.stdout.readline().split()[1] for _ in range(4)]
        for address in ports[2:]:
            for token in SHOWN.values():
                for shown in (None, token and f"Bearer {token}", token and basic(token)):
                    tls = Credentials(tls_ca=lab.ca).tls()
                    heard.append(str(asked_over_http(http.client.HTTPSConnection(address, context=tls), "/", shown)))
            with contextlib.suppress(OSError, http.client.HTTPException):
                asked_over_http(http.client.HTTPConnection(address, timeout=20), "/")
        for address in ports[:2]:
            for token in SHOWN.values():
                shown = None if token is None else written(tmp_path, token)
                heard.append(asked(address, Credentials(token_file=shown, tls_ca=lab.ca)))
            heard.append(asked(address, Credentials()))
        tokens.write_text("spoiled")
        heard.append(asked(ports[0], Credentials(token_file=written(tmp_path, WRONG), tls_ca=lab.ca)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0
    finally:
        process.kill()
    said = "\n".join([*heard, *ports, process.stdout.read(), logged.read_text()])
    assert "the tokens stay as they were" in said and "must be one of this server's" in said
    secret = [*TOKENS.values(), WRONG, *pair.cert.read_text().split(), *pair.key.read_text().split()]
    for unsaid in [*secret, str(vault), str(lab.ca.parent), "Traceback"]:
        assert unsaid not in said, unsaid


def asked(address: str, credentials: Credentials) -> str:
    """All that a caller of GetSpec, there or not, gets to hear."""
    with dial(address, credentials) as channel:
        try:
            return str(policy_pb2_grpc.PolicyStub(channel).GetSpec(policy_pb2.GetSpecRequest(), timeout=20).model)
        except grpc.RpcError as error:
            return f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
