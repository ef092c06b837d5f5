"""Workers of a training run: processes that lease rollouts from the policy server's queue, as long as there is one.

A worker that dies or stands still is replaced; what it had leased goes back to the queue when it is no longer renewed.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import tyro

from protos.channel import Credentials, dial
from robot_client.client import PolicyClient
from robot_client.drivers import run_lockstep
from robot_client.errors import PolicyError, RobotError
from robot_client.leases import Lease, Leases, worker_name
from robot_client.rollout import Rollout
from sim import assets
from sim.corrector import Correction
from sim.evaluate import WORKER_ENVIRONMENT
from sim.job_queue import Job
from sim.libero_arm import LiberoArm, SimulatedTask
from sim.pool import Answer, Deadlines, Pool, Progress, Runner
from sim.scenes import Scenes, default_budget_gb
from sim.shifts import find_shift
from sim.suites import SUITES, find_suite, find_task
from sim.worker import SERVER_PATIENCE_S, Heartbeat, WorkerConfig, arms_on, scenes_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeasingConfig:
    """Runs rollouts of a policy server's queue in simulation, until told to stop."""

    server: str = "localhost:50051"
    """HOST:PORT of the policy server."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    suites: tuple[str, ...] = ()
    """Suites that this worker runs; none given: all that can be built here."""
    processes: int = 2
    """Simulator processes; one a core."""
    slots: int = 4
    """Episodes interleaved in each."""
    coarse_practice: bool = False
    """Training episodes are drawn with simplified meshes, in a third of the time; evaluations never are."""
    shift: str = ""
    """A shifted world (sim/shifts.py): camera, light, dark, friction, objects, all; none given: as it is."""
    correction: Correction = field(default_factory=Correction)
    memory_gb: float = 0.0
    """Memory a process may fill before it drops scenes, GiB; 0: a share of the machine's."""
    step_deadline_s: float = 90.0
    """A process without progress for so long is killed and replaced."""

    def __post_init__(self) -> None:
        for suite in self.suites:
            find_suite(suite)
        find_shift(self.shift)
        for name in ("processes", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(config: LeasingConfig) -> int:
    """Runs until SIGINT or SIGTERM.  Raises ValueError, before any process is started, for what cannot be dialed."""
    dial(config.server, config.credentials).close()
    worker = WorkerConfig(
        server=config.server,
        credentials=config.credentials,
        slots=config.slots,
        memory_gb=config.memory_gb or default_budget_gb(config.processes),
        coarse_practice=config.coarse_practice,
        shift=find_shift(config.shift),
        correction=config.correction,
    )
    can_run = tuple(f"{suite}/*" for suite in config.suites or suites_here())
    logger.info("%d processes take rollouts of %s from %s", config.processes, ", ".join(can_run), config.server)
    with Pool(
        functools.partial(make_runner, worker, can_run),
        processes=config.processes,
        deadlines=Deadlines(step=config.step_deadline_s),
        env=WORKER_ENVIRONMENT,
        attempts=sys.maxsize,
    ) as pool:
        posts = [
            Job(key=f"process {number}", group=f"process {number}", payload=None) for number in range(config.processes)
        ]
        for _ in pool.run(posts):  # a post never ends: a lost process is replaced at its post
            pass
    return 0


def suites_here() -> tuple[str, ...]:
    """The suites whose simulator and assets are installed."""
    return tuple(name for name, suite in SUITES.items() if suite.simulator == "robosuite" or assets.has_libero())


def make_runner(config: WorkerConfig, can_run: tuple[str, ...]) -> Runner:
    """What a process runs; called in that process."""
    scenes = scenes_of(config)
    client = PolicyClient(config.server, credentials=config.credentials, give_up_after_s=SERVER_PATIENCE_S)
    leases = Leases(config.server, worker=worker_name(), can_run=can_run, credentials=config.credentials)
    return functools.partial(_man_post, config, client, leases, scenes)


def _man_post(
    config: WorkerConfig, client: PolicyClient, leases: Leases, scenes: Scenes, jobs: Iterator[Job], progress: Progress
) -> Iterator[Answer]:
    """Takes leases for ever; a generator without a value, since a post is never done."""
    next(jobs)
    while True:
        progress("step")
        lease = leases.await_one(holds=scenes.held)
        if lease is None:
            continue
        progress("build")
        try:
            arms = arms_on(scenes, lease.rollout.task, client, config.slots)
            _run_leases(config, client, leases, arms, lease, progress)
        except PolicyError as error:  # of the server's, not of the work
            logger.warning("given back: %s", error)
            leases.give_back_all()
        except (ValueError, RobotError) as error:  # no such task here, or a policy that does not fit
            logger.warning("given back: %s", error, exc_info=isinstance(error, ValueError))
            leases.give_back_all(str(error))
        scenes.require_budget()
    yield


def _run_leases(
    config: WorkerConfig, client: PolicyClient, leases: Leases, arms: list[LiberoArm], first: Lease, progress: Progress
) -> None:
    """Runs one lease and, interleaved with it, whatever else there is to do on its scene."""
    task = first.rollout.task

    def rollouts() -> Iterator[Rollout]:
        lease: Lease | None = first
        while lease is not None:
            yield rollout_of(lease, coarse_practice=config.coarse_practice)
            progress("step")
            try:
                lease = leases.take(holds=[task], only_held=True)
            except PolicyError:
                return  # what is under way goes on, and is told so

    results = run_lockstep(
        arms,
        rollouts(),
        client,
        observers=lambda _: [Heartbeat(progress)],
        pilots=config.correction.pilot,
        on_wait=lambda: progress("step"),
    )
    for result in results:
        leases.settle(result)
        if result.outcome == "error":
            logger.warning("%s %s: %s", task, result.rollout.task.initial_state, result.message)


def rollout_of(lease: Lease, *, coarse_practice: bool = False) -> Rollout:
    """The leased work; the task's instruction and time limit come from its suite."""
    task = find_task(lease.rollout.task)
    return lease.rollout_of(
        SimulatedTask(
            name=task.id,
            instruction=task.instruction,
            initial_state=lease.rollout.initial_state,
            max_ticks=task.max_ticks,
            coarse=coarse_practice and lease.purpose == "train",
        )
    )
