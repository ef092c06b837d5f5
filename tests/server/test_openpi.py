"""The openpi door's promises, over real sockets, to a robot that speaks openpi's protocol and knows nothing of ours."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from policy_server import episodes, openpi
from policy_server.access import Access, Guard
from policy_server.config import ServeConfig
from policy_server.errors import CannotStart
from policy_server.http import listen
from policy_server.openpi import Connection, Dialect
from protos import episode_pb2, policy_pb2
from protos.codec import decode_image, decode_tensor
from protos.episode_file import Episode, read_episode
from tests.client.test_real_server import ScriptedModel
from tests.openpi_wire import Robot, packb
from tests.server import messages
from tests.server.fake_model import ACTIONS, CHUNK, SIDE_PX, FakeModel
from tests.server.running import RunningServer, eventually, serving


@pytest.fixture(scope="module")
def server():
    with serving(FakeModel(), openpi_port=0) as running:
        yield running


def address(server: RunningServer) -> str:
    return f"127.0.0.1:{server.server.openpi_port}"


def look(*, grey: int = 7, **changes) -> dict:
    """What openpi's LIBERO example sends; a change to None leaves the entry out."""
    observation = {
        "observation/image": np.full((SIDE_PX, SIDE_PX, 3), grey, np.uint8),
        "observation/wrist_image": np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8),
        "observation/state": np.zeros(3),
        "prompt": "pick up the bowl",
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    return {key: value for key, value in observation.items() if value is not None}


def probe(server: RunningServer) -> tuple[int, str]:
    """What /healthz says."""
    try:
        with urllib.request.urlopen(f"http://{address(server)}/healthz", timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def stored(folder: Path) -> list[Episode]:
    return [read_episode(path) for path in sorted(folder.glob("*.episode"))]


def test_the_metadata_tell_what_get_spec_tells(server):
    spec = server.policy.GetSpec(policy_pb2.GetSpecRequest())
    with Robot(address(server)) as robot:
        said = robot.metadata
    assert {field.name for field in spec.DESCRIPTOR.fields} <= set(said)
    for name in ("model", "base_fingerprint", "chunk_length", "tick_rate_hz", "versions", "stores_episodes"):
        assert said[name] == getattr(spec, name)
    assert [number["name"] for number in said["action"]] == ["x", "y"]
    assert said["images"] == [{"name": "agentview", "height": SIDE_PX, "width": SIDE_PX, "resize": "lanczos3"}]
    assert said["action_tokens"]["low"] == decode_tensor(spec.action_tokens.low).tolist()
    assert said["keys"] == {"agentview": "observation/image", "state": "observation/state", "prompt": "prompt"}


def test_an_answer_is_a_chunk_its_version_and_where_the_time_went(server):
    with Robot(address(server)) as robot:
        answers = [robot.infer(look(grey=grey)) for grey in (9, 200)]
    for decision, answer in enumerate(answers):
        assert answer["actions"].dtype == np.float32 and answer["actions"].shape == (CHUNK, ACTIONS)
        assert answer["actions"].tolist() == [[(9, 200)[decision], decision]] * CHUNK
        assert answer["version"] == 0
        assert answer["policy_timing"] == {"infer_ms": 6.0}
        timing = answer["server_timing"]
        assert timing["infer_ms"] >= timing["queue_ms"] + timing["prepare_ms"] > 0 and timing["batch_size"] == 1


def test_there_is_no_array_but_the_actions_since_robots_slice_every_array_by_tick(server):
    def arrays(value: object) -> int:
        return sum(map(arrays, value.values())) if isinstance(value, dict) else isinstance(value, np.ndarray)

    with Robot(address(server)) as robot:
        assert arrays(robot.infer(look())) == 1


def test_robots_share_passes_with_those_that_speak_grpc():
    with serving(FakeModel(), openpi_port=0, max_batch=2, max_wait_ms=1000) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        with Robot(address(server)) as robot:
            robot.infer(look())
            server.policy.Act(messages.act(episode_id, 0))
            robot.send(look())
            reply = server.policy.Act(messages.act(episode_id, 1))
            assert robot.receive()["server_timing"]["batch_size"] == reply.chunk.timing.batch_size == 2


def test_nested_or_flat_colours_first_or_last_an_observation_is_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX + 2, 3), dtype=np.uint8)
    flat = look(observation__image=pixels, observation__state=np.float64([0.5, -1, 2]))
    shapes = {
        "flat": flat,
        "nested": {"observation": {"image": pixels, "state": flat["observation/state"]}, "prompt": flat["prompt"]},
        "colours first": {**flat, "observation/image": np.moveaxis(pixels, 2, 0)},
        "float32": {**flat, "observation/state": np.float32([0.5, -1, 2])},
    }
    with serving(FakeModel(), openpi_port=0, episodes=tmp_path) as server, Robot(address(server)) as robot:
        for observation in shapes.values():
            assert isinstance(robot.infer(observation), dict)
    (episode,) = stored(tmp_path)
    for decision in episode.decisions:
        seen = decision.observation
        np.testing.assert_array_equal(decode_image(seen.images["agentview"]), pixels)
        assert decode_tensor(seen.state, dtype="float32").tolist() == [0.5, -1, 2]
        assert seen.instruction == "pick up the bowl"
    assert len(episode.decisions) == len(shapes)


