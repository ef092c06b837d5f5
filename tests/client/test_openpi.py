"""OpenpiClient: any policy behind openpi's protocol drives an arm, by the laws that hold for a server of ours."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from policy_server.access import Access, Guard
from protos.channel import Credentials, free_port
from robot_client import errors
from robot_client.__main__ import main
from robot_client.arm import ACTION_NAMES, Observation
from robot_client.connect import connect
from robot_client.drivers import run_lockstep, run_real_time
from robot_client.episode import EpisodeConfig
from robot_client.openpi import OpenpiClient, parse_address, understood
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.test_client import LOOK
from tests.client.test_real_server import ScriptedModel, Ticks
from tests.openpi_wire import StockServer
from tests.server.running import serving

K = 3
CAMERAS = ("agentview", "robot0_eye_in_hand")
ARM = spec_of(image_names=CAMERAS)


class Policy:
    """Answers its n-th question by (0.1 n, 0, ...) for K ticks, LIBERO's gripper opening; `script` has others."""

    def __init__(self):
        self.asked = self.most_in_flight = self._in_flight = 0
        self.script: list = []
        self.delay_s: list[float] = []

    def __call__(self, observation: dict) -> dict:
        self.asked += 1
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        time.sleep(self.delay_s.pop(0) if self.delay_s else 0)
        self._in_flight -= 1
        answer = self.script.pop(0) if self.script else None
        if isinstance(answer, Exception):
            raise answer
        return {"actions": actions(self.asked)} if answer is None else answer


def actions(number: int, *, dtype=np.float64) -> np.ndarray:
    return np.tile(np.array([0.1 * number, 0, 0, 0, 0, 0, -1], dtype), (K, 1))


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def stock(policy):
    server = StockServer(policy)
    yield server
    server.stop()


@pytest.fixture
def client(stock):
    with OpenpiClient(stock.address, deadline_s=5, give_up_after_s=5) as client:
        yield client


@pytest.fixture
def opened(client) -> str:
    client.spec()
    return client.start_episode(rollout_of(), ARM).episode_id


def look(**changes) -> Observation:
    images = {name: np.full((16, 16, 3), 7, np.uint8) for name in CAMERAS}
    values = {"images": images, "state_S": np.arange(8, dtype=np.float32), "instruction": "pick up the bowl"}
    return Observation(**{**values, "capture_time_ns": 12345, **changes})


def test_an_arm_does_the_same_through_either_door_of_our_server():
    done = {}
    with serving(ScriptedModel(), openpi_port=0) as server:
        for door in (server.address, f"openpi://127.0.0.1:{server.server.openpi_port}"):
            client, watch = connect(door), Ticks()
            (result,) = run_lockstep([FakeArm()], [rollout_of()], client, observers=lambda _, watch=watch: [watch])
            done[door] = watch.ticks, client.spec()
            client.close()
            assert (result.ticks, result.decisions) == (12, 3)
    (own, own_spec), (other, other_spec) = done.values()
    assert [(t.decision, t.index, t.source) for t in own] == [(t.decision, t.index, t.source) for t in other]
    np.testing.assert_allclose([t.action for t in own], [t.action for t in other], atol=1e-6)
    for name in ("action_names", "image_names", "state_names", "chunk_length", "tick_rate_hz"):
        assert getattr(own_spec, name) == getattr(other_spec, name)
    assert other_spec.low_A.tolist() == [-1] * 6 + [0] and other_spec.high_A.tolist() == [1] * 7
    assert list(other_spec.message.versions) == [0] and not other_spec.message.stores_episodes


def test_our_servers_keys_and_gripper_need_not_be_told():
    keys = {"agentview": "front", "state": "joints", "prompt": "task"}
    with (
        serving(ScriptedModel(), openpi_port=0, openpi_keys=keys, openpi_gripper="policy") as server,
        OpenpiClient(f"openpi://127.0.0.1:{server.server.openpi_port}") as client,
    ):
        (result,) = run_lockstep([arm := FakeArm()], [rollout_of()], client)
    assert result.outcome == "failure" and result.clips == 0 and len(arm.applied) == 12
    assert all(action_A[6] > 0.99 for action_A in arm.applied)


