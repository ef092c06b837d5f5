"""A session's report says what the server says, and its page needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policy_server.vla.checkpoint import load_config
from protos import session_pb2
from rl_trainer.films import HOLD, read_webp
from rl_trainer.session_report import LEAST, WINDOW, film, write_session_report
from tests.trainer import fake_episodes as fake
from tests.trainer.test_report import Page

HOSTILE = "<script>alert(1)</script>"
ROW = {"step": 1, "reference_kl": 0.01, "success_nll": 0.9, "success_lessons": 40, "value": 0.3, "episodes": 30}


def session(episodes: int = 60) -> session_pb2.Session:
    """The base fails, version 1 succeeds; a person helped in every tenth episode."""
    outcomes = [
        session_pb2.SessionEpisode(
            version=number % 2,
            success=number % 2 == 1,
            intervened=number % 10 == 0,
            ticks=100,
            holds=5,
            unix_ns=1000 + number,
        )
        for number in range(episodes)
    ]
    tally = session_pb2.Tally(episodes=30, successes=12, interventions=3, ticks=1000, holds=20, clips=30)
    return session_pb2.Session(
        session_id="bowl",
        task=HOSTILE,
        state="SESSION_STATE_STOPPED",
        base_version=0,
        live_version=1,
        versions=[session_pb2.VersionTally(version=0, tally=tally), session_pb2.VersionTally(version=1)],
        log=[
            session_pb2.SessionEvent(unix_ns=1010, what="offer", version=1, by="trainer", reason="near enough"),
            session_pb2.SessionEvent(unix_ns=1050, what="promote", version=1, by="gate", reason=HOSTILE),
        ],
        episodes=outcomes,
    )


def report(out: Path, of: session_pb2.Session) -> Path:
    (out / "curve.jsonl").write_text(json.dumps(ROW) + "\n")
    return write_session_report(out, of, seconds=3600)


def test_the_page_says_what_the_server_says_and_needs_nothing_else(tmp_path: Path) -> None:
    path = report(tmp_path, session())
    page = Page(path)
    versions, log = page.tables
    assert versions[1] == ["0", "base", "12/30", "40.0", "[24.6, 57.7]", "3", "5.0", "0"]
    assert versions[2][:3] == ["1", "live", "0/0"]
    assert [line[1:] for line in log[1:]] == [
        ["offer", "1", "trainer", "near enough"],
        ["promote", "1", "gate", HOSTILE],
    ]
    assert "stopped, 60 episodes, 1:00 h" in path.read_text() and "versions/1" in path.read_text()
    assert "svg" in page.tags and not page.tags & {"script", "link", "iframe"}


@pytest.mark.parametrize("episodes", [0, LEAST - 1, LEAST, WINDOW + 5])
def test_a_session_of_any_length_has_a_report(tmp_path: Path, episodes: int) -> None:
    text = report(tmp_path, session(episodes)).read_text()
    assert ("episodes together" in text) == (episodes >= LEAST)


def test_the_first_success_and_the_first_failure_of_a_version_are_filmed(tiny_vla: Path, tmp_path: Path) -> None:
    config = load_config(tiny_vla)
    for decisions in (2, 5):
        chunks = [fake.numbered_chunk(config, number) for number in range(decisions)]
        episode = fake.write_episode(tmp_path, config, fake.ticks(0, "pp"), chunks, version=1)
        film(tmp_path / "report", episode, success=True, camera=config.camera)
    [path] = (tmp_path / "report").glob("*.webp")
    assert path.name == "1-success.webp" and len(read_webp(path)) == 2 + 1 + HOLD, "the first one's, and its end"
    assert "img" in Page(report(tmp_path, session())).tags