BAD = {
    "no image": ({"observation__image": None}, "observation/image: must be there, got ['observation/state', "),
    "no state": ({"observation__state": None}, "observation/state: must be there"),
    "no prompt": ({"prompt": None}, "prompt: must be there"),
    "an image of floats": (
        {"observation__image": np.zeros((8, 8, 3))},
        "observation/image: must be uint8 (H, W, 3) or (3, H, W), got float64 (8, 8, 3)",
    ),
    "several images": ({"observation__image": np.zeros((1, 8, 8, 3), np.uint8)}, "got uint8 (1, 8, 8, 3)"),
    "an image that is text": ({"observation__image": "image.jpg"}, "got str"),
    "no colours": ({"observation__image": np.zeros((8, 8, 4), np.uint8)}, "must have 3 colours"),
    "colours first or last": (
        {"observation__image": np.zeros((3, 8, 3), np.uint8)},
        "observation/image: must have 3 colours on its first or on its last axis, got (3, 8, 3)",
    ),
    "a huge image": (
        {"observation__image": np.zeros((600, 600, 3), np.uint8)},
        "observation/image: data must be at most 1048576 bytes, got 1080000",
    ),
    "an empty image": ({"observation__image": np.zeros((0, 8, 3), np.uint8)}, "observation/image: height and width"),
    "a short state": ({"observation__state": np.zeros(2)}, "observation/state: shape must be (3,), got (2,)"),
    "a state in a batch": ({"observation__state": np.zeros((1, 3))}, "observation/state: shape must be (3,)"),
    "a list": ({"observation__state": [0.0, 0.0, 0.0]}, "observation/state: must be an array of numbers, got list"),
    "NaN": ({"observation__state": np.array([0, np.nan, 0])}, "observation/state: must be finite, got [0.0, nan, 0.0]"),
    "beyond float32": ({"observation__state": np.array([0, 1e300, 0])}, "observation/state: must be finite"),
    "an empty prompt": ({"prompt": " "}, "prompt: must say what to do"),
    "a long prompt": ({"prompt": "go " * 7}, "prompt: must be at most 6 tokens, got 7"),
    "a prompt that is a number": ({"prompt": 7}, "prompt: must be text, got int"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_observation_is_refused_by_its_key_and_the_connection_goes_on(server, what):
    changes, sentence = BAD[what]
    asked = len(server.model.batches)
    with Robot(address(server)) as robot:
        refusal = robot.infer(look(**changes))
        assert isinstance(refusal, str) and refusal.startswith("INVALID_ARGUMENT: ") and "\n" not in refusal
        assert sentence in refusal
        assert len(server.model.batches) == asked
        assert robot.infer(look(grey=9))["actions"].tolist() == [[9, 0]] * CHUNK


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("hello", "INVALID_ARGUMENT: message: must be binary, got text"),
        (b"\xc1", "INVALID_ARGUMENT: message: must be msgpack"),
        (packb([1, 2]), "INVALID_ARGUMENT: message: must be a dict, got list"),
        (packb({"prompt": {b"__ndarray__": True, b"dtype": "|O"}}), "INVALID_ARGUMENT: prompt: dtype must be one of"),
        (packb({"x" * 100_000: 1}), "INVALID_ARGUMENT: message: keys must be printable text of at most 100 characters"),
        (packb({f"x{number}" * 10: 1 for number in range(1000)}), "INVALID_ARGUMENT: prompt: must be there"),
    ],
)
def test_what_is_no_observation_is_refused_briefly_and_the_connection_goes_on(server, message, sentence):
    with Robot(address(server)) as robot:
        robot.socket.send(message)
        refusal = robot.receive()
        assert refusal.startswith(sentence) and len(refusal) < 500
        assert isinstance(robot.infer(look()), dict)