def test_of_any_other_server_a_libero_policy_is_taken_for_granted(client, stock, policy):
    spec = client.spec()
    assert (spec.action_names, spec.chunk_length) == (ACTION_NAMES, K)
    assert (spec.image_names, len(spec.state_names)) == (CAMERAS, 8)
    (result,) = run_lockstep([arm := FakeArm(ARM)], [rollout_of(max_ticks=2 * K)], client)
    assert (result.outcome, result.ticks, result.decisions, result.version) == ("failure", 2 * K, 2, 0)
    moves = [number for number in (2, 3) for _ in range(K)]
    np.testing.assert_allclose(arm.applied, [[0.1 * n, 0, 0, 0, 0, 0, 1] for n in moves], atol=1e-6)
    black, first, _ = stock.observations
    assert set(first) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert first["observation/image"].dtype == np.uint8 and first["observation/image"].shape == (16, 16, 3)
    assert first["observation/state"].shape == (8,) and first["prompt"] == "pick up the bowl"
    assert not black["observation/image"].any() and black["observation/image"].shape == (256, 256, 3)


def test_the_address_says_what_is_different(stock, policy):
    address = f"{stock.address}?agentview=cam/front&robot0_eye_in_hand=&state=&prompt=task&gripper=policy"
    policy.script = [{"actions": actions(0) + np.array([0, 0, 0, 0, 0, 0, 1.5])}] * 2
    with OpenpiClient(address) as client:
        assert (client.spec().image_names, client.spec().state_names) == (("agentview",), ())
        (result,) = run_lockstep([arm := FakeArm()], [rollout_of(max_ticks=K)], client)
    assert result.outcome == "failure"
    assert set(stock.observations[-1]) == {"cam/front", "task"}
    np.testing.assert_allclose(arm.applied, [[0, 0, 0, 0, 0, 0, 0.5]] * K)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("openpi://", "must be openpi://HOST:PORT"),
        ("openpi://host:port", "HOST:PORT with a port"),
        ("openpi://host:8000/policy", "must be openpi://HOST:PORT"),
        ("openpi://host?gripper=wide", r"gripper must be one of \['libero', 'policy'\], got 'wide'"),
        ("openpi://host?agentview", "bad query field"),
    ],
)
def test_an_address_that_is_none_is_refused(address, sentence):
    with pytest.raises(errors.RobotError, match=sentence):
        connect(address)


def test_the_port_defaults_to_openpis_own():
    assert parse_address("openpi://robot.local") == ("robot.local:8000", {})


BAD = {
    "not finite": ({"actions": actions(1) * [1, np.nan, 1, 1, 1, 1, 1]}, "actions: must be finite, got .* for tick 0"),
    "infinite": ({"actions": actions(1) + np.array([0, 0, 0, 0, 0, 0, np.inf])}, "actions: must be finite"),
    "beyond float32": ({"actions": actions(1) + np.array([1e300, 0, 0, 0, 0, 0, 0])}, "actions: must be finite"),
    "too wide": ({"actions": np.zeros((K, 32))}, r"actions: shape must be \(3, 7\), got \(3, 32\)"),
    "one tick": ({"actions": np.zeros(7)}, r"actions: shape must be \(3, 7\), got \(7,\)"),
    "another number of ticks": ({"actions": np.zeros((K + 1, 7))}, r"actions: shape must be \(3, 7\), got \(4, 7\)"),
    "a list": ({"actions": [[0.0] * 7] * K}, "actions: must be an array of numbers, got list"),
    "truths": ({"actions": np.ones((K, 7), bool)}, "actions: must be an array of numbers"),
    "none": ({"policy_timing": {"infer_ms": 1.0}}, "actions: must be an array of numbers, got NoneType"),
}


