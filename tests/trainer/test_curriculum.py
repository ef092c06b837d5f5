from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from rl_trainer.curriculum import Cell, Curriculum, CurriculumConfig

CELLS: list[Cell] = [("lift", "0"), ("lift", "1"), ("stack", "0")]


def curriculum(*outcomes: str, seed: int = 0, **options) -> Curriculum:
    """Outcomes of each cell in turn: "101" is success, failure, success."""
    made = Curriculum(
        CELLS, CurriculumConfig(**{"tau": 0.5, "prior_weight": 1e-12, "floor": 1e-12, **options}), seed=seed
    )
    for cell, past in zip(CELLS, outcomes, strict=False):
        for outcome in past:
            made.observe(*cell, outcome == "1")
    return made


def shares(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def test_papers_rule_is_equation_4_and_prefers_what_fails() -> None:
    """s = 0, .5, 1 at tau .5: e, 1, 1/e."""
    made = curriculum("0000", "0101", "1111", rule="paper")
    np.testing.assert_allclose(made.success_rates, [0, 0.5, 1], atol=1e-9)
    np.testing.assert_allclose(made.probabilities, shares(math.e, 1, 1 / math.e))


def test_balanced_prefers_what_succeeds_half_of_the_time() -> None:
    made = curriculum("0000", "0101", "1111", rule="balanced")
    np.testing.assert_allclose(made.probabilities, shares(1 / math.e, 1, 1 / math.e))


def test_uniform_prefers_nothing() -> None:
    np.testing.assert_allclose(curriculum("0000", "0101", "1111", rule="uniform").probabilities, [1 / 3] * 3)


def test_a_sharp_rule_stays_finite() -> None:
    made = curriculum("0000", "0101", "1111", rule="paper", tau=1e-4)
    np.testing.assert_allclose(made.probabilities, [1, 0, 0], atol=1e-9)


def test_the_floor_is_shared_evenly_so_that_nothing_starves() -> None:
    made = curriculum("0000", "0101", "1111", rule="paper", tau=1e-4, floor=0.3)
    np.testing.assert_allclose(made.probabilities, [0.8, 0.1, 0.1])


def test_a_tasks_share_is_that_of_its_cells() -> None:
    made = curriculum("0000", "0101", "1111", rule="paper")
    of_cells = shares(math.e, 1, 1 / math.e)
    assert made.task_probabilities == pytest.approx({"lift": of_cells[0] + of_cells[1], "stack": of_cells[2]})


def test_a_task_that_was_never_tried_has_the_prior_and_its_cells_share_what_it_showed() -> None:
    """Prior .5 that counts as one outcome: lift's rate after four failures is .1, which counts as one in its cells."""
    made = curriculum("0", "000", prior=0.5, prior_weight=1.0)
    np.testing.assert_allclose(made.success_rates, [0.1 / 2, 0.1 / 4, 0.5])
    made = curriculum("", "111", prior=0.5, prior_weight=1.0)
    np.testing.assert_allclose(made.success_rates, [3.5 / 4, (3.5 / 4 + 3) / 4, 0.5])


def test_only_the_window_is_remembered() -> None:
    np.testing.assert_allclose(curriculum("1111100", window=4).success_rates[0], 0.5)


def test_what_a_cell_showed_long_ago_is_forgotten_though_it_was_not_tried_since() -> None:
    made = curriculum("00", "1111", window=4)
    np.testing.assert_allclose(made.success_rates[:2], 1, atol=1e-9)


def test_the_rate_follows_a_policy_that_gets_better_however_many_cells_there_are() -> None:
    """The tasks' success steps from 0.2 to 0.95; after four iterations of 64 episodes nothing older is remembered."""
    cells = [(f"task {task}", str(state)) for task in range(10) for state in range(100)]
    made, rng = Curriculum(cells, CurriculumConfig(), seed=0), np.random.default_rng(0)
    for success in [0.2] * 20 + [0.95] * 4:
        for cell in made.sample(64):
            made.observe(*cell, rng.random() < success)
    assert made.success_rates.mean() > 0.85


def test_cells_are_drawn_as_often_as_they_should_be() -> None:
    made = curriculum("0000", "0101", "1111", rule="paper", floor=0.1)
    drawn = Counter(made.sample(20_000))
    np.testing.assert_allclose([drawn[cell] / 20_000 for cell in CELLS], made.probabilities, atol=0.015)


def test_a_group_is_one_cell_as_often_as_asked() -> None:
    drawn = curriculum().sample(5, group=4)
    assert len(drawn) == 20
    assert all(len(set(drawn[start : start + 4])) == 1 for start in range(0, 20, 4))
    assert len(set(drawn)) > 1


def test_a_saved_curriculum_goes_on_with_the_same_outcomes_and_the_same_draws() -> None:
    one = curriculum("0011", "01", seed=3)
    one.sample(7)
    state = json.loads(json.dumps(one.state()))
    other = curriculum("1111", "11", "11", seed=4)
    other.load(state)
    np.testing.assert_array_equal(other.probabilities, one.probabilities)
    assert other.sample(50) == one.sample(50)
    one.observe("lift", "0", True)
    other.observe("lift", "0", True)
    assert other.state() == one.state()


def test_draws_are_the_curriculums_own() -> None:
    first = curriculum(seed=1).sample(50)
    np.random.seed(0)
    assert curriculum(seed=1).sample(50) == first
    assert curriculum(seed=2).sample(50) != first


def test_other_cells_are_refused() -> None:
    made = curriculum()
    with pytest.raises(ValueError, match="none of the curriculum's 3 cells"):
        made.observe("lift", "2", True)
    with pytest.raises(ValueError, match="2 other cells than the 3"):
        made.load(Curriculum(CELLS[:2], CurriculumConfig(), seed=0).state())
    for cells in ([], [CELLS[0], CELLS[0]]):
        with pytest.raises(ValueError, match="must differ and be at least one"):
            Curriculum(cells, CurriculumConfig(), seed=0)


@pytest.mark.parametrize(
    "fields", [{"tau": 0.0}, {"window": 0}, {"prior": 1.5}, {"prior_weight": 0.0}, {"floor": 0.0}, {"floor": 1.5}]
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        CurriculumConfig(**fields)
