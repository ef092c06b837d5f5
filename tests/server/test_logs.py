"""What the log says, and that a machine can read it."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import grpc
import pytest

from policy_server.logs import JsonFormatter, Sparing, TextFormatter, about
from protos import admin_pb2, episode_pb2
from tests.server import messages, publishing
from tests.server.fake_model import FakeModel
from tests.server.running import serving


def record(message: str, **fields) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "policy_server.x", "levelname": "INFO", "msg": message, **fields})
    return made


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[dict]]]:
    """lines(field=value, ...): what the server has logged as JSON so far, of those with these fields."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    monkeypatch.setattr(
        logging.getLogger("policy_server.refusals"), "filters", []
    )  # other tests' refusals silence none
    logger = logging.getLogger("policy_server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def parsed(**fields) -> list[dict]:
        logged = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in logged if fields.items() <= line.items()]

    yield parsed
    logger.removeHandler(handler)
    logger.setLevel(level)


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


def test_a_publish_and_a_swap_are_a_line_each(lines, admin_server, admin, base):
    version = publishing.publish(admin, base, 0.01).version
    admin.SetLive(admin_pb2.SetLiveRequest(version=version), timeout=30)
    assert [line["message"] for line in lines(version=version)] == [
        f"version {version} is published",
        f"version {version} is live, 0 was before",
    ]
