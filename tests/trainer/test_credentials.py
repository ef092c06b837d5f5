"""A run at a server that does not let everybody in: a token for each service, and no record of where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from policy_server.access import Access, Guard
from policy_server.version_store import VersionStore
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos.channel import Credentials
from rl_trainer.doctor import check_server
from rl_trainer.rollout_client import RolloutClient
from rl_trainer.rollouts import RolloutQueue
from rl_trainer.train_config import RECORD, TrainConfig, claim
from tests.certificates import Authority
from tests.server.running import RunningServer, serving
from tests.trainer.test_doctor import config_of as doctor_config
from tests.trainer.test_doctor import only
from tests.trainer.test_publisher import learn, learner_of, publishing
from tests.trainer.test_rollouts import rollout

TOKENS = {role: f"{role}-0123456789abcdef" for role in ("robot", "trainer", "admin")}


@pytest.fixture
def shown(tmp_path: Path, lab: Authority) -> dict[str, Credentials]:
    """By role."""
    folder = tmp_path / "shown"
    folder.mkdir()
    for role, token in TOKENS.items():
        (folder / role).write_text(token)
    return {role: Credentials(token_file=folder / role, tls_ca=lab.ca) for role in TOKENS}


@pytest.fixture
def server(tiny_vla: Path, tmp_path: Path, lab: Authority) -> Iterator[RunningServer]:
    pair, tokens = lab.pair("127.0.0.1"), tmp_path / "tokens"
    tokens.write_text("\n".join(f"{role} {token}" for role, token in TOKENS.items()))
    guard = Guard(Access(tokens=tokens, tls_cert=pair.cert, tls_key=pair.key))
    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=8)
    store = VersionStore(None, first=model.fingerprint(model.first))
    kept = {"episodes": tmp_path / "kept", "versions": store, "admin_port": 0}
    with serving(model, max_batch=8, queue=64, guard=guard, **kept) as server:
        yield server


def test_weights_are_published_with_a_token_of_their_own(tiny_vla: Path, server: RunningServer, shown: dict) -> None:
    learner = learner_of(tiny_vla, "lora")
    both = {"credentials": shown["trainer"], "admin_credentials": shown["admin"]}
    with publishing(server, learner, **both) as publisher:
        publisher.begin()
        learn(learner)
        assert publisher.publish(0) == 1


@pytest.mark.parametrize(
    ("policy", "admin", "sentence"),
    [
        ("trainer", "trainer", "must be a token of role admin, got one of role trainer"),
        ("trainer", None, "must be a token, got none"),
        (None, "admin", "must be a token, got none"),
    ],
)
def test_a_token_for_one_service_is_shown_to_no_other(
    tiny_vla: Path, server: RunningServer, shown: dict, lab: Authority, policy: str, admin: str, sentence: str
) -> None:
    nothing = Credentials(tls_ca=lab.ca)
    both = {"credentials": shown.get(policy, nothing), "admin_credentials": shown.get(admin, nothing)}
    at = server.address if policy is None else server.admin_address
    refused = pytest.raises(ValueError, match=rf"^{at} refused \(\w+\): authorization: {sentence}")
    with publishing(server, learner_of(tiny_vla, "lora"), **both) as publisher, refused:
        publisher.begin()


def test_a_run_asks_for_rollouts_as_a_trainer(server: RunningServer, shown: dict) -> None:
    queue = RolloutQueue(server.address, run="run", credentials=shown["trainer"])
    queue.enqueue([rollout(0)])
    assert RolloutClient(server.address, shown["trainer"]).status("run").waiting == 1
    with pytest.raises(ValueError, match="must be a token of role trainer or admin, got one of role robot"):
        RolloutQueue(server.address, run="run", credentials=shown["robot"]).enqueue([rollout(0)])


def test_sides_that_cannot_agree_on_tls_are_not_waited_for(server: RunningServer) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="wants TLS: use --tls-ca"):
        RolloutQueue(server.address, run="run").enqueue([rollout(0)])
    assert time.monotonic() - began < 60  # a server that is away is waited for five minutes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "keeps episodes"),
        ({"token_file": None}, "refuses: authorization: must be a token, got none: see --token-file"),
        ({"tls_ca": None}, "wants TLS: use --tls-ca"),
        ({"token_file": Path("nowhere")}, "token_file cannot be read"),
    ],
)
def test_the_doctor_says_what_is_missing(
    server: RunningServer, shown: dict, tiny_vla: Path, tmp_path: Path, change: dict, sentence: str
) -> None:
    credentials = replace(shown["trainer"], **change)
    config = doctor_config(tmp_path, tiny_vla, server=server.address, credentials=credentials)
    finding = only(check_server, config)
    assert finding.verdict == ("FAIL" if change else "ok") and sentence in finding.text


def test_credentials_are_for_a_server_that_is_given(tmp_path: Path, shown: dict) -> None:
    for given in ({"credentials": shown["trainer"]}, {"admin_token_file": shown["admin"].token_file}):
        with pytest.raises(ValueError, match="tokens and certificates are for a server that is given, got none"):
            TrainConfig(out=tmp_path, **given)


def test_a_runs_record_says_nothing_of_them_and_another_may_resume_it_with_others(tmp_path: Path, shown: dict) -> None:
    begun = TrainConfig(
        out=tmp_path / "run",
        server="there:1",
        admin="there:2",
        credentials=shown["trainer"],
        admin_token_file=shown["admin"].token_file,
    )
    assert begun.given_server.admin_credentials == shown["admin"]
    claim(begun)
    assert str(tmp_path / "shown") not in (begun.out / RECORD).read_text()
    claim(replace(begun, credentials=Credentials(), resume=True))
