"""What a run will take, before it runs: `python -m rl_trainer plan`, with the options of `train`.

Memory and disk follow from the model's shapes, minutes from prices that a short calibration finds (costs.py says how).
How long an episode lasts nobody knows before: it is assumed, and the assumption is printed.  With --measured the
prediction is compared with what a finished run took.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policy_server.vla.checkpoint import DTYPES, load_config, local_folder
from policy_server.vla.config import VLAConfig
from policy_server.vla.preprocessing import Preprocessor
from policy_server.vla.tokenizer import Tokenizer
from protos.machine import cores
from rl_trainer.calibration import SceneCosts, measure_prices, time_scenes
from rl_trainer.costs import (
    GIB,
    Host,
    Need,
    Phases,
    Prices,
    Schedule,
    Shapes,
    batch_bytes,
    disk_bytes,
    iteration_s,
    learner_bytes,
    phases,
    refusal,
    run_s,
    server_bytes,
    shapes_of,
)
from rl_trainer.devices import find_machine
from rl_trainer.metrics import read_curve
from rl_trainer.placement import Placement
from rl_trainer.run_state import differences
from rl_trainer.suite import catalogue, cells_of
from rl_trainer.train import placed
from rl_trainer.train_config import RECORD, TrainConfig

HOST = "this machine"
FREE = ("out", "resume", "iterations", "minutes", "evaluate_every")
"""What a run that is compared may have had otherwise."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Predicts memory, disk and minutes of a run, and refuses one that does not fit."""

    episode_share: float = 0.7
    """assumed length of an episode: so much of the suite's limit of ticks"""
    memory_gb: float | None = None
    """judge memory as if the machine had so many GiB; none given: what it has"""
    free_gb: float | None = None
    """judge the disk as if so many GiB were free; none given: those that are"""
    measured: Path | None = None
    """folder of a finished run with these options, to compare the prediction with"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.episode_share <= 1:
            raise ValueError(f"episode_share must be in (0, 1], got {self.episode_share}")
        if self.server:
            raise ValueError("server must not be given: plan knows this machine, not the one that serves")


def plan(config: PlanConfig) -> None:
    """Prints the prediction.  Raises ValueError when memory or disk do not hold the run."""
    if config.measured and (changed := differences(config.measured / RECORD, config, but=FREE)):
        raise ValueError(f"{config.measured} is a run with other options: {changed}")
    placement = placed(config, memory_gb=config.memory_gb)
    print(placement.table(), flush=True)
    os.environ.update(placement.learner.environment)
    folder = local_folder(config.model, files=["*.json"])
    model, listed = load_config(folder), catalogue(config.suite)
    schedule = schedule_of(config, model, listed, episode_share=config.episode_share)
    tasks = list(config.tasks or range(len(listed["tasks"])))
    instructions = [list(listed["tasks"].values())[task] for task in tasks]
    preprocessor = Preprocessor(model, Tokenizer.load(folder), unnorm_key=config.unnorm_key)
    shapes = trained_shapes(config, model, prompt_tokens=longest_prompt(preprocessor, instructions))
    needs = Needs(config, model, shapes, schedule, placement)
    require(refusal(needs.computing()))
    scenes = time_scenes(config, model, placement, tasks)
    print("\n".join(needs.lines(scenes)), flush=True)
    require(refusal([*needs.computing(), needs.workers(scenes)]))
    require(needs.disk_refusal())
    prices = measure_prices(config, scenes, instructions)
    host = Host(cores=cores(), processes=len(placement.workers), slots=config.slots)
    print("\n".join(minutes(config, schedule, prices, host)))
    if config.measured:
        print("\n".join(compared(config, schedule, prices, host, measured_of(config.measured, config))))


def require(refused: str) -> None:
    """Raises ValueError with the reason, where there is one."""
    if refused:
        raise ValueError(refused)


def schedule_of(config: TrainConfig, model: VLAConfig, listed: Mapping, *, episode_share: float) -> Schedule:
    """How often the run does what.  episode_share: of the longest that an episode may last.

    Raises ValueError for tasks or states that the suite has not.
    """
    held_out = cells_of(dict(listed), config.tasks, config.evaluate_split, config.evaluate_states)
    return Schedule(
        iterations=config.iterations,
        rollouts=config.rollouts,
        warm_up=config.learner.warm_up if config.learner.advantage == "gae" else 0,
        evaluations=1 + config.iterations // config.evaluate_every if config.evaluate_every else 0,
        evaluated=len(held_out),
        ticks=episode_share * listed["max_ticks"],
        chunk=model.chunk_length,
        tasks=len(config.tasks or listed["tasks"]),
        overlap=config.overlap,
    )


def trained_shapes(config: TrainConfig, model: VLAConfig, *, prompt_tokens: int) -> Shapes:
    """Of what the run trains."""
    return shapes_of(
        model,
        dtype=DTYPES[config.dtype],
        lora_rank=config.lora_rank,
        freeze_vision=config.freeze_vision,
        recompute=config.learner.recompute,
        critic=config.learner.critic,
        critic_rank=config.learner.critic_rank,
        rows=config.learner.microbatch,
        prompt_tokens=prompt_tokens,
    )


def disk_need_gb(config: TrainConfig, model: VLAConfig, shapes: Shapes, schedule: Schedule) -> float:
    """GiB that the run leaves behind, where it writes."""
    averaged, serves = config.learner.average > 0, not config.server
    return disk_bytes(model, shapes, schedule=schedule, averaged=averaged, serves=serves) / GIB


def disk_free_gb(folder: Path) -> float:
    """GiB of the disk that the folder is on, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free / GIB


