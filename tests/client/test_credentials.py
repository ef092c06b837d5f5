"""A robot at a server that does not let everybody in: what it shows, and what it is told when that is not enough."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from policy_server.access import Access, Guard
from protos import rollout_pb2, rollout_pb2_grpc
from protos.channel import Credentials, dial
from robot_client import errors
from robot_client.__main__ import main
from robot_client.client import PolicyClient
from robot_client.doctor import Doctor, doctor
from robot_client.leases import Leases
from tests.certificates import Authority
from tests.client.test_real_server import ScriptedModel
from tests.server.running import RunningServer, serving

TOKENS = {role: f"{role}-0123456789abcdef" for role in ("robot", "trainer")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(lab: Authority, tmp_path: Path) -> Iterator[RunningServer]:
    pair, tokens = lab.pair("127.0.0.1"), tmp_path / "tokens"
    tokens.write_text("\n".join(f"{role} {token}" for role, token in TOKENS.items()))
    guard = Guard(Access(tokens=tokens, tls_cert=pair.cert, tls_key=pair.key))
    with serving(ScriptedModel(), episodes=tmp_path / "kept", guard=guard) as server:
        yield server


@pytest.fixture
def shown(lab: Authority, tmp_path: Path) -> dict[str, Credentials]:
    """By role."""
    files = {role: tmp_path / role for role in TOKENS}
    for role, path in files.items():
        path.write_text(TOKENS[role])
    return {role: Credentials(token_file=path, tls_ca=lab.ca) for role, path in files.items()}


@contextlib.contextmanager
def queue(server: RunningServer, credentials: Credentials) -> Iterator[rollout_pb2_grpc.RolloutsStub]:
    with dial(server.address, credentials) as channel:
        yield rollout_pb2_grpc.RolloutsStub(channel)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_robot_with_a_token_drives_over_tls(server, shown, tmp_path, stream):
    flags = ["--task", "bowl", "--max-ticks", "4", "--lockstep", stream]
    assert main(["run", "--server", server.address, *shown["robot"].flags, *flags]) == 0
    assert len(list((tmp_path / "kept").glob("*.episode"))) == 1


def test_a_robot_with_a_token_takes_the_leases_that_a_trainer_enqueued(server, shown):
    rollout = rollout_pb2.Rollout(rollout_id="run/0/0", task="bowl", purpose="PURPOSE_TRAIN", temperature=0.5)
    flags = ["--task", "bowl", "--leases", "--max-ticks", "2", "--lockstep"]
    with queue(server, shown["trainer"]) as rollouts:
        rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[rollout]), timeout=10)
        assert main(["run", "--server", server.address, *shown["robot"].flags, *flags]) == 0
        assert rollouts.GetQueue(rollout_pb2.GetQueueRequest(), timeout=10).done == 1


def test_the_spec_is_shown_to_whoever_is_let_in(server, shown, capsys):
    assert main(["spec", "--server", server.address, *shown["trainer"].flags]) == 0
    assert "scripted" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run --task bowl --lockstep", "spec"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tls_ca": None}, "wants TLS: use --tls-ca"),
        ({"tls_ca": None, "token_file": None}, "wants TLS: use --tls-ca"),
        ({"token_file": None}, "authorization: must be a token, got none: see --token-file"),
        ({"token_file": Path("wrong")}, "authorization: must be one of this server's, got another"),
        ({"token_file": Path("nowhere")}, "token_file cannot be read: No such file"),
    ],
)
def test_what_is_missing_is_a_sentence_and_exit_code_2_at_once(server, shown, caplog, command, change, sentence):
    Path("wrong").write_text("nobody-0123456789abcdef")
    began, credentials = time.monotonic(), replace(shown["robot"], **change)
    assert main([*command.split(), "--server", server.address, *credentials.flags]) == 2
    assert sentence in caplog.text and "Traceback" not in caplog.text
    assert time.monotonic() - began < 8  # a lost server would be tried for 10 s, or 60


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"tls_ca": None}, errors.TlsMismatch), ({"token_file": None}, errors.NotAdmitted)],
)
def test_asking_again_is_useless_and_is_not_done(server, shown, change, kind):
    credentials = replace(shown["robot"], **change)
    with PolicyClient(server.address, credentials=credentials) as client, pytest.raises(kind) as refused:
        client.spec()
    leases = Leases(server.address, worker="test", can_run=["bowl"], credentials=credentials)
    try:
        with pytest.raises(kind):
            leases.take()
    finally:
        leases.close()
    assert not refused.value.repeatable


def test_what_another_role_may_do_is_refused_by_name(server, shown):
    with queue(server, shown["robot"]) as rollouts, pytest.raises(grpc.RpcError) as refused:
        rollouts.GetQueue(rollout_pb2.GetQueueRequest(), timeout=10)
    error = errors.of_rpc(refused.value, server.address)
    assert isinstance(error, errors.NotAdmitted) and error.field == "authorization"
    assert "must be a token of role trainer or admin, got one of role robot" in str(error)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"token_file": None}, "got none: see --token-file; ask whoever keeps the server's --tokens"),
        ({"tls_ca": None}, "wants TLS: use --tls-ca"),
    ],
)
def test_the_doctor_says_what_is_missing(server, shown, capsys, change, sentence):
    credentials = replace(shown["robot"], **change)
    code = doctor(Doctor(arm="kinematic", server=server.address, credentials=credentials, record=Path()), [])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "network")
    assert line.startswith("ok" if sentence is None else "FAIL") and (sentence or "serves scripted") in line
    assert code == 0 or sentence is not None
