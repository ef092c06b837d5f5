"""A scripted person beside a simulated arm: watches some of the practice, and takes over from a policy that is
not done in time.
"""

from __future__ import annotations

import functools
import logging
import random
from dataclasses import dataclass

import numpy as np

from robot_client.arm import Arm
from robot_client.pilot import Wish
from robot_client.rollout import Rollout
from sim.expert import Expert
from sim.expert_tasks import recipe_for
from sim.libero_arm import LiberoArm

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Which episodes of practice are corrected, and when."""

    share: float = 0.0
    """of the episodes, drawn by chance, that are watched"""
    after_ticks: int = 80
    """the policy has had when the corrector takes over, to the end of the episode"""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        if self.after_ticks < 0:
            raise ValueError(f"after_ticks must not be negative, got {self.after_ticks}")

    def pilot(self, arm: Arm, rollout: Rollout) -> Corrector | None:
        """Of an episode that is to begin on a simulated arm; None: nobody watches, as always in evaluations, and
        where the task has no expert, which is logged once."""
        assert isinstance(arm, LiberoArm)
        if rollout.purpose != "train" or random.random() >= self.share:
            return None
        try:
            return Corrector(arm, after_ticks=self.after_ticks)
        except ValueError as error:
            _log_once(str(error))
            return None


class Corrector:
    """A Pilot of one episode.  Drives as the scripted expert of the scene's task would."""

    def __init__(self, arm: LiberoArm, *, after_ticks: int):
        self._arm, self._after_ticks = arm, after_ticks
        self._expert = Expert(arm.scene, recipe_for(arm.scene.task))

    def wish(self) -> Wish:
        """See Pilot."""
        if self._arm.state().tick < self._after_ticks:  # asked, an arm puts its own episode in the scene
            return Wish()
        return Wish(action_A=self._expert.action().astype(np.float32))


@functools.cache
def _log_once(text: str) -> None:
    log.warning("%s: nobody corrects", text)