def test_a_message_that_is_too_large_ends_its_connection_and_no_other(server):
    with Robot(address(server)) as robot, Robot(address(server)) as other:
        with pytest.raises(ConnectionClosed) as closed:  # from receive, or from send where the server was quicker
            robot.socket.send(bytes(robot.metadata["max_request_bytes"] + 1))
            robot.receive()
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009  # a reset may overtake the farewell
        assert isinstance(other.infer(look()), dict)


def test_whatever_a_robot_sends_it_gets_one_reply_and_its_neighbour_is_not_disturbed(server):
    dice = np.random.default_rng(0)
    whole, counts = packb(look()), {str: 0, dict: 0}
    with Robot(address(server)) as robot, Robot(address(server)) as neighbour:
        for decision in range(300):
            data = bytearray(whole)
            for place in dice.integers(0, len(data), dice.integers(1, 4)):
                data[place] = dice.integers(0, 256)
            robot.socket.send(bytes(data))
            counts[type(robot.receive())] += 1
            assert neighbour.infer(look(grey=decision % 256))["actions"][0].tolist() == [decision % 256, decision]
    assert min(counts.values()) > 30


@pytest.mark.parametrize("prompt", ["explode", "stumble"])
def test_a_fault_of_ours_costs_one_observation_and_tells_no_secrets(server, prompt, caplog):
    with Robot(address(server)) as robot:
        refusal = robot.infer(look(prompt=prompt))
        assert refusal.startswith("INTERNAL: ") and "fake model" not in refusal and "Traceback" not in refusal
        assert isinstance(robot.infer(look()), dict)
    assert "the fake model" in caplog.text


def test_a_connection_is_an_episode_that_nobody_learns_from(tmp_path):
    with serving(FakeModel(), openpi_port=0, episodes=tmp_path) as server:
        with Robot(address(server)) as robot:
            robot.infer(look(grey=1))
            robot.infer(look(observation__state=None))
            robot.infer(look(grey=2))
        eventually(lambda: stored(tmp_path))
    (episode,) = stored(tmp_path)
    start, end = episode.start, episode.end
    assert (start.purpose, start.arm, start.task) == (episode_pb2.PURPOSE_DEPLOY, "openpi", "pick up the bowl")
    assert (start.temperature, start.version, start.rollout_id) == (0, 0, "")
    assert (end.outcome, end.message) == (episode_pb2.OUTCOME_ERROR, openpi.UNKNOWN)
    assert [decision.decision for decision in episode.decisions] == [0, 1]  # a refusal leaves no trace
    assert not episode.ticks and not end.HasField("final_observation")


def test_a_connection_that_asks_nothing_is_no_episode(tmp_path):
    with serving(FakeModel(), openpi_port=0, episodes=tmp_path) as server, Robot(address(server)):
        pass
    assert not stored(tmp_path)


def test_after_a_long_silence_the_next_observation_begins_another_episode(tmp_path):
    idle = {"episodes": tmp_path, "episode_idle_s": 0.2}
    with serving(FakeModel(), openpi_port=0, **idle) as server, Robot(address(server)) as robot:
        robot.infer(look(grey=1))
        eventually(lambda: stored(tmp_path))
        assert robot.infer(look(grey=2))["actions"].tolist() == [[2, 0]] * CHUNK
    assert [len(episode.decisions) for episode in stored(tmp_path)] == [1, 1]


def test_when_an_episode_is_full_the_next_observation_begins_another(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "MAX_EPISODE_BYTES", 1000)
    with serving(FakeModel(), openpi_port=0, episodes=tmp_path) as server, Robot(address(server)) as robot:
        for grey in range(8):
            assert robot.infer(look(grey=grey))["actions"].tolist()[0][0] == grey
    parts = [len(episode.decisions) for episode in stored(tmp_path)]
    assert sum(parts) == 8 and len(parts) > 2 and min(parts[:-1]) > 1


def test_a_newer_observation_supersedes_a_queued_one_and_answers_keep_their_order():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        with Robot(address(server)) as other, Robot(address(server)) as robot:
            other.send(look(grey=1))
            eventually(lambda: server.model.batches)
            robot.send(look(grey=2))
            eventually(lambda: server.server.waiting == 1)
            robot.send(look(grey=3))
            assert robot.receive() == "ABORTED: superseded by a newer observation"
            server.model.gate.set()
            assert robot.receive()["actions"][0].tolist() == [3, 1]
            assert other.receive()["actions"][0].tolist() == [1, 0]


