"""What the simulator says about its suites: asked of a process of its own, for the trainer never imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from rl_trainer.curriculum import Cell

PATIENCE_S = 600.0
"""Longest that an answer may take: seconds on a quiet machine, but no run is given up for its neighbours."""


def asked(*arguments: str, environment: Mapping[str, str] = {}) -> str:
    """What Python prints, run with these; environment: over our own.  Raises ValueError with its last words."""
    command, over = [sys.executable, *arguments], {**os.environ, **environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=over)
    except subprocess.TimeoutExpired:
        raise ValueError(f"nothing came of it in {PATIENCE_S:.0f} s") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise ValueError(words[-1])
    return done.stdout


def catalogue(suite: str) -> dict:
    """What the simulator says about a suite: tasks (id -> instruction), splits (name -> states), max_ticks.

    Raises ValueError where it cannot be built here.
    """
    try:
        return json.loads(asked("-m", "sim", "suites", "--json", "--suites", suite))[suite]
    except ValueError as error:
        raise ValueError(f"`python -m sim suites` cannot list {suite!r}: {error}") from error


def cells_of(listed: dict, tasks: Sequence[int], split: str, first: int = 0) -> list[Cell]:
    """Every (task, initial state) of a split; with `first`, the first so many states of each task."""
    ids = list(listed["tasks"])
    if unknown := [task for task in tasks if task not in range(len(ids))]:
        raise ValueError(f"tasks must be in 0..{len(ids) - 1}, got {unknown}")
    if split not in listed["splits"]:
        raise ValueError(f"split must be one of {sorted(listed['splits'])}, got {split!r}")
    states = listed["splits"][split][: first or None]
    return [(ids[task], state) for task in tasks or range(len(ids)) for state in states]
