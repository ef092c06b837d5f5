"""A recorded episode as an arm: shows what was recorded, and measures how far the answers are from what was done.

Exercises the server and the network without hardware.  Answers do not change what is shown next.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos import codec, episode_pb2
from protos.episode_file import DamagedEpisode, Episode, read_episode
from robot_client.arm import ACTION_NAMES, ArmSpec, ArmState, Limits, Observation, Outcome, Task
from robot_client.errors import ArmError

logger = logging.getLogger(__name__)

OUTCOMES: dict[int, Outcome] = {
    episode_pb2.OUTCOME_SUCCESS: "success",
    episode_pb2.OUTCOME_FAILURE: "failure",
    episode_pb2.OUTCOME_ERROR: "error",
}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far the answers were from the recorded actions, over the ticks compared."""

    names: tuple[str, ...]
    mean_A: np.ndarray
    """Mean absolute difference, units of the action."""
    max_A: np.ndarray
    ticks: int

    def __str__(self) -> str:
        columns = zip(self.names, self.mean_A, self.max_A, strict=True)
        differences = ", ".join(f"{name} {mean:.3g} ({worst:.3g})" for name, mean, worst in columns)
        return f"distance from the recorded actions over {self.ticks} ticks, mean (max): {differences}"


class ReplayArm:
    """Ends with the recording: as a success, since an answer cannot change what was recorded."""

    def __init__(self, *, path: Path, lockstep: bool = True):
        """path: an episode file.  lockstep: as fast as answers come, instead of at the recorded rate.

        Raises ArmError when the file is damaged or holds no decision or no tick.
        """
        try:
            self._episode = read_episode(path)
        except (OSError, DamagedEpisode) as error:
            raise ArmError(f"cannot replay {path}: {error}") from error
        if not self._episode.decisions or not self._episode.ticks:
            raise ArmError(f"cannot replay {path}: it holds no decision or no tick")
        self._due_ticks = due_ticks(self._episode)
        width = len(self._episode.ticks[0].action)
        first = self._episode.decisions[0].observation
        self._spec = ArmSpec(
            name="replay",
            action_names=ACTION_NAMES if width == len(ACTION_NAMES) else tuple(f"action_{a}" for a in range(width)),
            image_names=tuple(sorted(first.images)),
            state_names=tuple(self._episode.start.state_names),
            tick_rate_hz=self._episode.start.tick_rate_hz or 20.0,
            lockstep=lockstep,
            limits=Limits(low=(-np.inf,) * width, high=(np.inf,) * width),
            asset_tree=self._episode.start.asset_tree,
        )
        self.reset(Task(name="", instruction=""))

    @property
    def spec(self) -> ArmSpec:
        return self._spec

    def reset(self, task: Task) -> None:
        """Back to the first observation.  The instruction is the recording's, not the task's."""
        self._tick = 0
        self._differences_TA: list[np.ndarray] = []

    def state(self) -> ArmState:
        over = self._tick >= len(self._episode.ticks)
        return ArmState(tick=self._tick, state_S=_state_S(self._seen), outcome="success" if over else None)

    def observe(self) -> Observation:
        seen = self._seen
        return Observation(
            images={name: codec.decode_image(image, name) for name, image in seen.images.items()},
            state_S=_state_S(seen),
            instruction=seen.instruction,
            capture_time_ns=time.monotonic_ns(),
        )

    def apply(self, action_A: np.ndarray) -> np.ndarray:
        if self._tick < len(self._episode.ticks):
            recorded_A = np.array(self._episode.ticks[self._tick].action, np.float32)
            self._differences_TA.append(np.abs(action_A - recorded_A))
        self._advance()
        return action_A

    def hold(self) -> np.ndarray:
        recorded = self._episode.ticks[min(self._tick, len(self._episode.ticks) - 1)].action
        self._advance()
        stays = [
            value if name == "gripper" else 0.0 for name, value in zip(self._spec.action_names, recorded, strict=True)
        ]
        return np.array(stays, np.float32)

    def close(self) -> None:
        pass

    def deviation(self) -> Deviation:
        """Since the reset.  Raises ArmError when no action has been applied."""
        if not self._differences_TA:
            raise ArmError("no action has been applied since the reset")
        differences_TA = np.stack(self._differences_TA)
        return Deviation(
            names=self._spec.action_names,
            mean_A=differences_TA.mean(axis=0),
            max_A=differences_TA.max(axis=0),
            ticks=len(differences_TA),
        )

    def _advance(self) -> None:
        self._tick += 1
        if self._tick == len(self._episode.ticks) and self._differences_TA:
            logger.info("%s", self.deviation())

    @property
    def _seen(self) -> episode_pb2.Observation:
        """That of the latest decision whose actions are counted from this tick, or from one before it."""
        d = int(np.searchsorted(self._due_ticks, self._tick, side="right")) - 1
        return self._episode.decisions[d].observation


def _state_S(seen: episode_pb2.Observation) -> np.ndarray:
    return codec.decode_tensor(seen.state, "state") if seen.state.data else np.zeros(0, np.float32)


def due_ticks(episode: Episode) -> list[int]:
    """For each decision, the tick that its actions are counted from: its first executed tick, less that one's index.

    Its observation was taken then, or earlier by the ticks for which the arm has held since.  A decision of which
    nothing was executed takes the place of the one before it.
    """
    first: dict[int, int] = {}
    for position, tick in enumerate(episode.ticks):
        first.setdefault(tick.decision, max(0, position - tick.index))
    due = [0]
    for decision in episode.decisions[1:]:
        due.append(max(due[-1], first.get(decision.decision, due[-1])))
    return due