def test_a_newer_observation_waits_for_the_answer_that_is_being_computed():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        with Robot(address(server)) as robot:
            robot.send(look(grey=1))
            eventually(lambda: server.model.batches)
            robot.send(look(grey=2))
            eventually(lambda: server.server.waiting == 1)
            server.model.gate.set()
            assert [robot.receive()["actions"][0, 0] for _ in range(2)] == [1, 2]


def test_of_a_robot_that_does_not_wait_for_answers_no_more_than_three_observations_are_read():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        with Robot(address(server)) as robot:
            robot.send(look(grey=0))
            eventually(lambda: server.model.batches)
            for grey in range(1, 8):
                robot.send(look(grey=grey))
            (connection,) = server.server._openpi._connections
            eventually(lambda: connection._due == 3)
            time.sleep(0.2)
            assert connection._due == 3
            server.model.gate.set()
            answers = [robot.receive() for _ in range(8)]
            assert answers[0]["actions"][0, 0] == 0 and answers[-1]["actions"][0, 0] == 7


def test_a_full_queue_refuses_at_once_and_the_connection_goes_on():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0, queue=1) as server:
        server.model.gate.clear()
        with Robot(address(server)) as first, Robot(address(server)) as second, Robot(address(server)) as third:
            first.send(look())
            eventually(lambda: server.model.batches)
            second.send(look())
            eventually(lambda: server.server.waiting == 1)
            refusal = third.infer(look())
            assert refusal.startswith("RESOURCE_EXHAUSTED: the queue is full") and "; try again in " in refusal
            server.model.gate.set()
            assert isinstance(first.receive(), dict) and isinstance(second.receive(), dict)
            assert isinstance(third.infer(look()), dict)


def test_a_robot_that_vanishes_takes_its_observation_out_of_the_queue():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        with Robot(address(server)) as other:
            other.send(look(grey=1))
            eventually(lambda: server.model.batches)
            robot = Robot(address(server))
            robot.send(look(grey=2))
            eventually(lambda: server.server.waiting == 1)
            robot.socket.close_socket()
            eventually(lambda: server.server.waiting == 0)
            server.model.gate.set()
            other.receive()
        assert [request.prepared[0] for batch in server.model.batches for request in batch] == [1]


def test_a_robot_that_does_not_read_is_let_go(monkeypatch):
    class Deaf:
        """A websocket whose peer takes nothing, until it is cut off."""

        def __init__(self):
            self.transport, self._cut_off = self, asyncio.Event()

        async def send_bytes(self, data):
            await self._cut_off.wait()
            raise ConnectionResetError

        def abort(self):
            self._cut_off.set()

        def __aiter__(self):
            return self

        async def __anext__(self):
            await self._cut_off.wait()
            raise StopAsyncIteration

    class Idle:
        def is_open(self, episode_id):
            return False

        def spec(self):
            return FakeModel().spec

    async def serve() -> None:
        dialect = Dialect(FakeModel().spec, keys={}, gripper="libero")
        deaf = Deaf()
        connection = Connection(deaf, deaf, Idle(), dialect, client="", admit=lambda: None)  # type: ignore[arg-type]
        await asyncio.wait_for(connection.serve(), 5)

    monkeypatch.setattr(openpi, "UNREAD_S", 0.05)
    asyncio.run(serve())


def test_a_stop_answers_what_is_under_way_and_then_ends_the_connection():
    with serving(FakeModel(), openpi_port=0, max_batch=1, max_wait_ms=0) as server:
        server.model.gate.clear()
        with Robot(address(server)) as robot, Robot(address(server)) as other:
            robot.send(look(grey=5))
            eventually(lambda: server.model.batches)
            stopping = server.begin_stop()
            eventually(lambda: probe(server)[0] == 503)
            assert other.infer(look()) == "UNAVAILABLE: the server is stopping; try again in 500 ms"
            with pytest.raises(InvalidStatus, match="503"):
                Robot(address(server))
            server.model.gate.set()
            assert robot.receive()["actions"][0].tolist() == [5, 0]
            for socket in (robot.socket, other.socket):
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(10)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        stopping.result(10)


