"""Records one demonstration as an episode file: whoever drives, the expert says at every tick what it would do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos import episode_pb2
from protos.codec import encode_image, encode_tensor
from protos.episode_file import SUFFIX, EpisodeWriter
from robot_client.arm import Arm, Observation
from robot_client.arm import Task as ArmTask
from sim.evaluate import episode_seed
from sim.expert import Expert
from sim.pool import Progress
from sim.suites import Task, find_task
from sim.turns import Driver, take_turns

WANDER_M = 0.005
"""Length of a step on the way to a start offset."""
METRES_PER_ACTION = 0.0135
"""How far the arm gets in one tick for an action of 1."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One episode to record."""

    task: str
    """e.g. "libero_object/3"."""
    index: int
    """Place among the task's episodes."""
    initial_state: str

    @property
    def key(self) -> str:
        """Name of the episode and of its file."""
        return f"{self.task.replace('/', '-')}-{self.index:04d}"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """How an episode's recording went."""

    task: str
    success: bool
    failures: int
    """Attempts that failed."""
    ticks: int
    """Length of the recorded episode; 0 when there is none."""
    wall_s: float


class Recorder:
    """Records successful episodes of one scene.

    drivers: who executes, in turns of stretch_ticks; the expert labels every tick.
    attempts: how often an episode is tried, each time with other random numbers.
    start_offset_m: longest distance between the arm's given start and where a recording begins.
    """

    def __init__(
        self,
        arm: Arm,
        expert: Expert,
        drivers: Sequence[Driver],
        *,
        out: Path,
        seed: int = 0,
        attempts: int = 3,
        start_offset_m: float = 0.0,
        stretch_ticks: tuple[int, int] = (1, 1),
        progress: Progress = lambda phase: None,
    ) -> None:
        self._arm, self._expert, self._drivers = arm, expert, drivers
        self._out, self._seed, self._attempts = out, seed, attempts
        self._start_offset_m = start_offset_m
        self._stretch_ticks = stretch_ticks
        self._progress = progress

    def record(self, item: Plan) -> Recorded:
        """Tries the episode until it succeeds or its attempts are spent."""
        started, failures, ticks = time.monotonic(), 0, 0
        while not ticks and failures < self._attempts:
            seed = episode_seed(self._seed, item.task, f"{item.index}.{failures}")
            ticks = self._attempt(item, seed)
            failures += not ticks
        wall_s = time.monotonic() - started
        return Recorded(task=item.task, success=ticks > 0, failures=failures, ticks=ticks, wall_s=wall_s)

    def _attempt(self, item: Plan, seed: int) -> int:
        """Length of the episode that was kept; 0 when it failed, and nothing was kept."""
        writer = EpisodeWriter(self._out / (item.key + SUFFIX), self._start(item, seed))
        kept = False
        try:
            ticks = self._play(item, writer, np.random.default_rng(seed))
            if ticks:
                end = episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_SUCCESS, terminal=True)
                end.ended_unix_ns = time.time_ns()
                writer.finish(end)
                kept = True
        finally:
            if not kept:
                writer.discard()
        return ticks

    def _play(self, item: Plan, writer: EpisodeWriter, rng: np.random.Generator) -> int:
        """Ticks until success; 0 when time ran out, where only the expert's own time counts."""
        task = find_task(item.task)
        self._prepare(task, item, rng)
        decision, index, recent, success = -1, 0, list[episode_pb2.Tick](), False
        allowance, ticks = task.max_ticks, 0
        for driver in take_turns(self._drivers, stretch_ticks=self._stretch_ticks, rng=rng):
            self._progress("step")
            if driver.wants_observation:
                observation, decision, index = self._arm.observe(), decision + 1, 0
                writer.executed(recent)
                recent = []
                writer.decision(decision_record(decision, observation))
                driver.look(observation)
            label = self._expert.action()
            sent = self._arm.apply(driver.action(label).astype(np.float32))
            assert sent is not None, "a simulated arm takes every action"
            recent.append(tick_record(decision, index, sent, label, driver.source))
            index, ticks = index + 1, ticks + 1
            allowance -= driver.source == episode_pb2.SOURCE_EXPERT
            success = self._arm.state().outcome == "success"
            if success or allowance == 0:
                break
        for driver in self._drivers:
            driver.end(success)
        writer.executed(recent)
        return ticks if success else 0

    def _prepare(self, task: Task, item: Plan, rng: np.random.Generator) -> None:
        """Starts the episode; the hand moves, unrecorded, to a random place near its start, never below it."""
        goal = ArmTask(name=task.id, instruction=task.instruction, initial_state=item.initial_state)
        self._arm.reset(goal)
        direction = rng.normal(size=3)
        direction[2] = abs(direction[2]) / 2
        offset = direction / np.linalg.norm(direction) * rng.uniform(0, self._start_offset_m)
        steps = 1 + int(np.linalg.norm(offset) / WANDER_M)
        for _ in range(steps):
            self._arm.apply(np.array([*(offset / steps / METRES_PER_ACTION), 0, 0, 0, 1], dtype=np.float32))
        for driver in self._drivers:
            driver.start(goal, rng)

    def _start(self, item: Plan, seed: int) -> episode_pb2.EpisodeStart:
        spec = self._arm.spec
        return episode_pb2.EpisodeStart(
            episode_id=f"{item.key}-{seed:016x}",
            task=item.task,
            initial_state=item.initial_state,
            purpose=episode_pb2.PURPOSE_DEMONSTRATE,
            seed=seed,
            asset_tree=spec.asset_tree,
            arm=spec.name,
            tick_rate_hz=spec.tick_rate_hz,
            started_unix_ns=time.time_ns(),
            state_names=spec.state_names,
        )


def decision_record(decision: int, observation: Observation) -> episode_pb2.Decision:
    """An observation without an answer; images are stored without loss."""
    message = episode_pb2.Observation(
        images={name: encode_image(pixels, "png") for name, pixels in observation.images.items()},
        state=encode_tensor(observation.state_S),
        instruction=observation.instruction,
        capture_time_ns=observation.capture_time_ns,
    )
    return episode_pb2.Decision(decision=decision, observation=message)


def tick_record(
    decision: int, index: int, sent: np.ndarray, label: np.ndarray, source: episode_pb2.Source
) -> episode_pb2.Tick:
    """What was executed, and what the expert would have executed."""
    return episode_pb2.Tick(
        decision=decision, index=index, action=sent.tolist(), source=source, expert_action=label.tolist()
    )
