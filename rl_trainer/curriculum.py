"""The curriculum: which (task, initial state) to practise next, from how it went lately.

    uniform    P = 1 / cells
    paper      P ~ exp((0.5 - s) / tau), equation 4 of VLA-RL: the harder, the likelier
    balanced   P ~ exp(-|0.5 - s| / tau): what its text says, the likeliest are those that succeed half of the time

s is a cell's recent success rate.  A suite has hundreds of cells and a run visits each a few times: what a cell has not
shown lately is taken from the other cells of its task.  What is remembered of all of them goes as far back: a cell that
was visited once, long ago, says nothing of the policy of today.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Cell = tuple[str, str]
"""(task, initial state)"""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How much more often some cells are practised than others."""

    rule: Literal["uniform", "paper", "balanced"] = "balanced"
    tau: float = 0.2
    """the smaller, the sharper; the paper does not say"""
    window: int = 256
    """latest outcomes that are remembered, those of all cells together"""
    prior: float = 0.5
    """success rate of a task that was never tried"""
    prior_weight: float = 1.0
    """how many outcomes the prior counts as in a task's rate, and the task's rate in a cell's"""
    floor: float = 0.1
    """share of the practice that is spread evenly, so that no cell is forgotten"""

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.window < 1 or self.prior_weight <= 0:
            raise ValueError(
                f"tau and prior_weight must be above 0 and window >= 1, "
                f"got {self.tau}, {self.prior_weight} and {self.window}"
            )
        if not 0 <= self.prior <= 1 or not 0 < self.floor <= 1:
            raise ValueError(f"prior must be in [0, 1] and floor in (0, 1], got {self.prior} and {self.floor}")


class Curriculum:
    """Samples cells with random numbers of its own; what it remembers goes into a checkpoint."""

    def __init__(self, cells: Sequence[Cell], config: CurriculumConfig, *, seed: int):
        if not cells or len(set(cells)) < len(cells):
            raise ValueError(
                f"cells must differ and be at least one, got {len(cells)}, of them {len(set(cells))} different"
            )
        self.cells, self._config = tuple(cells), config
        self._outcomes = deque[tuple[Cell, bool]](maxlen=config.window)
        self._rng = np.random.default_rng(seed)

    def observe(self, task: str, initial_state: str, success: bool) -> None:
        """How an episode ended.  An error says nothing about a cell, and does not belong here."""
        if (task, initial_state) not in self.cells:
            raise ValueError(f"({task!r}, {initial_state!r}) is none of the curriculum's {len(self.cells)} cells")
        self._outcomes.append(((task, initial_state), bool(success)))

    @property
    def success_rates(self) -> np.ndarray:
        """float64, one a cell: of its remembered outcomes and its task's rate, which begins at the prior."""
        weight, prior = self._config.prior_weight, self._config.prior
        tried, done = Counter[Cell | str](), Counter[Cell | str]()
        for cell, success in self._outcomes:
            for counted in (cell, cell[0]):
                tried[counted] += 1
                done[counted] += success
        rate = {task: (prior * weight + done[task]) / (weight + tried[task]) for task, _ in self.cells}
        return np.array([(rate[cell[0]] * weight + done[cell]) / (weight + tried[cell]) for cell in self.cells])

    @property
    def probabilities(self) -> np.ndarray:
        """float64, one a cell, summing to 1."""
        exponents, floor = self._exponents() / self._config.tau, self._config.floor
        weights = np.exp(exponents - exponents.max())
        return (1 - floor) * weights / weights.sum() + floor / len(weights)

    @property
    def task_probabilities(self) -> dict[str, float]:
        """Task id -> the sum of its cells' probabilities."""
        of_task = defaultdict[str, float](float)
        for (task, _), probability in zip(self.cells, self.probabilities, strict=True):
            of_task[task] += float(probability)
        return dict(of_task)

    def sample(self, count: int, *, group: int = 1) -> list[Cell]:
        """`count` cells, each `group` times in a row; groups of a method that compares episodes are of one cell."""
        drawn = self._rng.choice(len(self.cells), count, p=self.probabilities)
        return [self.cells[index] for index in drawn for _ in range(group)]

    def state(self) -> dict[str, Any]:
        """Everything a continuation needs, as JSON can hold it."""
        return {
            "cells": [list(cell) for cell in self.cells],
            "outcomes": [[*cell, success] for cell, success in self._outcomes],
            "rng": self._rng.bit_generator.state,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what state() gave.  Raises ValueError when it is of other cells."""
        cells = tuple((task, initial_state) for task, initial_state in state["cells"])
        if cells != self.cells:
            raise ValueError(f"the saved curriculum has {len(cells)} other cells than the {len(self.cells)} of this")
        self._outcomes.clear()
        for task, initial_state, success in state["outcomes"]:
            self.observe(task, initial_state, success)
        self._rng.bit_generator.state = state["rng"]

    def _exponents(self) -> np.ndarray:
        distance = 0.5 - self.success_rates
        if self._config.rule == "paper":
            return distance
        return -np.abs(distance) if self._config.rule == "balanced" else np.zeros(len(distance))