def longest_prompt(preprocessor: Preprocessor, instructions: Sequence[str]) -> int:
    """Tokens of the longest prompt, to which a batch is padded."""
    return max(len(preprocessor.prompt_ids(instruction)) for instruction in instructions)


class Needs:
    """Memory and disk of a run."""

    def __init__(self, config: PlanConfig, model: VLAConfig, shapes: Shapes, schedule: Schedule, placement: Placement):
        self._config, self._model, self._shapes = config, model, shapes
        self._schedule, self._placement = schedule, placement
        self._room_gb = find_machine().memory_gb if config.memory_gb is None else config.memory_gb
        self._averaged = config.learner.average > 0
        self._disk_gb = disk_need_gb(config, model, shapes, schedule)
        self._free_gb = disk_free_gb(config.out) if config.free_gb is None else config.free_gb
        self._base_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        """of a process that has loaded torch, as this one has"""

    def computing(self) -> list[Need]:
        """Of learner and server."""
        ranks, learner, server = self._config.ranks, self._placement.learner, self._placement.server
        reference = self._config.learner.loss.reference_weight > 0
        apart = reference and not self._config.lora_rank  # beside an adapter it is the base
        how = {"reference": apart, "averaged": self._averaged}
        learning = ranks * learner_bytes(self._shapes, **how)
        serving = server_bytes(self._shapes, width=DTYPES[self._config.dtype].itemsize)
        if self._config.server_sleeps and server.memory_gb is not None and server.device == learner.device:
            idle = ranks * learner_bytes(replace(self._shapes, saved_bytes=0), **how)
            serving = max(0, idle + serving - learning)  # activations are gone when it wakes
        keeps = self._config.freeze_vision and self._config.learner.keep_images
        kept_width = DTYPES[self._config.dtype].itemsize * keeps
        held = batch_bytes(self._model, self._schedule.decisions, kept_width=kept_width, reference=reference)
        where, there_gb = self._memory_of(learner.device, learner.memory_gb)
        serves, room_gb = self._memory_of(server.device, server.memory_gb)
        processes_gb = ranks * (self._base_gb + held / GIB)
        return [
            Need(process="learner", where=where, gb=learning / GIB, room_gb=there_gb),
            Need(process="its processes and batch", where=HOST, gb=processes_gb, room_gb=self._room_gb),
            Need(process="server", where=serves, gb=serving / GIB, room_gb=room_gb),
            Need(process="its process", where=HOST, gb=self._base_gb, room_gb=self._room_gb),
        ]

    def workers(self, scenes: SceneCosts) -> Need:
        """Of all workers and of the processes that watch them; each comes to hold every task's scene, if it may."""
        each_gb = min(self._placement.worker_gb, scenes.base_gb + self._schedule.tasks * scenes.scene_gb)
        watchers_gb = len(self._placement.groups) * scenes.base_gb
        gb = len(self._placement.workers) * each_gb + watchers_gb
        return Need(process="workers", where=HOST, gb=gb, room_gb=self._room_gb)

    def lines(self, scenes: SceneCosts) -> Iterator[str]:
        """Memory and disk for people."""
        shapes = self._shapes
        yield f"model: {shapes.numbers / 1e6:.1f} M numbers, {shapes.trained / 1e6:.1f} M trained"
        for need in (*self.computing(), self.workers(scenes)):
            yield f"memory  {need.process:<24} {need.gb:7.2f} GiB of {need.room_gb:.1f} of {need.where}"
        yield f"disk    {self._disk_gb:32.2f} GiB of {self._free_gb:.1f} free for {self._config.out}"

    def disk_refusal(self) -> str:
        """Why the disk does not hold the run, in a sentence; empty when it does."""
        if self._disk_gb <= self._free_gb:
            return ""
        return (
            f"the run needs {self._disk_gb:.1f} GiB of disk, and {self._free_gb:.1f} are free for {self._config.out}:"
            " make room, take another --out, or fewer iterations or rollouts"
        )

    def _memory_of(self, device: str, memory_gb: float | None) -> tuple[str, float]:
        return (HOST, self._room_gb) if memory_gb is None else (device, memory_gb)


