"""What can be run here: suites, tasks and splits of initial states, for people and, as JSON, for trainers."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sim.leasing import suites_here
from sim.suites import find_suite


@dataclass(frozen=True, kw_only=True)
class CatalogueConfig:
    """Lists suites, tasks and splits of initial states."""

    suites: tuple[str, ...] = ()
    """Which; none given: all that can be built here."""
    json: bool = False
    """One JSON object: suite -> tasks (id -> instruction), splits (name -> initial states) and max_ticks."""


def main(config: CatalogueConfig) -> int:
    """Prints the list."""
    suites = [find_suite(name) for name in config.suites or suites_here()]
    if config.json:
        listed = {
            suite.name: {
                "tasks": {task.id: task.instruction for task in suite.tasks},
                "splits": {name: list(states) for name, states in suite.splits.items()},
                "max_ticks": suite.max_ticks,
            }
            for suite in suites
        }
        print(json.dumps(listed))
        return 0
    for suite in suites:
        splits = ", ".join(f"{name} ({len(states)})" for name, states in suite.splits.items())
        print(f"{suite.name}: {len(suite.tasks)} tasks, {suite.max_ticks} ticks at most; initial states: {splits}")
        for task in suite.tasks:
            print(f"  {task.id:<20} {task.instruction}")
    return 0
