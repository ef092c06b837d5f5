"""Who drives while a demonstration is recorded: the expert, shaken, or now and then the policy that learns from it.

Taking turns shows the learner how to go on from states of its own making (corrections in the manner of DAgger, Ross et
al. 2011, and HG-DAgger, Kelly et al. 2019): the expert's stretches are what is learned from, the learner's lead there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from protos import episode_pb2
from robot_client.arm import ArmSpec, Observation, Task
from robot_client.client import PolicyClient
from robot_client.rollout import Rollout
from sim.expert import Expert

POSITION = slice(0, 3)


class Driver(Protocol):
    """Chooses the executed actions of a stretch of ticks."""

    source: episode_pb2.Source
    """what its ticks are recorded as"""

    @property
    def wants_observation(self) -> bool:
        """Whether an observation is due before the next action."""
        ...

    def start(self, task: Task, rng: np.random.Generator) -> None:
        """A new episode, whose randomness is drawn from rng."""
        ...

    def take_over(self) -> None:
        """A new stretch: somebody else may have driven in between."""
        ...

    def look(self, observation: Observation) -> None:
        """The observation that was due."""
        ...

    def action(self, label_A: np.ndarray) -> np.ndarray:
        """(A,) the next action; label_A is the expert's."""
        ...

    def end(self, success: bool) -> None:
        """The episode is over."""
        ...


class ShakenExpert:
    """The expert's actions plus correlated noise on the position, which fades as the expert slows.

    stride: ticks between two observations.  noise: standard deviation, in units of the action, at full speed.
    noise_memory: correlation between two ticks (a discrete Ornstein-Uhlenbeck process).
    """

    source = episode_pb2.SOURCE_EXPERT

    def __init__(self, expert: Expert, *, stride: int, noise: float, noise_memory: float) -> None:
        self._expert = expert
        self._stride = stride
        self._sigma, self._memory = noise, noise_memory
        self._noise, self._ticks = np.zeros(3), 0
        self._rng = np.random.default_rng(0)

    @property
    def wants_observation(self) -> bool:
        """See Driver."""
        return self._ticks % self._stride == 0

    def start(self, task: Task, rng: np.random.Generator) -> None:
        """See Driver."""
        self._rng = rng
        self._noise, self._ticks = np.zeros(3), 0

    def take_over(self) -> None:
        """See Driver."""
        self._ticks = 0

    def look(self, observation: Observation) -> None:
        """See Driver."""

    def action(self, label_A: np.ndarray) -> np.ndarray:
        """See Driver."""
        self._ticks += 1
        fresh = self._rng.normal(0, self._sigma, 3)
        self._noise = self._memory * self._noise + np.sqrt(1 - self._memory**2) * fresh
        action = label_A.copy()
        action[POSITION] += self._noise * self._expert.haste(label_A)
        return action

    def end(self, success: bool) -> None:
        """See Driver."""


class Learner:
    """A served policy, greedy: asks when its chunk is used up and executes it whole."""

    source = episode_pb2.SOURCE_POLICY

    def __init__(self, client: PolicyClient, arm: ArmSpec) -> None:
        self._client, self._arm = client, arm
        self._policy = client.spec()
        self._policy.require_fit(arm)
        self._episode_id, self._decision = "", 0
        self._chunk: Iterator[np.ndarray] = iter(())
        self._remaining = 0

    @property
    def wants_observation(self) -> bool:
        """See Driver."""
        return self._remaining == 0

    def start(self, task: Task, rng: np.random.Generator) -> None:
        """See Driver."""
        rollout = Rollout(task=task, purpose="demonstrate")
        self._episode_id, self._decision = self._client.start_episode(rollout, self._arm).episode_id, 0
        self._remaining = 0

    def take_over(self) -> None:
        """See Driver."""
        self._remaining = 0

    def look(self, observation: Observation) -> None:
        """See Driver."""
        seen = self._policy.read_of(observation, self._arm)
        actions_KA = self._client.act(self._episode_id, self._decision, seen).actions_KA
        self._decision += 1
        self._chunk, self._remaining = iter(actions_KA), len(actions_KA)

    def action(self, label_A: np.ndarray) -> np.ndarray:
        """See Driver."""
        self._remaining -= 1
        return next(self._chunk)

    def end(self, success: bool) -> None:
        """See Driver."""
        self._client.end_episode(self._episode_id, "success" if success else "failure", terminal=success)


def take_turns(
    drivers: Sequence[Driver], *, stretch_ticks: tuple[int, int], rng: np.random.Generator
) -> Iterator[Driver]:
    """Who drives at each tick: one driver after the other, each for a stretch of random length in these bounds."""
    for driver in itertools.cycle(drivers):
        driver.take_over()
        if len(drivers) == 1:
            yield from itertools.repeat(driver)
        yield from itertools.repeat(driver, int(rng.integers(*stretch_ticks, endpoint=True)))