def minutes(config: PlanConfig, schedule: Schedule, prices: Prices, host: Host) -> Iterator[str]:
    """The prediction for people, its assumptions first."""
    found, learner_cores = phases(schedule, prices, host), config.ranks * config.threads
    yield (
        f"assumed: an episode lasts {schedule.ticks:.0f} ticks, {config.episode_share:g} of the limit"
        " (--episode-share); no early stop; the machine stays as busy as it is, which gives a process"
        f" {100 / max(1.0, prices.slowdown):.0f} % of a core"
    )
    yield (
        f"prices, ms: tick {1e3 * prices.tick_s:.2f}, frame {1e3 * prices.practice_frame_s:.1f} in practice and"
        f" {1e3 * prices.evaluation_frame_s:.1f} in evaluations, reset {1e3 * prices.reset_s:.0f}; server"
        f" {1e3 * prices.pass_s:.1f} a pass and {1e3 * prices.request_s:.1f} a request; learner"
        f" {1e3 * prices.decision_s:.1f} a decision"
    )
    if config.reward_model:
        yield "left out: the reward model's own memory, on the learner's device"
    yield f"an iteration: {schedule.rollouts} episodes, {schedule.decisions} decisions"
    for name, seconds in rows_of(found):
        if name != "evaluate" or schedule.evaluations:
            yield f"  {name:<24} {seconds / 60:8.2f} min"
    seconds = iteration_s(found, schedule, host, warm=False, learner_cores=learner_cores)
    yield f"  {'iteration' + ', overlapped' * config.overlap:<24} {seconds / 60:8.2f} min"
    total_s = run_s(found, schedule, host, learner_cores=learner_cores)
    yield (
        f"the run: {schedule.iterations} iterations and {schedule.evaluations} evaluations of {schedule.evaluated}"
        f" episodes take {total_s / 60:.1f} min"
    )
    if config.minutes and total_s > 60 * config.minutes:
        share = 60 * config.minutes / total_s
        yield f"it stops after {config.minutes:g} min, at about iteration {schedule.iterations * share:.0f}"


def rows_of(found: Phases) -> list[tuple[str, float]]:
    """Phases by the names that curve.jsonl has for them, seconds."""
    return [
        ("collect", found.collect_s),
        ("learn", found.learn_s),
        ("learn, critic alone", found.warm_learn_s),
        ("publish", found.publish_s),
        ("evaluate", found.evaluate_s),
    ]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took."""

    seconds: Mapping[str, float]
    """by the names of rows_of; a phase that did not happen is left out"""
    ticks: float
    """of an episode, on average"""
    iterations: int
    evaluations: int
    """before the last iteration was over"""
    run_s: float
    stopped_early: int
    """iterations"""


def measured_of(run: Path, config: TrainConfig) -> Measured:
    """From curve.jsonl.  Raises ValueError when no iteration is in it.

    The first iteration and the first evaluation wait for processes to start: left out where there are others.
    """
    rows = read_curve(run / "curve.jsonl")
    iterated = [row for row in rows if "seconds/collect" in row]
    if not iterated:
        raise ValueError(f"{run / 'curve.jsonl'} has no iteration")
    evaluated = [row for row in rows if "seconds/evaluate" in row]
    warm = config.learner.warm_up if config.learner.advantage == "gae" else 0
    kinds = {
        "collect": [row["seconds/collect"] for row in iterated[1:] or iterated],
        "learn": [row["seconds/learn"] for row in iterated if row["step"] > warm],
        "learn, critic alone": [row["seconds/learn"] for row in iterated if row["step"] <= warm],
        "publish": [row["seconds/publish"] for row in iterated],
        "evaluate": [row["seconds/evaluate"] for row in evaluated[1:] or evaluated],
    }
    last = iterated[-1]
    return Measured(
        seconds={name: float(np.mean(numbers)) for name, numbers in kinds.items() if numbers},
        ticks=last["environment_steps"] / last["episodes"],
        iterations=int(last["step"]),
        evaluations=sum(row["step"] < last["step"] for row in evaluated),
        run_s=last["wall_clock_s"],
        stopped_early=sum(row.get("stopped_early", 0) > 0 for row in iterated),
    )


def compared(config: PlanConfig, schedule: Schedule, prices: Prices, host: Host, run: Measured) -> Iterator[str]:
    """Predicted over measured by phase: as assumed, and with episodes as long as the run's."""
    done = replace(schedule, iterations=run.iterations, evaluations=run.evaluations)
    known = replace(done, ticks=run.ticks)
    yield f"{config.measured}: {run.iterations} iterations, {run.ticks:.0f} ticks an episode"
    if run.stopped_early:
        yield f"  {run.stopped_early} of them stopped learning early, which is not predicted"
    yield f"  {'seconds':<20} {'measured':>9} {'predicted':>10} {'ratio':>6}   {'at its ticks':>12} {'ratio':>6}"
    columns = []
    for one in (done, known):
        found = phases(one, prices, host)
        whole_s = run_s(found, one, host, learner_cores=config.ranks * config.threads)
        columns.append({**dict(rows_of(found)), "run": whole_s})
    for name, took_s in {**run.seconds, "run": run.run_s}.items():
        assumed_s, known_s = (column[name] for column in columns)
        yield (
            f"  {name:<20} {took_s:9.1f} {assumed_s:10.1f} {assumed_s / took_s:6.2f}   {known_s:12.1f}"
            f" {known_s / took_s:6.2f}"
        )
