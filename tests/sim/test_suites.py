"""The table of suites against LIBERO's own."""

from __future__ import annotations

import pytest

from sim import assets
from sim.initial_states import fixed_states, fresh_list
from sim.suites import FRESH_PER_TASK, SUITES, find_suite, find_task, libero_instruction

LIBERO_SUITES = [name for name, suite in SUITES.items() if suite.simulator == "libero"]


@pytest.mark.parametrize("name", LIBERO_SUITES)
@pytest.mark.libero
def test_tasks_instructions_and_fixed_states_are_liberos(name: str) -> None:
    pytest.importorskip("torch", reason="LIBERO's own table needs torch")
    assets.load_libero()
    from libero.libero.benchmark import get_benchmark

    theirs = get_benchmark(name)()
    assert [task.name for task in SUITES[name].tasks] == theirs.get_task_names()
    assert [task.instruction for task in SUITES[name].tasks] == [task.language for task in theirs.tasks]
    for index in (0, theirs.get_num_tasks() - 1):
        assert (fixed_states(SUITES[name].tasks[index]) == theirs.get_task_init_states(index)).all()


def test_an_instruction_drops_the_scene() -> None:
    name = "KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    assert libero_instruction(name) == "close the top drawer of the cabinet"


@pytest.mark.parametrize("name", SUITES)
def test_no_state_is_both_trained_on_and_reported(name: str) -> None:
    """Nor chosen by, whether the states are fixed or drawn."""
    splits = SUITES[name].splits
    uses = [("train", "train_drawn"), ("tune", "tune_drawn"), ("held_out",), ("fresh",)]
    states = [{state for split in use for state in splits.get(split, ())} for use in uses]
    assert len(set().union(*states)) == sum(map(len, states))
    assert {split for use in uses for split in use} >= set(splits) - {"paper"}


@pytest.mark.parametrize("name", LIBERO_SUITES)
def test_no_draw_that_is_practised_on_is_in_the_fresh_list(name: str) -> None:
    """A fresh state is a draw too, by another name."""
    practised = {
        int(state[5:])
        for split in ("train_drawn", "tune_drawn")
        for state in SUITES[name].splits[split]
        if ":" in state
    }
    for task in SUITES[name].tasks:
        assert not practised & set(fresh_list().get(task.id, {"seeds": []})["seeds"])


def test_every_listed_task_has_a_hundred_different_fresh_states() -> None:
    for task_id, entry in fresh_list().items():
        assert len(set(entry["seeds"])) == FRESH_PER_TASK, task_id


@pytest.mark.parametrize(
    ("task_id", "expected"),
    [("libero_objekt/0", "libero_object"), ("robosuite/3", "robosuite/2"), ("robosuite/x", "robosuite/2")],
)
def test_an_unknown_task_is_refused_with_what_there_is(task_id: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        find_task(task_id)


def test_an_unknown_split_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="held_out"):
        find_suite("robosuite").states("paper")