def test_a_drain_lets_those_go_on_that_have_begun_and_nobody_else_in():
    with (
        serving(FakeModel(), openpi_port=0) as server,
        Robot(address(server)) as robot,
        Robot(address(server)) as idle,
    ):
        robot.infer(look())
        asyncio.run_coroutine_threadsafe(server.server.drain(60), server.loop).result(5)
        assert robot.infer(look(grey=5))["actions"][0].tolist() == [5, 1]
        assert idle.infer(look()).startswith("UNAVAILABLE: the server is draining")
        assert probe(server)[0] == 503
        with pytest.raises(InvalidStatus, match="503"):
            Robot(address(server))


def test_nobody_is_let_in_before_the_model_is_warm():
    with serving(FakeModel(warm_s=0.2), openpi_port=0, warm=False) as server:
        assert probe(server) == (503, "the model is warming up\n")
        with pytest.raises(InvalidStatus, match="503"):
            Robot(address(server))
        asyncio.run_coroutine_threadsafe(server.server.warm_up(), server.loop).result(5)
        assert probe(server) == (200, "OK\n")
        with Robot(address(server)) as robot:
            assert isinstance(robot.infer(look()), dict)


def test_a_robot_shows_its_token_as_an_api_key(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("robot a-token-of-a-robot\ntrainer a-token-of-a-trainer\n")
    with serving(FakeModel(), openpi_port=0, guard=Guard(Access(tokens=tokens))) as server:
        for api_key in ("a-token-of-a-robot", "a-token-of-a-trainer"):
            with Robot(address(server), api_key=api_key) as robot:
                assert isinstance(robot.infer(look()), dict)
        for api_key in ("", "a-token-of-nobody"):
            with pytest.raises(InvalidStatus) as refused:
                Robot(address(server), api_key=api_key)
            assert refused.value.response.status_code == 401
            assert api_key.encode() not in (refused.value.response.body or b"") or not api_key
        assert probe(server)[0] == 200  # whoever watches over the server needs none


def test_a_robot_whose_token_is_revoked_ends_its_episode_and_begins_no_other(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("robot a-token-of-a-robot\n")
    guard = Guard(Access(tokens=tokens))
    with (
        serving(FakeModel(), openpi_port=0, guard=guard, episode_idle_s=0.5) as server,
        Robot(address(server), api_key="a-token-of-a-robot") as robot,
    ):
        robot.infer(look())
        tokens.write_text("robot the-token-of-another-robot\n")
        assert isinstance(robot.infer(look()), dict)
        eventually(lambda: not server.server._episodes.open)
        assert robot.infer(look()).startswith("UNAUTHENTICATED: authorization: must be one of this server's")
        tokens.write_text("robot a-token-of-a-robot\n")
        assert isinstance(robot.infer(look()), dict)


def test_a_client_has_so_many_connections_and_no_more():
    with serving(FakeModel(), openpi_port=0, client_calls=2) as server:
        with Robot(address(server)), Robot(address(server)), pytest.raises(InvalidStatus, match="429"):
            Robot(address(server))
        eventually(lambda: not server.server._calls._open)
        with Robot(address(server)) as robot:
            assert isinstance(robot.infer(look()), dict)


def test_a_page_in_a_browser_is_not_let_in(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://{address(server)}", origin="http://somewhere.example")  # type: ignore[arg-type]


def test_keys_are_what_the_robots_call_things():
    keys = {"agentview": "cameras/front", "state": "joints", "prompt": "task/text"}
    with serving(FakeModel(), openpi_port=0, openpi_keys=keys) as server, Robot(address(server)) as robot:
        assert robot.metadata["keys"] == keys
        pixels = np.full((SIDE_PX, SIDE_PX, 3), 7, np.uint8)
        words = {"cameras": {"front": pixels}, "joints": np.zeros(3), "task": {"text": "pick up the bowl"}}
        assert robot.infer(words)["actions"][0].tolist() == [7, 0]
        assert robot.infer({**words, "joints": np.zeros(2)}).startswith("INVALID_ARGUMENT: joints: shape must be")


@pytest.mark.parametrize(("keys", "wrong"), [({"wrist": "observation/wrist"}, "wrist"), ({}, "front")])
def test_a_key_for_what_is_not_read_and_an_image_without_key_are_no_start(keys, wrong):
    spec = FakeModel().spec
    if not keys:
        spec.images[0].name = "front"
    with pytest.raises(CannotStart, match=rf"openpi_keys must be of what the policy reads.*\['{wrong}'\]"):
        Dialect(spec, keys=keys, gripper="libero")


@pytest.mark.parametrize("keys", ["agentview", "=observation/image", "state="])
def test_a_flag_that_makes_no_sense_is_refused(keys):
    with pytest.raises(ValueError, match="openpi_keys must each be WHAT=KEY"):
        ServeConfig(openpi_keys=(keys,))


@pytest.mark.parametrize("gripper", ["libero", "policy"])
def test_the_grippers_action_means_what_the_robot_takes_it_for(gripper):
    with serving(ScriptedModel(), openpi_port=0, openpi_gripper=gripper) as server, Robot(address(server)) as robot:
        said = robot.metadata["action"][6]
        answer = robot.infer(look())
        own = server.policy.GetSpec(policy_pb2.GetSpecRequest()).action[6]
    opens = answer["actions"][0, 6]
    if gripper == "policy":
        assert opens > 0.99 and (said["low"], said["high"]) == (own.low, own.high)
    else:
        assert -1 <= opens < -0.98 and (said["low"], said["high"]) == (-1, 1)
    np.testing.assert_allclose(answer["actions"][:, :6], 0, atol=0.01)


def test_an_address_that_is_taken_is_a_sentence():
    with serving(FakeModel(), openpi_port=0) as server:
        second = serving(FakeModel(), openpi_port=server.server.openpi_port)
        with pytest.raises(CannotStart, match=r"cannot listen on 127\.0\.0\.1:\d+: is another server running"), second:
            pass


def test_an_address_that_is_not_this_machines_is_another_sentence():
    async def listening() -> None:
        await listen(web.Application(), host="192.0.2.1", port=0, tls=None)

    sentence = r"cannot listen on 192\.0\.2\.1:0: Cannot assign requested address"
    with pytest.raises(CannotStart, match=sentence):
        asyncio.run(listening())
    with pytest.raises(CannotStart, match=sentence), serving(FakeModel(), host="192.0.2.1"):
        pass


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="there is no ::1")
def test_every_port_is_served_over_ipv6_and_a_client_of_several_is_one():
    host = ServeConfig(host="[::1]").host
    with serving(FakeModel(), host=host, openpi_port=0, http_port=0) as server:
        episode_id = server.policy.StartEpisode(messages.start()).episode_id
        with urllib.request.urlopen(f"http://[::1]:{server.server.http_port}/healthz", timeout=5) as reply:
            assert reply.status == 200
        stream = server.policy.ActStream(iter([messages.act(episode_id, 0)]))
        assert next(stream).HasField("chunk")
        with Robot(f"[::1]:{server.server.openpi_port}") as robot:
            robot.infer(look())
            assert {episode.robot[1] for episode in server.server._episodes.open} == {"[::1]"}
            assert len({episode.client for episode in server.server._episodes.open}) == 1
        taken = serving(FakeModel(), host=host, port=int(server.address.rpartition(":")[2]))
        with pytest.raises(CannotStart, match=r"cannot listen on \[::1\]:\d+: is another server running"), taken:
            pass


def test_the_command_serves_it_says_where_and_stops_cleanly(tiny_vla, tmp_path):
    line = [sys.executable, "-m", "policy_server", "serve", "--port", "0", "--model", tiny_vla, "--openpi-port", "0"]
    line += ["--episodes", tmp_path, "--max-batch", "2", "--openpi-keys", "state=proprio", "prompt=task"]
    process = subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("SERVING ")
        word, there = process.stdout.readline().split()
        assert word == "OPENPI"
        with Robot(there) as robot:
            image = np.zeros((32, 32, 3), np.uint8)
            answer = robot.infer({"observation/image": image, "proprio": np.zeros(8), "task": "pick up the bowl"})
            assert answer["actions"].shape == (2, 7)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                robot.receive()
        assert process.wait(100) == 0
    finally:
        process.kill()
    (episode,) = stored(tmp_path)
    assert (len(episode.decisions), episode.end.message) == (1, "the server stopped")


def test_sixteen_robots_at_once_all_get_their_own_answers():
    with serving(FakeModel(pass_s=0.002), openpi_port=0, max_batch=8, queue=64) as server:
        robots = [Robot(address(server)) for _ in range(16)]
        for decision in range(10):
            for grey, robot in enumerate(robots):
                robot.send(look(grey=grey))
            answers = [robot.receive()["actions"][0].tolist() for robot in robots]
            assert answers == [[grey, decision] for grey in range(16)]
        for robot in robots:
            robot.socket.close()
        eventually(lambda: not server.server._episodes.open, within_s=10)
