"""python -m robot_client: what it prints, and its exit code."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from PIL import Image

from protos import episode_pb2, rollout_pb2
from protos.episode_file import read_episode
from robot_client import arms
from robot_client.__main__ import main
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import small_move
from tests.client.test_real_server import ScriptedModel
from tests.server.running import serving


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level("INFO")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_spec_prints_what_the_server_says(server, capsys):
    assert main(["spec", "--server", server.address]) == 0
    printed = capsys.readouterr().out
    assert "scripted" in printed and "4 actions of 7, 256 tokens for each number" in printed
    assert "agentview: 16x16" in printed and "eef_x, eef_y, eef_z" in printed and "20 Hz" in printed


def test_a_command_that_is_interrupted_says_so_in_a_word(monkeypatch, caplog):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("robot_client.__main__.connect", interrupt)
    assert main(["spec"]) == 130
    assert caplog.messages[-1] == "interrupted"


def test_run_drives_episodes_and_reports_each(server, policy, caplog):
    flags = ["--episodes", "3", "--max-ticks", "6", "--seed", "7", "--lockstep"]
    assert main(["run", "--server", server.address, "--task", "bowl", *flags]) == 0
    assert [episode.start.seed for episode in policy.episodes.values()] == [7, 8, 9]
    assert "3 failure" in caplog.text and "6 ticks (0 held, 0 clipped)" in caplog.text


def test_tasks_take_turns(server, policy):
    flags = ["--task", "bowl", "--task", "plate", "--episodes", "2", "--max-ticks", "1", "--lockstep"]
    assert main(["run", "--server", server.address, *flags]) == 0
    assert [episode.start.task for episode in policy.episodes.values()] == ["bowl", "plate"] * 2


def test_what_the_server_does_not_keep_is_recorded_here(server, policy, tmp_path):
    flags = ["--task", "bowl", "--max-ticks", "3", "--lockstep"]
    assert main(["run", "--server", server.address, *flags]) == 0
    (path,) = (tmp_path / "episodes").glob("*.episode")
    assert len(read_episode(path).ticks) == 3
    policy.spec.stores_episodes = True
    assert main(["run", "--server", server.address, *flags]) == 0
    assert len(list(tmp_path.rglob("*.episode"))) == 1


def test_work_is_taken_from_the_servers_queue_as_long_as_episodes_are_wanted(tmp_path):
    with serving(ScriptedModel(), episodes=tmp_path) as server:
        rollouts = [
            rollout_pb2.Rollout(rollout_id=f"run/0/{n}", task=task, purpose="PURPOSE_TRAIN", temperature=0.5, seed=n)
            for n, task in enumerate(["bowl", "foreign", "plate", "bowl"])
        ]
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=rollouts))
        flags = ["--task", "bowl", "--task", "plate", "--leases", "--episodes", "2", "--max-ticks", "2", "--lockstep"]
        assert main(["run", "--server", server.address, *flags]) == 0
        queue = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest())
        assert (queue.done, queue.waiting, queue.leased) == (2, 2, 0)
    starts = [read_episode(path).start for path in tmp_path.glob("*.episode")]
    assert sorted((start.task, start.seed) for start in starts) == [("bowl", 0), ("plate", 2)]
    assert {(start.purpose, start.temperature) for start in starts} == {(episode_pb2.PURPOSE_TRAIN, 0.5)}


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


def test_a_film_shows_what_the_policy_saw_in_the_last_episode(server, policy, tmp_path):
    policy.action_of = lambda decision: np.array([0, 0.5, 0, 0, 0, 0, 1.0])  # identical frames would become one
    film = tmp_path / "films" / "kinematic.gif"
    flags = ["--episodes", "2", "--max-ticks", "12", "--lockstep", "--film", str(film)]
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


@pytest.fixture
def broken_arm(offer):
    offer(f"[{arms.ARMS.group}]\nbroken = tests.client.test_command_line:BrokenArm\n")


class BrokenArm(FakeArm):
    """A real one, whose brakes stay on."""

    def __init__(self, *, tick_rate_hz: float = 20.0):
        super().__init__(spec_of(lockstep=False, tick_rate_hz=tick_rate_hz), fail_reset=True)


def test_where_nobody_sees_to_the_arm_its_fault_ends_the_run(server, policy, caplog, broken_arm):
    flags = ["--task", "bowl", "--episodes", "5", "--arm", "broken"]
    assert main(["run", "--server", server.address, *flags]) == 1
    assert "the brakes are on" in caplog.text and "nobody is there to see to the arm" in caplog.text
    assert caplog.messages[-1] == "1 error"


def test_a_session_that_there_is_not_ends_the_run_before_the_arm_moves_again(tmp_path, caplog):
    with serving(ScriptedModel(), episodes=tmp_path) as server:
        flags = ["--task", "bowl", "--episodes", "5", "--session", "bowll"]
        assert main(["run", "--server", server.address, *flags]) == 1
    assert "the run ends here" in caplog.text and "this server has no sessions" in caplog.text
    assert caplog.messages[-1] == "1 error"


def test_a_broken_arm_leaves_the_rollout_queue_as_it_was(tmp_path, broken_arm):
    """A rollout is set aside after three errors."""
    with serving(ScriptedModel(), episodes=tmp_path) as server:
        work = rollout_pb2.Rollout(rollout_id="run/0/0", task="bowl", purpose="PURPOSE_TRAIN", temperature=0.5)
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[work]))
        for _ in range(3):
            assert main(["run", "--server", server.address, "--task", "bowl", "--leases", "--arm", "broken"]) == 1
        queue = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest())
    assert (queue.waiting, queue.leased, queue.done, list(queue.set_aside)) == (1, 0, 0, [])


def test_a_run_cut_short_between_episodes_says_how_the_others_ended(server, policy, caplog):
    def slower(decision: int) -> np.ndarray:
        policy.spec.tick_rate_hz = 10
        return small_move(decision)

    policy.action_of = slower
    flags = ["--task", "bowl", "--episodes", "3", "--max-ticks", "4", "--lockstep"]
    assert main(["run", "--server", server.address, *flags]) == 1
    assert "trained at 10 Hz, kinematic ticks at 20 Hz" in caplog.text
    assert caplog.messages[-1] == "1 failure"


def test_ctrl_c_ends_the_episode_under_way_as_an_error_and_says_how_all_ended(server, policy, caplog):
    def interrupting(decision: int) -> np.ndarray:
        if decision == 2:
            signal.raise_signal(signal.SIGINT)
        return small_move(decision)

    policy.action_of = interrupting
    flags = ["--task", "bowl", "--episodes", "3", "--max-ticks", "200"]
    assert main(["run", "--server", server.address, *flags]) == 1
    assert caplog.messages[-2:] == ["interrupted", "1 error"]
    assert policy.only_episode.end.outcome == episode_pb2.OUTCOME_ERROR


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arm", "hexapod"], "arm must be one of"),
        (["--arm", "replay", "--path", "nowhere.episode"], "cannot replay nowhere.episode"),
        (["--tick-rate-hz", "10"], "trained at 20 Hz, kinematic ticks at 10 Hz"),
        (["--replan-after", "9"], "replan_after must be in [0, 4]"),
        (["--server", "localhost:http"], "a server address must be HOST:PORT"),
        (["--server", "127.0.0.1:1", "--give-up-after-s", "0.2"], "UNAVAILABLE"),
        (["--guided"], "keys are read from a terminal"),
        (["--pilot", "wheel"], "pilot must be one of ['gamepad', 'keyboard', "),
        (["--pilot", "keyboard"], "keys are read from a terminal"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_before_anything_moves(server, policy, caplog, flags, sentence):
    address = [] if "--server" in flags else ["--server", server.address]
    assert main(["run", "--task", "t", *address, *flags]) == 2
    assert sentence in caplog.text and "Traceback" not in caplog.text
    assert not policy.episodes


@pytest.mark.parametrize(
    "flags",
    [
        ["--film", "x.mp4"],
        ["--episodes", "0"],
        ["--hexapod", "1"],
        ["--purpose", "fun"],
        ["--session", "s", "--temperature", "1"],
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(server, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["run", "--task", "t", "--server", server.address, *flags])
    assert exit.value.code == 2
