"""Privileged progress: how far a task has come by the simulator's own state, to measure a reward model against.

Read off the skills that the task's expert works through (sim/expert_skills.py): which stage the state is in, and how
far within it.  Nothing is remembered: a dropped object is to be fetched again, and progress falls.
"""

from __future__ import annotations

import numpy as np

from sim.expert import SceneState, Skill
from sim.expert_view import View

UNFINISHED = 0.95
"""The most that a state can show in which the simulator does not call the task done."""


class TaskProgress:
    """How far the episode that stands in a scene has come."""

    def __init__(self, scene: SceneState, recipe: tuple[Skill, ...]) -> None:
        self._view, self._recipe = View(scene.model, scene.data), recipe

    def now(self, *, success: bool) -> float:
        """From 0 to 1, which is success; between skills all count alike."""
        if success:
            return 1.0
        return UNFINISHED * float(np.mean([skill.progress(self._view) for skill in self._recipe]))
