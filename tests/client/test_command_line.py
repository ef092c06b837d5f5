"""python -m robot_client: what it prints, and its exit code."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from robot_client.__main__ import main


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level("INFO")


def test_spec_prints_what_the_server_says(server, capsys):
    assert main(["spec", "--server", server.address]) == 0
    printed = capsys.readouterr().out
    assert "scripted" in printed and "4 actions of 7, 256 tokens for each number" in printed
    assert "agentview: 16x16" in printed and "eef_x, eef_y, eef_z" in printed and "20 Hz" in printed


def test_run_drives_episodes_and_reports_each(server, policy, caplog):
    flags = ["--episodes", "3", "--max-ticks", "6", "--seed", "7", "--lockstep"]
    assert main(["run", "--server", server.address, "--task", "bowl", *flags]) == 0
    assert [episode.start.seed for episode in policy.episodes.values()] == [7, 8, 9]
    assert "3 failure" in caplog.text and "6 ticks (0 held, 0 clipped)" in caplog.text


def test_run_in_real_time_reports_its_jitter(server, caplog):
    assert main(["run", "--server", server.address, "--task", "bowl", "--max-ticks", "5"]) == 0
    assert "a tick begins late by" in caplog.text


def test_flags_of_the_arm_follow_its_name(server, policy):
    assert (
        main(["run", "--server", server.address, "--task", "t", "--max-ticks", "1", "--lockstep", "--size", "32"]) == 0
    )
    assert policy.only_episode.requests[0].observation.images["agentview"].height == 32


def test_how_to_follow_is_set_by_flags(server, policy):
    flags = ["--max-ticks", "4", "--lockstep", "--replan-after", "2"]
    assert main(["run", "--server", server.address, "--task", "t", *flags]) == 0
    assert len(policy.only_episode.answers) == 2


def test_a_film_shows_what_the_policy_saw(server, policy, tmp_path):
    policy.action_of = lambda decision: np.array([0, 0.5, 0, 0, 0, 0, 1.0])  # identical frames would become one
    film = tmp_path / "films" / "kinematic.gif"
    flags = ["--max-ticks", "12", "--lockstep", "--film", str(film)]
    assert main(["run", "--server", server.address, "--task", "t", *flags]) == 0
    with Image.open(film) as image:
        assert image.size == (224, 224)
        assert image.n_frames == 3


def test_an_episode_that_ends_as_an_error_gives_exit_code_1(server, policy, caplog):
    for dimension in policy.spec.action:
        dimension.low = dimension.high = 5  # so that every action is outside the policy's own range
    policy.spec.action_tokens.bins = 128
    assert main(["run", "--server", server.address, "--task", "t", "--lockstep"]) == 1
    assert "BadAnswer" in caplog.text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arm", "hexapod"], "arm must be one of"),
        (["--arm", "replay", "--path", "nowhere.episode"], "cannot replay nowhere.episode"),
        (["--tick-rate-hz", "10"], "trained at 20 Hz, kinematic ticks at 10 Hz"),
        (["--replan-after", "9"], "replan_after must be in [0, 4]"),
        (["--server", "localhost:http"], "a server address must be HOST:PORT"),
        (["--server", "127.0.0.1:1", "--give-up-after-s", "0.2"], "UNAVAILABLE"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_before_anything_moves(server, policy, caplog, flags, sentence):
    address = [] if "--server" in flags else ["--server", server.address]
    assert main(["run", "--task", "t", *address, *flags]) == 2
    assert sentence in caplog.text and "Traceback" not in caplog.text
    assert not policy.episodes


@pytest.mark.parametrize("flags", [["--film", "x.mp4"], ["--episodes", "0"], ["--hexapod", "1"], ["--purpose", "fun"]])
def test_a_flag_that_makes_no_sense_is_refused(server, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["run", "--task", "t", "--server", server.address, *flags])
    assert exit.value.code == 2
