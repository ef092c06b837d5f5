"""What an evaluation plans, counts and returns."""

from __future__ import annotations

import pytest

from robot_client.arm import Task
from robot_client.rollout import Rollout
from sim.evaluate import EvaluateConfig, episode_seed, exit_code, main, plan, record_of, states_note, watch
from sim.job_queue import Finished
from sim.report import EpisodeRecord
from sim.suites import find_suite
from sim.worker import job_of
from tests.sim.test_report import report

ROBOSUITE = find_suite("robosuite")


def config(**changes) -> EvaluateConfig:
    return EvaluateConfig(**{"suite": "robosuite", "protocol": "held_out", **changes})


def finished(state: int, outcome: str | None, attempts: int = 1) -> Finished:
    task = Task(name="robosuite/0", instruction="lift", initial_state=f"seed:{state}", max_ticks=300)
    job = job_of(Rollout(task=task))
    if outcome is None:
        return Finished(job=job, error="worker lost: killed by SIGKILL", attempts=attempts)
    record = EpisodeRecord(task=task.name, initial_state=task.initial_state, outcome=outcome, ticks=10)
    return Finished(job=job, value=record, attempts=attempts)


def test_every_task_gets_every_state_of_the_protocol_once():
    rollouts = plan(config(), ROBOSUITE, version=7)
    pairs = {(rollout.task.name, rollout.task.initial_state) for rollout in rollouts}
    assert len(pairs) == len(rollouts) == len(ROBOSUITE.tasks) * len(ROBOSUITE.states("held_out"))
    assert {rollout.version for rollout in rollouts} == {7}
    assert {rollout.purpose for rollout in rollouts} == {"evaluate"}
    assert all(rollout.task.max_ticks == ROBOSUITE.max_ticks for rollout in rollouts)


def test_an_evaluation_is_greedy_unless_told_otherwise():
    """Defect 10."""
    assert {rollout.temperature for rollout in plan(config(), ROBOSUITE, 0)} == {0}
    sampled = plan(config(temperature=1.5, noise_correlation=0.5), ROBOSUITE, 0)
    assert {(rollout.temperature, rollout.noise_correlation) for rollout in sampled} == {(1.5, 0.5)}


def test_episodes_per_task_takes_the_first_states_and_says_so():
    some = config(episodes_per_task=3, tasks=(1,))
    assert [rollout.task.initial_state for rollout in plan(some, ROBOSUITE, 0)] == [
        "seed:2000",
        "seed:2001",
        "seed:2002",
    ]
    assert "the first 3 of 100" in states_note(some, ROBOSUITE)
    assert "first" not in states_note(config(), ROBOSUITE)


def test_a_task_named_twice_is_evaluated_once():
    assert plan(config(tasks=(1, 1)), ROBOSUITE, 0) == plan(config(tasks=(1,)), ROBOSUITE, 0)


def test_unknown_tasks_and_protocols_are_refused_by_name():
    with pytest.raises(ValueError, match=r"0\.\.2, got \[9\]"):
        plan(config(tasks=(9,)), ROBOSUITE, 0)
    with pytest.raises(ValueError, match="'paper'"):
        config(protocol="paper")
    with pytest.raises(ValueError, match="'libero_objects'"):
        config(suite="libero_objects")


def test_an_episodes_seed_depends_on_task_and_state_and_not_on_order():
    rollouts = plan(config(), ROBOSUITE, 0)
    assert len({rollout.seed for rollout in rollouts}) == len(rollouts)
    alone = plan(config(tasks=(2,), episodes_per_task=1), ROBOSUITE, 0)[0]
    assert alone.seed == episode_seed(0, "robosuite/2", "seed:2000")
    assert alone in rollouts
    assert plan(config(seed=1), ROBOSUITE, 0)[0].seed != rollouts[0].seed
    assert all(0 <= rollout.seed < 2**63 for rollout in rollouts)


def test_what_the_pool_gave_up_is_an_error_and_no_failure():
    record = record_of(finished(2000, None, attempts=3))
    assert (record.outcome, record.attempts) == ("error", 3)
    assert (record.task, record.initial_state) == ("robosuite/0", "seed:2000")
    assert "SIGKILL" in record.message


def test_attempts_are_reported_for_what_was_done_again():
    assert record_of(finished(2000, "success", attempts=2)).attempts == 2


def test_an_interruption_keeps_what_there_is():
    def results():
        yield finished(2000, "success")
        raise KeyboardInterrupt

    (record,) = watch(results(), planned=2)
    assert record.outcome == "success"


@pytest.mark.parametrize(("errors", "code"), [(0, 0), (2, 0), (3, 1)])
def test_too_many_errors_fail_the_command(errors, code):
    episodes = [record_of(finished(2000 + i, None if i < errors else "failure")) for i in range(100)]
    assert exit_code(report(episodes), max_error_share=0.02) == code


def test_missing_episodes_fail_the_command():
    assert exit_code(report([record_of(finished(2000, "success"))], planned=2), max_error_share=0.02) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 0},
        {"processes": 0},
        {"temperature": -1.0},
        {"noise_correlation": 1.0},
        {"max_error_share": 2.0},
        {"videos": -1},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change):
    (name, got), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name} .*{got}"):
        config(**change)


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out must be a folder, or one that can be made, got .*Not a directory"):
        main(EvaluateConfig(server="127.0.0.1:1", suite="robosuite", protocol="fresh", out=tmp_path / "file" / "out"))