@pytest.mark.parametrize("what", BAD)
def test_the_arm_never_moves_on_an_answer_that_is_no_chunk_of_finite_actions(client, policy, what):
    answer, sentence = BAD[what]
    client.spec()
    policy.script = [answer]
    (result,) = run_lockstep([arm := FakeArm(ARM)], [rollout_of()], client)
    assert result.outcome == "error" and result.message.startswith("BadAnswer: ")
    with pytest.raises(errors.BadAnswer, match=sentence):
        raise errors.BadAnswer(result.message.removeprefix("BadAnswer: "))
    assert not arm.applied


def test_an_answer_that_says_nothing_of_a_chunk_is_refused_before_anything_moves(client, policy):
    policy.script = [{"actions": np.zeros((0, 7))}]
    with pytest.raises(errors.BadAnswer, match=r"shape must be \(any, 7\), got \(0, 7\)"):
        client.spec()


def test_a_gripper_that_is_regressed_a_little_beyond_its_ends_opens_and_closes(client, policy):
    client.spec()
    policy.script = [{"actions": actions(0) * 1.05}, {"actions": actions(0) * -1.05}]
    (result,) = run_lockstep([arm := FakeArm(ARM)], [rollout_of(max_ticks=2 * K)], client)
    assert (result.outcome, result.holds, result.clips) == ("failure", 0, 0)
    assert [action_A[6] for action_A in arm.applied] == [1] * K + [0] * K


def test_a_late_answer_is_never_taken_for_the_next_ones(client, policy, opened):
    policy.delay_s = [0.6]
    with pytest.raises(errors.DeadlineExceeded):
        client.ask(opened, 0, look(), deadline_s=0.2).result(5)
    answer = client.ask(opened, 0, look()).result(5)
    np.testing.assert_allclose(answer.actions_KA[0, 0], 0.3, atol=1e-6)  # the black picture was the first
    assert (answer.decision, answer.capture_time_ns) == (0, 12345)


def test_an_answer_that_nobody_waits_for_any_more_is_never_taken_for_the_next_ones(client, policy, opened):
    policy.delay_s = [0.4]
    pending = client.ask(opened, 0, look())
    time.sleep(0.1)
    assert pending.cancel()
    np.testing.assert_allclose(client.ask(opened, 0, look()).result(5).actions_KA[0, 0], 0.3, atol=1e-6)


def test_an_arm_in_real_time_holds_through_late_answers_and_goes_on(client, policy):
    client.spec()
    policy.delay_s = [0.0, 0.5]
    arm = FakeArm(spec_of(image_names=CAMERAS, lockstep=False))
    config = EpisodeConfig(max_age_s=0.3)
    (result,) = run_real_time(arm, [rollout_of(max_ticks=40)], client, config)
    assert result.outcome == "failure" and result.holds > 5 and result.decisions > 3


def test_a_traceback_is_a_server_fault_told_by_its_last_line(client, policy, opened):
    policy.script = [KeyError("observation/depth")]
    with pytest.raises(errors.ServerFault, match=r"^KeyError: 'observation/depth'$"):
        client.ask(opened, 0, look()).result(5)


def test_after_a_traceback_and_a_closed_connection_the_next_question_is_answered(client, policy):
    client.spec()
    policy.script = [RuntimeError("out of memory")]
    (result,) = run_lockstep([FakeArm(ARM)], [rollout_of(max_ticks=K)], client)
    assert (result.outcome, result.decisions) == ("failure", 1)


def test_a_refusal_of_our_server_is_a_typed_error():
    with (
        serving(ScriptedModel(), openpi_port=0) as server,
        OpenpiClient(f"openpi://127.0.0.1:{server.server.openpi_port}") as client,
    ):
        client.spec()
        opened = client.start_episode(rollout_of(), spec_of()).episode_id
        bad = Observation(images=LOOK.images, state_S=np.full(3, np.nan), instruction="bowl")
        with pytest.raises(errors.BadRequest, match="observation/state: must be finite"):
            client.ask(opened, 0, bad).result(5)
        assert client.ask(opened, 0, LOOK).result(5).decision == 0


