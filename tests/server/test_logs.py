"""What the log says, and that a machine can read it."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from policy_server.logs import JsonFormatter, Sparing, TextFormatter, about
from protos import admin_pb2, episode_pb2
from tests.openpi_wire import Robot
from tests.server import messages, publishing
from tests.server.fake_model import SIDE_PX, FakeModel
from tests.server.running import serving


def record(message: str, **fields) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "policy_server.x", "levelname": "INFO", "msg": message, **fields})
    return made


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.StreamHandler[io.StringIO]]:
    """Takes what the server logs, refusals and all."""
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(
        logging.getLogger("policy_server.refusals"), "filters", []
    )  # other tests' refusals silence none
    logger = logging.getLogger("policy_server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def lines(handler) -> Callable[..., list[dict]]:
    """lines(field=value, ...): what the server has logged as JSON so far, of those with these fields."""
    handler.setFormatter(JsonFormatter())

    def parsed(**fields) -> list[dict]:
        logged = [json.loads(line) for line in handler.stream.getvalue().splitlines()]
        return [line for line in logged if fields.items() <= line.items()]

    return parsed


def test_a_json_line_has_time_level_logger_message_and_the_fields():
    line = json.loads(JsonFormatter().format(record("hello", created=0.25, episode="e1", decision=3)))
    assert line == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "INFO",
        "logger": "policy_server.x",
        "message": "hello",
        "episode": "e1",
        "decision": 3,
    }


def test_a_traceback_is_one_field_of_one_line():
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        text = JsonFormatter().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in text and "RuntimeError: broken" in json.loads(text)["exception"]


def test_what_a_line_is_about_is_said_only_inside():
    formatter = TextFormatter()
    with about(episode="e1"), about(decision=3):
        assert formatter.format(record("hello", client="c")) == "I hello  [episode=e1 decision=3 client=c]"
    assert formatter.format(record("hello")) == "I hello"


def test_the_words_of_a_client_stay_on_their_line_and_short():
    text = TextFormatter().format(record("hello", episode="e1\nI all is well " + "x" * 10_000))
    assert len(text.splitlines()) == 1 and len(text) < 300
    forged = record("there is no %s", args=("key\nI all is well\x1b[2J\u2028ä",))
    assert TextFormatter().format(forged) == r"I there is no key\nI all is well\x1b[2J\u2028ä"


def test_refusals_of_a_kind_are_logged_once_a_second_with_the_number_left_out():
    now_s = 100.0
    sparing = Sparing(now=lambda: now_s)

    def logged(kind: str) -> int | None:
        line = record("refused", refusal=kind)
        return getattr(line, "left_out", 0) if sparing.filter(line) else None

    assert [logged("A"), logged("A"), logged("A"), logged("B")] == [0, None, None, 0]
    now_s += 1.0
    assert [logged("A"), logged("B")] == [2, 0]
    assert sparing.filter(record("no refusal"))


def test_a_finished_episode_is_one_line_with_its_ids(lines):
    with serving(FakeModel()) as server:
        episode_id = server.policy.StartEpisode(messages.start(task="kitchen/3")).episode_id
        server.policy.Act(messages.act(episode_id, 0))
        server.policy.EndEpisode(messages.end(episode_id, outcome=episode_pb2.OUTCOME_FAILURE))
    (line,) = lines(message="episode ended")
    assert line["episode"] == episode_id
    assert (line["outcome"], line["decisions"], line["version"], line["task"]) == ("failure", 1, 0, "kitchen/3")
    assert line["peer"].startswith("127.0.0.1:") and line["seconds"] >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_logged_with_the_request_it_answers(lines, stream):
    with serving(FakeModel()) as server:
        request = messages.act("nobody", 7)
        if stream:
            assert next(server.policy.ActStream(iter([request]))).HasField("refusal")
        else:
            with pytest.raises(grpc.RpcError):
                server.policy.Act(request)
    (line,) = lines(refusal="FAILED_PRECONDITION")
    assert (line["episode"], line["decision"]) == ("nobody", 7)
    assert line["peer"].startswith("127.0.0.1:") and "there is no episode" in line["message"]


def test_a_refusal_of_an_openpi_robots_observation_is_logged_with_the_decision_it_was_for(lines):
    with serving(FakeModel(), openpi_port=0) as server, Robot(f"127.0.0.1:{server.server.openpi_port}") as robot:
        image = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
        for state in (np.zeros(3), np.full(3, np.nan)):
            robot.infer({"observation/image": image, "observation/state": state, "prompt": "pick up the bowl"})
        (episode,) = server.server._episodes.open
        (line,) = lines(refusal="INVALID_ARGUMENT")
        assert (line["episode"], line["decision"], line["peer"]) == (episode.start.episode_id, 1, "127.0.0.1")


@pytest.mark.parametrize(
    "key", ["key\nI all is well  [peer=1.2.3.4]", "k" * 10**6, "/".join("k" * 100 for _ in range(8))], ids=len
)
def test_the_keys_of_an_openpi_robot_forge_no_line_and_make_none_long(handler, key):
    handler.setFormatter(TextFormatter())
    message: object = {b"__ndarray__": True}
    for part in reversed(key.split("/")):
        message = {part: message}
    with serving(FakeModel(), openpi_port=0) as server, Robot(f"127.0.0.1:{server.server.openpi_port}") as robot:
        robot.infer(message)
    (line,) = handler.stream.getvalue().splitlines()
    assert line.startswith("I refused, INVALID_ARGUMENT: ") and len(line) < 500


def test_a_publish_and_a_swap_are_a_line_each(lines, admin_server, admin, base):
    version = publishing.publish(admin, base, 0.01).version
    admin.SetLive(admin_pb2.SetLiveRequest(version=version), timeout=30)
    assert [line["message"] for line in lines(version=version)] == [
        f"version {version} is published",
        f"version {version} is live, 0 was before",
    ]
