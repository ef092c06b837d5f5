"""The command line: what the user can put right is one clear line and exit code 2."""

from __future__ import annotations

import json

import pytest

from policy_server.access import Access, Guard
from protos import policy_pb2
from sim.__main__ import main
from tests.server.running import serving
from tests.sim.wandering_model import WanderingModel


def test_a_policy_that_does_not_fit_is_refused_before_anything_is_built(capsys):
    model = WanderingModel()
    model.spec.images.append(policy_pb2.ImageSpec(name="left_shoulder", height=32, width=32))
    with serving(model) as server:
        assert main(["evaluate", "--server", server.address, "--suite", "robosuite"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "left_shoulder" in message


def test_a_server_that_wants_a_token_is_shown_it(tmp_path, capsys):
    token, tokens = tmp_path / "token", tmp_path / "tokens"
    token.write_text("robot-0123456789abcdef")
    tokens.write_text(f"robot {token.read_text()}")
    with serving(WanderingModel(), guard=Guard(Access(tokens=tokens))) as server:
        command = ["evaluate", "--server", server.address, "--suite", "robosuite", "--tasks", "7"]
        assert main(command) == 2
        assert "authorization: must be a token, got none: see --token-file" in capsys.readouterr().err
        assert main([*command, "--token-file", str(token)]) == 2
        assert "must be in 0..2, got [7]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "worker"])
def test_a_token_that_would_travel_in_the_open_is_refused_before_anything_is_started(command, tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text("robot-0123456789abcdef")
    assert main([command, "--server", "192.168.1.7:50051", "--token-file", str(token)]) == 2
    assert "a token must not travel to 192.168.1.7 unencrypted: use --tls-ca" in capsys.readouterr().err


def test_an_unknown_task_is_refused_before_anything_is_built(capsys):
    with serving(WanderingModel()) as server:
        assert main(["evaluate", "--server", server.address, "--suite", "robosuite", "--tasks", "7"]) == 2
    assert "must be in 0..2, got [7]" in capsys.readouterr().err


def test_suites_are_listed_for_a_trainer(capsys):
    assert main(["suites", "--suites", "robosuite", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["robosuite"]
    assert listed["tasks"]["robosuite/0"] == "lift the red cube"
    assert listed["splits"]["held_out"][0] == "seed:2000"
    assert main(["suites", "--suites", "robosuite"]) == 0
    assert "robosuite: 3 tasks" in capsys.readouterr().out


def test_scenes_are_timed_for_whoever_plans_a_run(capsys):
    quick = ["--tasks", "0", "--ticks", "8", "--frames", "1", "--size-px", "32"]
    assert main(["timing", "--suite", "robosuite", "--processes", "2", *quick]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("tick_s", "frame_s", "coarse_frame_s", "reset_s", "build_s"), "base_gb", "scene_gb", "slowdown"
    }  # fmt: skip
    assert all(value > 0 for value in found.values())
    assert found["tick_s"] < found["reset_s"] < found["build_s"]  # a reset settles for ten ticks
    with pytest.raises(SystemExit, match="2"):
        main(["timing", "--suite", "robosuite", "--tasks", "7"])
    assert "must be in 0..2, got [7]" in capsys.readouterr().err
