"""Evaluation over the network: a suite's tasks and initial states, run by supervised workers against a live server."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from protos.channel import Credentials
from robot_client.arm import Task
from robot_client.connect import connect
from robot_client.rollout import Rollout
from robot_client.spec import PolicySpec
from sim import assets
from sim.job_queue import Finished
from sim.libero_arm import arm_spec
from sim.pool import Deadlines, Pool
from sim.report import EpisodeRecord, Report, rate_of
from sim.scenes import default_budget_gb
from sim.shifts import Shift, find_shift, in_world
from sim.suites import Suite, find_suite
from sim.worker import SERVER_PATIENCE_S, WorkerConfig, job_of, make_runner

logger = logging.getLogger(__name__)

Protocol = Literal["paper", "held_out", "fresh", "train", "tune"]
PROTOCOL_NOTES = {
    "paper": "training states included",
    "held_out": "never trained or tuned on",
    "fresh": "drawn anew from stated seeds, never trained or tuned on",
    "train": "TRAINING STATES",
    "tune": "states that choices are made on",
}
# One thread a process: workers share the cores with each other and with the server.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "GRPC_VERBOSITY": "ERROR",  # it remarks on every fork, and a video's encoder is one
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a served policy's success rate in simulation."""

    server: str = "localhost:50051"
    """HOST:PORT of the policy server, or openpi://HOST:PORT (robot_client/openpi.py)."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    suite: str = "libero_object"
    """libero_spatial, libero_object, libero_goal, libero_10, libero_90 or robosuite."""
    tasks: tuple[int, ...] = ()
    """Indices of the suite's tasks; none given: all."""
    protocol: Protocol = "held_out"
    """Which initial states: paper (LIBERO's 50), held_out (40-49), fresh (our list of new draws), train, tune."""
    episodes_per_task: int = 0
    """Use only the first so many states of the protocol's list; 0: all."""
    shift: str = ""
    """A shifted world (sim/shifts.py): camera, light, dark, friction, objects, all; none given: as it is."""
    temperature: float = 0.0
    """0 is greedy."""
    noise_correlation: float = 0.0
    """How much of the sampling noise the ticks of a chunk share, in [0, 1), as in practice."""
    seed: int = 0
    """Episodes sample from streams derived from this seed, their task and their state."""
    replan_after: int = 0
    """Execute only the first so many actions of each chunk, then ask again; 0: all."""
    version: int | None = None
    """A version the server names; none given: the live one, the same for all episodes."""
    processes: int = 2
    """Simulator workers; one a core."""
    slots: int = 4
    """Episodes interleaved in each worker."""
    memory_gb: float = 0.0
    """Memory a worker may fill before it drops scenes, GiB; 0: a share of the machine's."""
    step_deadline_s: float = 90.0
    """A worker without progress for so long is killed and replaced."""
    videos: int = 1
    """Successes and failures of each task to keep as MP4s, of what the policy saw."""
    max_error_share: float = 0.02
    """The exit code is 1 when a larger share of the episodes ended as errors."""
    out: Path | None = None
    """Folder of the report; none given: one under runs/evaluate that says what it holds."""

    def __post_init__(self) -> None:
        find_suite(self.suite).states(self.protocol)
        find_shift(self.shift)
        for name in ("processes", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("episodes_per_task", "temperature", "replan_after", "videos"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.noise_correlation < 1:
            raise ValueError(f"noise_correlation must be in [0, 1), got {self.noise_correlation}")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"max_error_share must be in [0, 1], got {self.max_error_share}")


def episode_seed(seed: int, task: str, initial_state: str) -> int:
    """An episode's own sampling seed: a function of these three, whatever order episodes run in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{initial_state}".encode()).digest()[:8], "big") >> 1


def plan(config: EvaluateConfig, suite: Suite, version: int) -> list[Rollout]:
    """The rollouts of an evaluation, in order.  Raises ValueError for a task or protocol that the suite lacks."""
    states = suite.states(config.protocol)
    indices = config.tasks or range(len(suite.tasks))
    unknown = [index for index in indices if not 0 <= index < len(suite.tasks)]
    if unknown:
        raise ValueError(f"tasks of {suite.name} must be in 0..{len(suite.tasks) - 1}, got {unknown}")
    return [
        Rollout(
            task=Task(name=task.id, instruction=task.instruction, initial_state=state, max_ticks=task.max_ticks),
            seed=episode_seed(config.seed, task.id, state),
            temperature=config.temperature,
            noise_correlation=config.noise_correlation,
            purpose="evaluate",
            version=version,
        )
        for task in (suite.tasks[index] for index in sorted(set(indices)))
        for state in states[: config.episodes_per_task or None]
    ]


def evaluate(config: EvaluateConfig) -> Report:
    """Plans the evaluation from what the server says and carries it out.

    Raises PolicyError when there is no server, SpecMismatch when its policy cannot drive the suite's arm.
    """
    suite = find_suite(config.suite)
    with closing(connect(config.server, credentials=config.credentials, give_up_after_s=SERVER_PATIENCE_S)) as client:
        spec = client.spec()
    spec.require_fit(arm_spec(suite.tasks[0], suite.cameras))
    version = spec.message.live_version if config.version is None else config.version
    return carry_out(config, spec, plan(config, suite, version))


def carry_out(config: EvaluateConfig, spec: PolicySpec, rollouts: Sequence[Rollout]) -> Report:
    """Runs the rollouts with a progress bar; returns also after Ctrl-C, then with what there is."""
    worker = WorkerConfig(
        server=config.server,
        credentials=config.credentials,
        slots=config.slots,
        replan_after=config.replan_after,
        shift=find_shift(config.shift),
        memory_gb=config.memory_gb or default_budget_gb(config.processes),
        videos=config.out / "videos" if config.out and config.videos else None,
        videos_per_outcome=config.videos,
    )
    with Pool(
        functools.partial(make_runner, worker),
        processes=config.processes,
        deadlines=Deadlines(step=config.step_deadline_s),
        env=WORKER_ENVIRONMENT,
    ) as pool:
        episodes = watch(pool.run([job_of(rollout) for rollout in rollouts]), planned=len(rollouts))
        return report_of(config, spec, rollouts, episodes, pool)


def watch(finished: Iterable[Finished], *, planned: int) -> list[EpisodeRecord]:
    """The episodes' records as they end, under a progress bar; Ctrl-C ends the wait."""
    episodes: list[EpisodeRecord] = []
    with logging_redirect_tqdm(), tqdm(total=planned, unit="episode", smoothing=0.1) as bar:
        try:
            for item in finished:
                episodes.append(record_of(item))
                rate = rate_of(episodes)
                bar.set_postfix_str(f"success {rate.successes}/{rate.n}, errors {rate.errors}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            logger.error("interrupted after %d of %d episodes", len(episodes), planned)
    return episodes


def record_of(item: Finished) -> EpisodeRecord:
    """A finished job as an episode: what the pool gave up on is an error, never a failure."""
    rollout: Rollout = item.job.payload
    if item.error is None:
        return replace(item.value, attempts=item.attempts)
    return EpisodeRecord(
        task=rollout.task.name,
        initial_state=rollout.task.initial_state,
        outcome="error",
        message=item.error,
        attempts=item.attempts,
    )


def shown_assets(suite: Suite, shift: Shift | None = None) -> str:
    """What is on screen, in words for a report."""
    tree = f"LIBERO with {assets.asset_tree()}" if suite.simulator == "libero" else "robosuite's own assets"
    return in_world(tree, shift)


def states_note(config: EvaluateConfig, suite: Suite) -> str:
    """Which states of each task are used, in words."""
    listed = suite.states(config.protocol)
    used = listed[: config.episodes_per_task or None]
    part = "" if len(used) == len(listed) else f", the first {len(used)} of {len(listed)}"
    return f"{used[0]}..{used[-1]}{part}; {PROTOCOL_NOTES[config.protocol]}"


def report_of(
    config: EvaluateConfig, spec: PolicySpec, rollouts: Sequence[Rollout], episodes: Sequence[EpisodeRecord], pool: Pool
) -> Report:
    """The report of what the pool has done by now."""
    suite, message = find_suite(config.suite), spec.message
    return Report(
        suite=suite.name,
        protocol=config.protocol,
        states_note=states_note(config, suite),
        instructions={rollout.task.name: rollout.task.instruction for rollout in rollouts},
        model=message.model,
        version=rollouts[0].version or 0,
        base_fingerprint=message.base_fingerprint,
        chunk_length=spec.chunk_length,
        replan_after=config.replan_after,
        image_path=message.image_path,
        unnorm_key=message.unnorm_key,
        assets=shown_assets(suite, find_shift(config.shift)),
        temperature=config.temperature,
        noise_correlation=config.noise_correlation,
        seed=config.seed,
        processes=config.processes,
        slots=config.slots,
        setup_s=round(pool.setup_s, 2),
        wall_s=round(pool.age_s, 2),
        planned=len(rollouts),
        workers_lost=tuple(asdict(loss) for loss in pool.losses),
        quarantined=tuple(pool.quarantined),
        episodes=tuple(episodes),
    )


def default_folder(config: EvaluateConfig) -> Path:
    """A new folder under runs/evaluate that says what is in it."""
    sampling = "greedy" if config.temperature == 0 else f"t{config.temperature:g}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    world = f"-{config.shift}" if config.shift else ""
    return Path("runs/evaluate") / f"{config.suite}{world}-{config.protocol}-{sampling}-{stamp}"


def main(config: EvaluateConfig) -> int:
    """Evaluates, prints and saves; see exit_code."""
    config = replace(config, out=config.out or default_folder(config))
    assert config.out is not None
    try:
        config.out.mkdir(parents=True, exist_ok=True)  # hours before it is needed
    except OSError as error:
        raise ValueError(
            f"out must be a folder, or one that can be made, got {config.out}: {error.strerror}"
        ) from error
    report = evaluate(config)
    print(report.table())
    report.save(config.out)
    print(f"saved in {config.out}")
    return exit_code(report, max_error_share=config.max_error_share)


def exit_code(report: Report, *, max_error_share: float) -> int:
    """1 when too large a share of the episodes are errors, or when episodes are missing; says so."""
    missing = report.planned - len(report.episodes)
    if missing:
        print(f"FAILED: {missing} of {report.planned} episodes were not run")
    if report.error_share > max_error_share:
        print(f"FAILED: {100 * report.error_share:.1f} % errors, at most {100 * max_error_share:.1f} % allowed")
    return int(bool(missing) or report.error_share > max_error_share)
