"""Suites as a table: tasks, step limits, cameras, and the splits of initial states.

An initial state is named by a string: "17" (LIBERO's fixed state 17), "fresh:3" (entry 3 of our committed list of
draws by LIBERO's own sampler), "seed:2017" (a draw; robosuite has no fixed states).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sim import assets


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a suite."""

    suite: str
    """name of its suite"""
    index: int
    """place in its suite, from 0"""
    name: str
    """LIBERO's task name (the stem of its BDDL file), or robosuite's environment name"""
    instruction: str
    """what the policy is told, in words"""
    simulator: Literal["libero", "robosuite"]
    """which package builds it"""
    max_ticks: int
    """ticks until an episode is truncated, settling not counted"""
    cameras: tuple[str, ...]
    """names of the cameras that observations may use"""

    @property
    def id(self) -> str:
        """`suite/index`, for instance "libero_object/3"."""
        return f"{self.suite}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named list of tasks that share a step limit, cameras and splits."""

    name: str
    """name on the command line and in reports"""
    max_ticks: int
    """ticks until an episode of it is truncated"""
    cameras: tuple[str, ...]
    """names of the cameras that observations may use"""
    splits: Mapping[str, tuple[str, ...]]
    """split name -> initial-state ids"""
    simulator: Literal["libero", "robosuite"]
    """which package builds its tasks"""
    list_tasks: Callable[[Suite], tuple[Task, ...]]
    """how the tasks are listed, when first asked for"""

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks in LIBERO's default order."""
        return self.list_tasks(self)

    def states(self, split: str) -> tuple[str, ...]:
        """The initial-state ids of a split; ValueError names the splits there are."""
        if split not in self.splits:
            raise ValueError(f"split of {self.name} must be one of {sorted(self.splits)}, got {split!r}")
        return self.splits[split]


FRESH_PER_TASK = 100
LIBERO_SPLITS = {
    "train": tuple(map(str, range(0, 30))),
    "tune": tuple(map(str, range(30, 40))),
    "held_out": tuple(map(str, range(40, 50))),
    "paper": tuple(map(str, range(0, 50))),
    "fresh": tuple(f"fresh:{i}" for i in range(FRESH_PER_TASK)),
    # The fixed states of a task are nearly one state, and what is practised on them alone may fail on every draw of
    # LIBERO's own sampler: both kinds.
    "train_drawn": (*map(str, range(0, 30)), *(f"seed:{i}" for i in range(0, 70))),
    "tune_drawn": tuple(state for i in range(10) for state in (f"{30 + i}", f"seed:{1000 + i}")),
}
ROBOSUITE_SPLITS = {
    "train": tuple(f"seed:{i}" for i in range(0, 1000)),
    "tune": tuple(f"seed:{i}" for i in range(1000, 1100)),
    "held_out": tuple(f"seed:{i}" for i in range(2000, 2100)),
    "fresh": tuple(f"seed:{i}" for i in range(3000, 3100)),
}
ROBOSUITE_TASKS = {
    "Lift": "lift the red cube",
    "Stack": "stack the red cube on the green cube",
    "PickPlaceCan": "pick up the can and place it in the bin",
}


def libero_instruction(name: str) -> str:
    """The instruction that LIBERO derives from a task's name: no scene prefix, spaces for underscores."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


def _libero_tasks(suite: Suite) -> tuple[Task, ...]:
    # Loaded by path: the package around this table imports torch.
    path = assets.libero_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _tasks(suite, {name: libero_instruction(name) for name in module.libero_task_map[suite.name]})


def _robosuite_tasks(suite: Suite) -> tuple[Task, ...]:
    return _tasks(suite, ROBOSUITE_TASKS)


def _tasks(suite: Suite, instructions: Mapping[str, str]) -> tuple[Task, ...]:
    return tuple(
        Task(
            suite=suite.name,
            index=index,
            name=name,
            instruction=instruction,
            simulator=suite.simulator,
            max_ticks=suite.max_ticks,
            cameras=suite.cameras,
        )
        for index, (name, instruction) in enumerate(instructions.items())
    )


def _libero(name: str, max_ticks: int) -> Suite:
    return Suite(
        name=name,
        max_ticks=max_ticks,
        cameras=("agentview", "robot0_eye_in_hand"),
        splits=LIBERO_SPLITS,
        simulator="libero",
        list_tasks=_libero_tasks,
    )


# Step limits: OpenVLA's protocol for LIBERO.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        _libero("libero_spatial", 220),
        _libero("libero_object", 280),
        _libero("libero_goal", 300),
        _libero("libero_10", 520),
        _libero("libero_90", 400),
        Suite(
            name="robosuite",
            max_ticks=300,
            cameras=("agentview", "robot0_eye_in_hand"),
            splits=ROBOSUITE_SPLITS,
            simulator="robosuite",
            list_tasks=_robosuite_tasks,
        ),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of that name; ValueError names the suites there are."""
    if name not in SUITES:
        raise ValueError(f"suite must be one of {sorted(SUITES)}, got {name!r}")
    return SUITES[name]


def find_task(task_id: str) -> Task:
    """The task of an id such as "libero_object/3"; ValueError says what is wrong with it."""
    suite_name, _, index = task_id.partition("/")
    tasks = find_suite(suite_name).tasks
    if not index.isdigit() or int(index) >= len(tasks):
        raise ValueError(f"task id must be {suite_name}/0 to {suite_name}/{len(tasks) - 1}, got {task_id!r}")
    return tasks[int(index)]
