"""What the simulator says about its suites: asked of its command line, for the trainer never imports it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from rl_trainer.curriculum import Cell

CATALOGUE_S = 600.0
"""Longest that listing a suite may take: seconds on a quiet machine, but no run is given up for its neighbours."""


def catalogue(suite: str) -> dict:
    """What the simulator says about a suite: tasks (id -> instruction), splits (name -> states), max_ticks."""
    command = [sys.executable, "-m", "sim", "suites", "--json", "--suites", suite]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=CATALOGUE_S)
    if answer.returncode:
        raise ValueError(f"`python -m sim suites` knows no suite {suite!r}: {answer.stderr.strip().splitlines()[-1]}")
    return json.loads(answer.stdout)[suite]


def cells_of(listed: dict, tasks: Sequence[int], split: str, first: int = 0) -> list[Cell]:
    """Every (task, initial state) of a split; with `first`, the first so many states of each task."""
    ids = list(listed["tasks"])
    if unknown := [task for task in tasks if task not in range(len(ids))]:
        raise ValueError(f"tasks must be in 0..{len(ids) - 1}, got {unknown}")
    if split not in listed["splits"]:
        raise ValueError(f"split must be one of {sorted(listed['splits'])}, got {split!r}")
    states = listed["splits"][split][: first or None]
    return [(ids[task], state) for task in tasks or range(len(ids)) for state in states]