def test_a_full_queue_is_an_overload_that_says_when_to_try_again():
    full = "RESOURCE_EXHAUSTED: the queue is full: 4 requests wait, at most 4 may; try again in 250 ms"
    with pytest.raises(errors.Overloaded, match="the queue is full") as refused:
        understood(full)
    assert refused.value.retry_after_s == 0.25


def test_a_server_that_comes_back_is_found_and_the_episode_goes_on(client, stock):
    client.spec()

    class Cut(Ticks):
        def on_tick(self, state, tick):
            super().on_tick(state, tick)
            if len(self.ticks) == K:
                stock.stop()
                threading.Timer(0.5, stock.start).start()

    (result,) = run_lockstep([FakeArm(ARM)], [rollout_of(max_ticks=3 * K)], client, observers=lambda _: [Cut()])
    assert (result.outcome, result.ticks) == ("failure", 3 * K)


def test_another_policy_that_answers_in_an_episode_ends_it_and_the_next_one_is_with_that_policy():
    port = free_port()

    def serving_with(gripper: str):
        return serving(ScriptedModel(), openpi_port=port, openpi_gripper=gripper)

    with OpenpiClient(f"openpi://127.0.0.1:{port}", deadline_s=5, give_up_after_s=5) as client:

        def opens(episode_id: str) -> float:
            return client.ask(episode_id, 0, LOOK).result(5).actions_KA[0, 6]

        with serving_with("policy"):
            client.spec()
            episode_id = client.start_episode(rollout_of(), spec_of()).episode_id
            assert opens(episode_id) > 0.99
        with serving_with("policy"):
            with pytest.raises(errors.ServerLost):
                opens(episode_id)
            assert opens(episode_id) > 0.99
        with serving_with("libero"):
            with pytest.raises(errors.ServerLost):
                opens(episode_id)
            for _ in range(2):
                with pytest.raises(errors.BadAnswer, match="another policy answers now"):
                    opens(episode_id)
            (result,) = run_lockstep([arm := FakeArm()], [rollout_of()], client)
            assert result.outcome == "failure" and all(action_A[6] > 0.99 for action_A in arm.applied)


def test_a_server_that_is_not_there_is_reported_after_the_patience(stock):
    stock.stop()
    began_s = time.monotonic()
    with (
        OpenpiClient(stock.address, deadline_s=1, give_up_after_s=0.5) as client,
        pytest.raises(errors.ServerLost, match=r"127\.0\.0\.1"),
    ):
        client.spec()
    assert time.monotonic() - began_s < 5


def test_what_the_protocol_has_no_place_for_is_refused(client, stock):
    client.spec()
    connections = len(stock.headers)
    for asked in ({"temperature": 0.5}, {"version": 3}, {"noise_correlation": 0.9}, {"lease_id": "lease-1"}):
        with pytest.raises(errors.BadRequest, match=f"{next(iter(asked))}: openpi's protocol has no place for it"):
            client.start_episode(rollout_of(**asked), ARM)
    assert len(stock.headers) == connections
    assert client.start_episode(rollout_of(version=0, seed=7), ARM).version == 0


def test_many_arms_have_a_connection_each_and_their_questions_are_in_flight_together(client, policy, stock):
    client.spec()
    policy.delay_s = [0.3] * 6
    results = list(run_lockstep([FakeArm(ARM) for _ in range(3)], [rollout_of(max_ticks=2 * K)] * 3, client))
    assert policy.most_in_flight > 1
    assert [result.outcome for result in results] == ["failure"] * 3
    assert len(stock.observations) == 1 + 3 * 2  # how long a chunk is was found out once


