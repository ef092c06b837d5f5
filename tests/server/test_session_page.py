"""Sessions on the live page and behind it: what is shown, and a person's word."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from policy_server.access import Access, Guard
from policy_server.gate import GateRule
from policy_server.session import Charter, Event
from policy_server.sessions import Sessions
from protos import admin_pb2_grpc, episode_pb2, session_pb2, session_pb2_grpc
from tests.server.conftest import WIDTHS
from tests.server.running import RunningServer
from tests.server.test_http import TOKENS, get
from tests.server.test_page import CONTRAST, HOSTILE, words
from tests.server.test_session_service import begun, play, published, running

FAILURE = episode_pb2.OUTCOME_FAILURE


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with running(tmp_path, http_port=0) as server:
        yield server


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.admin_address) as channel:
        yield channel


def on_trial(server: RunningServer, channel: grpc.Channel, episodes: int = 8) -> int:
    """A session with a candidate, after some episodes of both; gives the candidate."""
    sessions, admin = session_pb2_grpc.SessionsStub(channel), admin_pb2_grpc.AdminStub(channel)
    begun(sessions, task="put the bowl on the plate", rule=session_pb2.GateRule(max_episodes=1000))
    play(server, FAILURE)
    offer = published(admin, b"near")
    assert sessions.OfferCandidate(offer, timeout=10).accepted
    for _ in range(episodes):
        play(server)
    return offer.version


def say(server: RunningServer, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and text of a POST; body: as JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server.http_port}{path}",
        data=body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


def shown(server: RunningServer) -> dict[str, Any]:
    [session] = get(server, "/state").json["sessions"]
    return session


def test_the_state_tells_what_each_version_achieved_and_what_befell_the_session(server, channel):
    candidate = on_trial(server, channel)
    session = shown(server)
    assert (session["session"], session["state"], session["candidate"]) == ("s", "running", candidate)
    assert [(one["version"], one["role"]) for one in session["versions"]] == [(0, "live"), (candidate, "on trial")]
    assert sum(one["episodes"] for one in session["versions"]) == session["episodes"] == 9
    assert sum(one["successes"] for one in session["versions"]) == 8
    assert all(0 <= one["interval"][0] < one["interval"][1] <= 1 for one in session["versions"])
    assert session["standing"].startswith("nothing is shown yet: success")
    assert [(event["what"], event["by"]) for event in session["log"]] == [("offer", "trainer")]


def test_a_person_promotes_goes_back_pauses_goes_on_and_stops(server, channel):
    candidate = on_trial(server, channel, episodes=2)
    assert say(server, "/sessions/s/promote", {"note": "it looks good"}) == (204, "")
    assert shown(server)["log"][0] | {"unix_s": 0} == {
        **{"unix_s": 0, "what": "promote", "version": candidate, "by": "person", "reason": "it looks good"}
    }
    for control, state in (("roll_back", "running"), ("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
        assert say(server, f"/sessions/s/{control}") == (204, "")
        assert shown(server)["state"] == state
    assert [one["version"] for one in shown(server)["versions"] if one["role"] == "live"] == [0]


def test_what_cannot_be_done_is_refused_in_a_sentence(server, channel):
    on_trial(server, channel, episodes=1)
    assert say(server, "/sessions/t/promote") == (404, "there is no session 't' on this server")
    assert say(server, "/sessions/s/resume") == (409, "session 's' is running")
    assert say(server, "/sessions/s/explode")[0] == 404
    for body in (b"{", b"[1]", b"\xff"):
        assert say(server, "/sessions/s/promote", body) == (400, 'must be a JSON object like {"note": "why"}')
    body = {"note": "", "version": 7}
    assert say(server, "/sessions/s/promote", body) == (409, "version 7 is meant, but version 1 is on trial now")
    assert say(server, "/sessions/s/promote", {"version": "1"}) == (400, "version must be a whole number, got '1'")
    assert shown(server)["candidate"] is not None


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_foreign_page_cannot_speak_for_a_person_at_the_browser(server, channel, kind):
    """What it may send unasked comes as one of these."""
    on_trial(server, channel, episodes=1)
    assert say(server, "/sessions/s/promote", **{"Content-Type": kind})[0] == 415
    assert shown(server)["candidate"] is not None


def test_only_an_admin_has_a_say(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{role} {token}\n" for role, token in TOKENS.items()))
    with running(tmp_path, http_port=0, guard=Guard(Access(tokens=tokens))) as server:
        said = {
            role: say(server, "/sessions/s/stop", Authorization=f"Bearer {token}")[0] for role, token in TOKENS.items()
        }
        assert said == {"robot": 403, "trainer": 403, "admin": 404}, "there is no such session"
        assert say(server, "/sessions/s/stop")[0] == 401


def test_only_a_sessions_own_episodes_are_listed_where_it_is_named(server, channel):
    on_trial(server, channel, episodes=2)
    assert len(get(server, "/episodes?session=s").json) == len(get(server, "/episodes").json) == 3
    assert get(server, "/episodes?session=t").json == []


def test_the_newest_sessions_are_shown_and_those_that_are_over_last(tmp_path):
    with running(tmp_path, http_port=0) as server:
        sessions = server.server._sessions
        assert isinstance(sessions, Sessions)
        for number in range(20):
            sessions.start(charter(f"s{number}"))
            if number > 10:
                sessions.control(f"s{number}", "stop", "")
        names = [one["session"] for one in get(server, "/state").json["sessions"]]
    assert names == [f"s{number}" for number in (*range(10, -1, -1), *range(19, 14, -1))]


def charter(name: str, task: str = "") -> Charter:
    return Charter(
        session_id=name, task=task, base=0, temperature=0.5, noise_correlation=0, rule=GateRule(), started_unix_ns=1
    )


def test_the_page_shows_a_session_and_takes_a_persons_word(server, channel, look):
    candidate = on_trial(server, channel)
    page = look(server)
    page.wait_for_selector(".session")
    assert words(page, ".session h3") == "s running"
    assert words(page, ".session .task") == "put the bowl on the plate · 9 episodes, 0 open"
    rows = [words(page, f".session tbody tr:nth-child({row})") for row in (1, 2)]
    assert rows[0].startswith("0, live ") and rows[1].startswith(f"{candidate}, on trial ")
    assert "offer, version 1, by trainer" in words(page, ".session .log")
    page.click(".session button:has-text('Promote')")
    assert words(page, "#word-title") == f"Promote: session s, version {candidate}"
    page.fill("#word-note", HOSTILE)
    page.click("#word-say")
    page.wait_for_function("() => document.querySelector('.session .log li').innerText.includes('promote')")
    assert HOSTILE in words(page, ".session .log li") and not page.is_visible("#word")
    assert page.is_disabled(".session button:has-text('Promote')")
    page.click(".session button:has-text('Its episodes')")
    page.wait_for_function("() => document.querySelectorAll('#episode-rows tr').length === 9")
    assert words(page, "#episodes-title") == "Episodes of session s"
    page.click("#all")
    page.wait_for_function("() => document.querySelector('#episodes-title').innerText === 'Episodes'")


def test_a_word_befalls_the_version_that_was_shown_when_it_was_asked_for_or_none(server, channel, look):
    candidate = on_trial(server, channel, episodes=2)
    page = look(server)
    page.click(".session button:has-text('Roll back')")
    server.server._sessions.control("s", "promote", "")  # by somebody else, meanwhile
    server.server._sessions.offer("s", candidate + 1, live=candidate, accepted=True, reason="")
    page.wait_for_function("() => document.querySelector('.session .log li').innerText.includes('offer')")
    page.click("#word-say")
    page.wait_for_function("() => document.querySelector('#word-refusal').innerText")
    assert words(page, "#word-refusal") == "version 1 is meant, but version 2 is on trial now"


def test_a_word_that_is_refused_says_why_and_a_token_is_asked_for(tmp_path, browser):
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{role} {token}\n" for role, token in TOKENS.items()))
    with running(tmp_path, http_port=0, guard=Guard(Access(tokens=tokens))) as server:
        assert isinstance(server.server._sessions, Sessions)
        server.server._sessions.start(charter("s"))
        page = browser.new_page(http_credentials={"username": "me", "password": TOKENS["trainer"]})
        page.goto(f"http://127.0.0.1:{server.server.http_port}")
        page.click(".session button:has-text('Stop')")
        assert not page.is_visible("#word-token")
        page.click("#word-say")
        page.wait_for_selector("#word-token")
        assert "must be a token of role admin, got one of role trainer" in words(page, "#word-refusal")
        page.fill("#word-token", TOKENS["admin"])
        page.click("#word-say")
        page.wait_for_function("() => document.querySelector('.session .state').innerText === 'stopped'")
        assert not page.is_visible("#word")
        page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_long_words_stay_in_sight_and_every_text_has_contrast_enough(server, channel, look, width, scheme):
    candidate = on_trial(server, channel, episodes=4)
    sessions = server.server._sessions
    sessions.start(charter("s" * 100, task="pneumonoultramicroscopicsilicovolcanoconiosis" * 3))
    with sessions.read("s") as session:
        session.apply(Event(what="undecided", unix_ns=1, by="gate", version=candidate, reason="evidence" * 60))
    page = look(server, width=width, scheme=scheme)
    page.wait_for_selector(".session:nth-of-type(2) .log li")
    narrow = "() => Math.min(...[...document.querySelectorAll('.session > *')].map((n) => n.clientWidth || 999))"
    assert page.evaluate(narrow) > 300
    inside = "(s) => [...document.querySelectorAll(s)].every((n) => n.getBoundingClientRect().right <= innerWidth)"
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(inside, ".session, .session *")
    enabled = "() => document.querySelectorAll('button').forEach((button) => (button.disabled = false))"
    page.evaluate(enabled)  # what cannot be pressed may be pale
    assert {text: ratio for text, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5} == {}
    page.click(".session button:has-text('Stop')")
    assert page.evaluate(inside, "#word, #word *")
