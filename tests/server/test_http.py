"""The HTTP door: the page's parts, what it is told, and who is let in."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from policy_server.access import Access, Guard
from policy_server.http import FILES, PAGE
from policy_server.watch import FRAME_PX
from protos import episode_pb2
from protos.codec import encode_image
from tests.server import messages
from tests.server.fake_model import SIDE_PX, FakeModel
from tests.server.running import RunningServer, eventually, serving
from tests.server.test_operations import one_sentence

TOKENS = {role: f"{role}-0123456789abcdef" for role in ("robot", "trainer", "admin")}


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def pixels_HW3(self) -> np.ndarray:
        assert self.headers["Content-Type"] == "image/jpeg"
        return np.asarray(Image.open(io.BytesIO(self.body), formats=["JPEG"]))


def get(server: RunningServer, path: str, *, method: str = "GET", **headers: str) -> Reply:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server.http_port}{path}", headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return Reply(status=reply.status, headers=reply.headers, body=reply.read())
    except urllib.error.HTTPError as error:
        return Reply(status=error.code, headers=error.headers, body=error.read())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(FakeModel(), episodes=tmp_path, http_port=0) as running:
        yield running


def start(server: RunningServer, **fields) -> str:
    return server.policy.StartEpisode(messages.start(**fields)).episode_id


def stored(server: RunningServer, greys=(10, 200), *, final: int | None = None, **end) -> None:
    """An episode whose decisions saw these greys."""
    episode_id = start(server, arm="franka")
    for decision, grey in enumerate(greys):
        server.policy.Act(messages.act(episode_id, decision, grey=grey))
    if final is not None:
        end["final_observation"] = messages.observation(grey=final)
    server.policy.EndEpisode(messages.end(episode_id, **end))


def test_the_probe_says_whether_the_server_serves():
    with serving(FakeModel(warm_s=0.2), warm=False, http_port=0) as server:
        assert (get(server, "/healthz").status, get(server, "/healthz").body) == (503, b"the model is warming up\n")
        asyncio.run_coroutine_threadsafe(server.server.warm_up(), server.loop).result(5)
        assert (get(server, "/healthz").status, get(server, "/healthz").body) == (200, b"serving\n")
        server.model.gate.clear()
        call = server.policy.Act.future(messages.act(start(server), 0))
        eventually(lambda: server.model.batches)
        server.begin_stop()
        eventually(lambda: get(server, "/healthz").status == 503)  # while a decision is still under way
        server.model.gate.set()
        assert call.result(5).HasField("chunk")


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_prometheus_reads_the_metrics(server, accept):
    reply = get(server, "/metrics", Accept=accept)
    assert reply.status == 200
    assert ("openmetrics" in accept) == ("openmetrics" in reply.headers["Content-Type"])
    if not accept:
        assert "vla_rl_live_version" in {family.name for family in text_string_to_metric_families(reply.body.decode())}


def test_the_page_is_whole_and_takes_nothing_from_elsewhere(server):
    for path, (name, kind) in FILES.items():
        reply = get(server, path)
        assert reply.body == (PAGE / name).read_bytes()
        assert reply.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert not re.search(rb"https?://|@import|url\(", reply.body)


def test_no_script_of_the_page_makes_markup_of_text():
    script = (PAGE / "page.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(", script
    )
    page = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src)", page)


@pytest.mark.parametrize("path", ["/", "/state", "/robots/nobody/frame", "/nowhere", "/metrics"])
def test_every_reply_forbids_what_the_page_does_not_need(server, path):
    headers = get(server, path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_state_tells_of_each_robot_that_has_an_episode(server):
    assert get(server, "/state").json["robots"] == []
    quiet, busy = start(server, arm="franka", task="kitchen/3"), start(server, arm="ur")
    for decision in range(3):
        server.policy.Act(messages.act(busy, decision, instruction="open the drawer"))
    state = get(server, "/state").json
    robots = {robot["episode"]: robot for robot in state["robots"]}
    assert set(robots) == {quiet, busy}
    assert (robots[quiet]["arm"], robots[quiet]["task"], robots[quiet]["decisions"]) == ("franka", "kitchen/3", 0)
    assert (robots[busy]["instruction"], robots[busy]["decisions"]) == ("open the drawer", 3)
    assert robots[busy]["rate_hz"] > 0 and 0 <= robots[busy]["age_s"] < 5
    assert (state["model"], state["live_version"], state["trouble"], state["queue_depth"]) == ("fake", 0, "", 0)


def test_the_last_minutes_are_sampled_once_a_second(server):
    server.policy.Act(messages.act(start(server), 0))
    eventually(lambda: any(sample[3] for sample in get(server, "/state").json["samples"]))
    (sample,) = [sample for sample in get(server, "/state").json["samples"] if sample[3]]
    assert sample[1:] == [0, 1.0, 1.0]


def test_a_frame_is_the_latest_one_that_was_answered(server):
    episode_id = start(server)
    assert get(server, f"/robots/{episode_id}/frame").status == 404
    for decision, grey in enumerate((40, 200)):
        server.policy.Act(messages.act(episode_id, decision, grey=grey))
        frame = get(server, f"/robots/{episode_id}/frame")
        assert frame.pixels_HW3.shape == (SIDE_PX, SIDE_PX, 3)
        assert abs(float(frame.pixels_HW3.mean()) - grey) < 3
        assert frame.headers["Cache-Control"] == "no-store"
    server.policy.EndEpisode(messages.end(episode_id))
    assert get(server, f"/robots/{episode_id}/frame").status == 404


def test_a_large_frame_is_shown_small_and_in_its_own_shape(server):
    request = messages.act(start(server), 0)
    request.observation.images["agentview"].CopyFrom(encode_image(np.zeros((600, 1200, 3), np.uint8), "png"))
    server.policy.Act(request)
    assert get(server, f"/robots/{request.episode_id}/frame").pixels_HW3.shape == (FRAME_PX // 2, FRAME_PX, 3)


def test_stored_episodes_are_listed_newest_first_and_played_back_frame_by_frame(server):
    stored(server, outcome=episode_pb2.OUTCOME_FAILURE, final=90, message="it fell")
    stored(server, (128,))
    newest, older = get(server, "/episodes").json
    assert (newest["sequence"], newest["outcome"], newest["frames"]) == (2, "success", 1)
    assert (older["outcome"], older["decisions"], older["frames"], older["version"]) == ("failure", 2, 3, 0)
    assert (older["instruction"], older["arm"], older["message"]) == ("pick up the bowl", "franka", "it fell")
    frames = f"/episodes/{older['episode']}/frames"
    greys = [get(server, f"{frames}/{i}").pixels_HW3.mean() for i in range(older["frames"])]
    np.testing.assert_allclose(greys, [10, 200, 90], atol=3)  # the last is the final observation


@pytest.mark.parametrize(
    "path", ["/episodes/{id}/frames/2", "/episodes/x/frames/0", "/episodes/1/frames/0", "/robots/x/frame"]
)
def test_a_frame_that_is_not_there_says_nothing_of_the_inside(server, tmp_path, path):
    stored(server)
    (episode,) = get(server, "/episodes").json
    assert get(server, f"/episodes/{episode['episode']}/frames/1").status == 200
    reply = get(server, path.format(id=episode["episode"]))
    assert reply.status == 404
    assert str(tmp_path).encode() not in reply.body and b"Traceback" not in reply.body


def test_an_episode_that_cannot_be_read_is_named_beside_the_others(server, tmp_path):
    stored(server), stored(server)
    (first,) = tmp_path.glob("00000001-*")
    first.write_bytes(b"x" * 100)
    good, bad = get(server, "/episodes").json
    assert good["damaged"] == "" and bad["sequence"] == 1
    assert bad["damaged"].startswith(first.name) and str(tmp_path) not in bad["damaged"]
    first.unlink()
    assert "No such file" in get(server, "/episodes").json[1]["damaged"]
    assert get(server, f"/episodes/{bad['episode']}/frames/0").status == 404


def test_a_server_without_a_store_says_so():
    with serving(FakeModel(), http_port=0) as server:
        state = get(server, "/state").json
        assert (state["stores_episodes"], state["newest_episode"]) == (False, 0)
        assert get(server, "/episodes").json == []


def bearer(role: str) -> str:
    return f"Bearer {TOKENS[role]}"


def basic(role: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{TOKENS[role]}".encode()).decode()


ADMITTED = {
    "": (401, 200),
    "Bearer wrong-0123456789abcdef": (401, 200),
    bearer("robot"): (403, 200),
    basic("robot"): (403, 200),
    bearer("trainer"): (200, 200),
    basic("trainer"): (200, 200),
    bearer("admin"): (200, 200),
}
"""Authorization -> status of the page and of everything it asks for, and of the probe."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    tokens = tmp_path_factory.mktemp("access") / "tokens"
    tokens.write_text("".join(f"{role} {token}\n" for role, token in TOKENS.items()))
    with serving(FakeModel(), http_port=0, guard=Guard(Access(tokens=tokens))) as running:
        yield running