def test_what_waits_on_a_client_that_is_closed_fails(stock, policy):
    client = OpenpiClient(stock.address)
    client.spec()
    opened = client.start_episode(rollout_of(), ARM).episode_id
    policy.delay_s = [1.0]
    pending = client.ask(opened, 0, look())
    threading.Timer(0.1, client.close).start()
    assert isinstance(pending.exception(3), errors.ServerLost)


def test_a_token_travels_as_an_api_key_and_never_unencrypted_to_another_machine(stock, tmp_path):
    (tmp_path / "token").write_text("a-token-of-a-robot\n")
    credentials = Credentials(token_file=tmp_path / "token")
    with OpenpiClient(stock.address, credentials=credentials) as client:
        client.spec()
    assert stock.headers[0]["Authorization"] == "Api-Key a-token-of-a-robot"
    with pytest.raises(errors.RobotError, match=r"must not travel to 192\.0\.2\.1 unencrypted"):
        connect("openpi://192.0.2.1", credentials=credentials)


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({}, None, ""),
        ({"token_file": None}, errors.NotAdmitted, "must be a token, got none"),
        ({"tls_ca": None}, errors.TlsMismatch, "wants TLS: use --tls-ca"),
    ],
)
def test_a_server_that_asks_for_tls_and_a_token_gets_both(lab, tmp_path, change, kind, sentence):
    pair, token, tokens = lab.pair("127.0.0.1"), tmp_path / "token", tmp_path / "tokens"
    token.write_text("a-token-of-a-robot")
    tokens.write_text("robot a-token-of-a-robot")
    guard = Guard(Access(tokens=tokens, tls_cert=pair.cert, tls_key=pair.key))
    credentials = Credentials(**{"token_file": token, "tls_ca": lab.ca, **change})
    with (
        serving(ScriptedModel(), openpi_port=0, guard=guard) as server,
        OpenpiClient(f"openpi://127.0.0.1:{server.server.openpi_port}", credentials=credentials) as client,
    ):
        if kind is None:
            (result,) = run_lockstep([FakeArm()], [rollout_of()], client)
            assert (result.outcome, result.decisions) == ("failure", 3)
        else:
            with pytest.raises(kind, match=sentence):
                client.spec()


def test_an_episode_that_was_never_opened_is_refused(client):
    with pytest.raises(errors.BadRequest, match="episode_id: there is no episode 'nobody'"):
        client.ask("nobody", 0, look()).result(5)


def test_run_drives_an_arm_by_an_openpi_server(stock, caplog, tmp_path, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "bowl", "--max-ticks", "6", "--lockstep"]
    assert main(["run", "--server", f"{stock.address}?robot0_eye_in_hand=", *flags]) == 0
    assert "1 failure" in caplog.text
    assert stock.observations[-1]["prompt"] == "bowl"
    assert list((tmp_path / "episodes").glob("*.episode"))  # such a server keeps none


def test_spec_prints_what_is_known(stock, capsys):
    assert main(["spec", "--server", stock.address]) == 0
    printed = capsys.readouterr().out
    assert "openpi" in printed and "3 actions of 7" in printed and "robot0_eye_in_hand: 256x256" in printed


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--image-format", "jpeg"], 2, "takes raw frames"),
        (["--resize"], 2, "takes raw frames"),
        (["--temperature", "1.0"], 1, "no place for it"),
    ],
)
def test_flags_that_openpi_has_no_place_for_are_refused(stock, caplog, tmp_path, monkeypatch, flags, code, sentence):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    line = ["run", "--server", f"{stock.address}?robot0_eye_in_hand=", "--task", "bowl", "--lockstep", *flags]
    assert main(line) == code
    assert sentence in caplog.text


def test_leases_from_an_openpi_server_are_refused(stock, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--server", stock.address, "--task", "bowl", "--leases"])
    assert "leases must come from a policy server of ours" in capsys.readouterr().err