@pytest.mark.parametrize("authorization", ADMITTED)
def test_trainers_and_admins_see_the_page_and_anybody_the_probe(guarded, authorization):
    page, probe = ADMITTED[authorization]
    headers = {"Authorization": authorization} if authorization else {}
    for path in ("/", "/page.js", "/state", "/episodes", "/metrics"):
        assert get(guarded, path, **headers).status == page
    assert get(guarded, "/healthz", **headers).status == probe


def test_a_browser_is_told_to_ask_for_the_token(guarded):
    reply = get(guarded, "/")
    assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert not any(token.encode() in reply.body for token in TOKENS.values())


def test_a_page_of_another_name_cannot_reach_a_loopback_server(server):
    assert get(server, "/state", Host="attacker.example:8080").status == 421
    for name in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
        assert get(server, "/state", Host=name).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(server, method):
    assert get(server, "/state", method=method).status == 405


@pytest.fixture
def doors(monkeypatch) -> Iterator[RunningServer]:
    """With both HTTP ports, on which little patience is had."""
    monkeypatch.setattr("policy_server.http.ARRIVE_S", 0.5)
    with serving(FakeModel(), http_port=0, openpi_port=0) as running:
        yield running


@contextlib.contextmanager
def raw(server: RunningServer, door: str, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", getattr(server.server, door)), timeout=20) as connection:
        connection.sendall(data)
        yield connection


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
@pytest.mark.parametrize("door", ["http_port", "openpi_port"])
def test_a_connection_over_which_no_whole_request_comes_is_closed(doors, door, data):
    with raw(doors, door, data) as connection:
        assert connection.recv(1) == b""


SECRET = "trainer-0123456789abcdef"
MALFORMED = {
    "a header": f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\r\r\n\r\n",
    "a header of bytes": f"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: {SECRET}\xff\r\n\r\n",
    "a body": f"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZ{SECRET}\r\n\r\n",
    "a compressed body": "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx",
}


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("door", ["http_port", "openpi_port"])
def test_what_is_no_http_is_a_line_in_the_log_that_shows_nothing_of_it(doors, door, what, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(logging.getLogger("policy_server.refusals"), "filters", [])
    with raw(doors, door, MALFORMED[what].encode("latin-1")) as connection:
        while connection.recv(1000):
            pass
    assert [record.getMessage() for record in caplog.records if record.name.startswith(("aiohttp", "policy"))] == [
        "refused, INVALID_ARGUMENT: must be HTTP, got something else"
    ]
    assert SECRET not in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("key", ["AAAAAAAAAAAAAAAAAAAAAA==", "\xff"])
def test_a_websockets_greeting_is_not_logged(doors, key, caplog):
    greeting = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    greeting += f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {SECRET}\r\n\r\n"
    with raw(doors, "openpi_port", greeting.encode("latin-1")) as connection:
        assert connection.recv(9) == b"HTTP/1.1 "
    assert not caplog.records


def test_a_port_that_is_taken_is_one_sentence_and_exit_code_2(server, tiny_vla, capsys):
    args = ["serve", "--model", str(tiny_vla), "--port", "0", "--http-port", str(server.server.http_port)]
    one_sentence(args, "is another server running there", capsys)
