"""Demonstrations: scripted experts, shaken while they work, recorded as episode files; only successes are kept.

What is executed is the expert's action plus noise, so that the episodes visit states beside the expert's path; what is
recorded beside it, tick by tick, is the expert's own action there, the label of behaviour cloning.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from protos.channel import Credentials
from protos.episode_file import PARTIAL_SUFFIX, SUFFIX
from robot_client.client import PolicyClient
from robot_client.errors import PolicyError
from sim.evaluate import WORKER_ENVIRONMENT, shown_assets
from sim.expert import Expert
from sim.expert_tasks import experts_of, recipe_for
from sim.job_queue import Finished, Job
from sim.libero_arm import LiberoArm
from sim.local_server import served
from sim.pool import Answer, Pool, Progress, Runner
from sim.recorder import Plan, Recorded, Recorder
from sim.scene import Scene
from sim.scenes import Scenes, default_budget_gb
from sim.suites import Suite, find_suite, find_task
from sim.turns import Learner, ShakenExpert

logger = logging.getLogger(__name__)

TRAINING_SPLITS = ("train", "tune")


@dataclass(frozen=True, kw_only=True)
class DemosConfig:
    """Records successful episodes of the scripted experts as episode files."""

    suite: str = "libero_object"
    """libero_object, libero_spatial, libero_goal or robosuite."""
    tasks: tuple[int, ...] = ()
    """Tasks of the suite; none given: all that have an expert."""
    split: str = "train"
    """Which initial states are used; those that evaluations report on are refused."""
    episodes_per_task: int = 100
    """Episodes to have in the folder in the end; what is there already is kept and counted."""
    attempts: int = 3
    """How often an episode is tried, each time with other noise, until it succeeds."""
    out: Path
    """Folder of the episode files."""
    seed: int = 0
    """Start offsets and noise are drawn from this seed, the task, the episode and the attempt."""
    stride: int = 4
    """Ticks between two observations."""
    camera: str = "agentview"
    """Camera that is recorded."""
    size_px: int = 128
    """Side of the recorded images."""
    gain: float = 1.5
    """The expert's gain; see sim/expert.py."""
    speed: float = 0.75
    """The expert's longest position delta."""
    noise: float = 0.25
    """Standard deviation of the noise on executed position deltas, at full speed; it fades as the expert slows."""
    noise_memory: float = 0.85
    """Correlation of the noise between two ticks (a discrete Ornstein-Uhlenbeck process)."""
    start_offset_m: float = 0.06
    """Longest distance between the arm's given start and where a recording begins."""
    server: str = ""
    """HOST:PORT of a policy that takes turns with the expert, to be corrected; none given: the expert alone."""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    learner: str = ""
    """The same for a checkpoint's folder or hub id, for which a server is started."""
    stretch_ticks: tuple[int, int] = (8, 40)
    """Shortest and longest turn, when there is a policy."""
    processes: int = 2
    """Simulator workers; one a core."""
    memory_gb: float = 0.0
    """Memory a worker may fill before it drops scenes, GiB; 0: a share of the machine's."""

    def __post_init__(self) -> None:
        if self.split not in TRAINING_SPLITS:
            raise ValueError(f"split must be one of {TRAINING_SPLITS}, got {self.split!r}")
        for name in ("episodes_per_task", "attempts", "stride", "size_px", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise", "start_offset_m"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 1 <= self.stretch_ticks[0] <= self.stretch_ticks[1]:
            raise ValueError(f"stretch_ticks must be 1 <= shortest <= longest, got {self.stretch_ticks}")
        if self.server and self.learner:
            raise ValueError(f"the policy is a server's or a checkpoint, got {self.server!r} and {self.learner!r}")
        if not 0 <= self.noise_memory < 1:
            raise ValueError(f"noise_memory must be in [0, 1), got {self.noise_memory}")


def record_demos(config: DemosConfig) -> int:
    """Records what is missing in the folder and reports; the exit code is 1 when episodes are missing in the end."""
    if config.learner:
        with served(model=config.learner) as address:
            return record_demos(replace(config, learner="", server=address, credentials=Credentials()))
    suite = find_suite(config.suite)
    plans = plan(config, suite)
    config.out.mkdir(parents=True, exist_ok=True)
    for abandoned in config.out.glob(f"*{PARTIAL_SUFFIX}"):
        abandoned.unlink()
    missing = [item for item in plans if not (config.out / (item.key + SUFFIX)).exists()]
    logger.info("%d episodes to record, %d are there already", len(missing), len(plans) - len(missing))
    started = time.monotonic()
    with Pool(functools.partial(make_runner, config), processes=config.processes, env=WORKER_ENVIRONMENT) as pool:
        jobs = [Job(key=item.key, group=item.task, payload=item) for item in missing]
        recorded, errors = watch(pool.run(jobs), planned=len(missing))
    report = report_of(config, suite, plans, recorded, errors, wall_s=time.monotonic() - started)
    (config.out / "demos.json").write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    print(table(report))
    return 0 if report["missing"] == 0 else 1


def plan(config: DemosConfig, suite: Suite) -> list[Plan]:
    """The episodes that the folder should hold, going round each task's initial states."""
    able = experts_of(suite)
    if unknown := sorted(set(config.tasks) - {task.index for task in able}):
        raise ValueError(f"tasks of {suite.name} with an expert: {[task.index for task in able]}, got {unknown}")
    states = suite.states(config.split)
    return [
        Plan(task=task.id, index=index, initial_state=states[index % len(states)])
        for task in able
        if not config.tasks or task.index in config.tasks
        for index in range(config.episodes_per_task)
    ]


def make_runner(config: DemosConfig) -> Runner:
    """What a worker process runs; called in that process."""
    budget_gb = config.memory_gb or default_budget_gb(config.processes)
    scenes = Scenes(lambda task_id: Scene(find_task(task_id)), budget_gb=budget_gb)
    client = PolicyClient(config.server, credentials=config.credentials) if config.server else None
    return functools.partial(_run_group, config, client, scenes)


def _run_group(
    config: DemosConfig, client: PolicyClient | None, scenes: Scenes, jobs: Iterator[Job], progress: Progress
) -> Iterator[Answer]:
    first = next(jobs)
    progress("build")
    scene = scenes.of(first.group)
    assert isinstance(scene, Scene)
    recorder = recorder_for(config, scene, client, progress)
    for job in itertools.chain([first], jobs):
        try:
            yield Answer(key=job.key, value=recorder.record(job.payload))
        except PolicyError as error:
            yield Answer(key=job.key, error=f"{type(error).__name__}: {error}")
    scenes.require_budget()


def recorder_for(
    config: DemosConfig, scene: Scene, client: PolicyClient | None = None, progress: Progress = lambda phase: None
) -> Recorder:
    """What records this scene's episodes; with a client, its policy drives in turns with the expert."""
    arm = LiberoArm(scene=scene, image_sizes={config.camera: (config.size_px, config.size_px)})
    expert = Expert(scene, recipe_for(scene.task), gain=config.gain, speed=config.speed)
    shaken = ShakenExpert(expert, stride=config.stride, noise=config.noise, noise_memory=config.noise_memory)
    return Recorder(
        arm,
        expert,
        [shaken] if client is None else [Learner(client, arm.spec), shaken],
        out=config.out,
        seed=config.seed,
        attempts=config.attempts,
        start_offset_m=config.start_offset_m,
        stretch_ticks=config.stretch_ticks,
        progress=progress,
    )


def watch(finished: Iterable[Finished], *, planned: int) -> tuple[list[Recorded], list[str]]:
    """Recordings and errors as they come, under a progress bar; Ctrl-C ends the wait, and a later run resumes."""
    recorded: list[Recorded] = []
    errors: list[str] = []
    with logging_redirect_tqdm(), tqdm(total=planned, unit="episode", smoothing=0.1) as bar:
        try:
            for item in finished:
                if item.error is None:
                    recorded.append(item.value)
                else:
                    errors.append(f"{item.job.key}: {item.error}")
                failures = sum(one.failures for one in recorded)
                bar.set_postfix_str(f"failed attempts {failures}, errors {len(errors)}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            logger.error("interrupted after %d of %d episodes; the same command resumes", len(recorded), planned)
    return recorded, errors


def report_of(
    config: DemosConfig, suite: Suite, plans: list[Plan], recorded: list[Recorded], errors: list[str], *, wall_s: float
) -> dict:
    """What was recorded in this run, and what the folder holds now."""
    names = {task.id: task.name for task in suite.tasks}
    tasks = []
    for task_id in dict.fromkeys(item.task for item in plans):
        mine = [one for one in recorded if one.task == task_id]
        successes = [one for one in mine if one.success]
        attempts = len(successes) + sum(one.failures for one in mine)
        in_folder = sum((config.out / (item.key + SUFFIX)).exists() for item in plans if item.task == task_id)
        tasks.append(
            {
                "task": task_id,
                "name": names[task_id],
                "in_folder": in_folder,
                "recorded": len(successes),
                "attempts": attempts,
                "success_rate": len(successes) / attempts if attempts else None,
                "mean_ticks": float(np.mean([one.ticks for one in successes])) if successes else None,
            }
        )
    return {
        "config": asdict(replace(config, out=Path(config.out.name), credentials=Credentials())),
        "assets": shown_assets(suite),
        "wall_s": round(wall_s, 1),
        "episodes_per_minute": round(60 * sum(one.success for one in recorded) / wall_s, 1),
        "missing": len(plans) - sum(task["in_folder"] for task in tasks),
        "errors": errors,
        "tasks": tasks,
    }


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'task':<20} {'in folder':>9} {'recorded':>8} {'of attempts':>11} {'mean ticks':>10}"]
    for task in report["tasks"]:
        ticks = "-" if task["mean_ticks"] is None else f"{task['mean_ticks']:.0f}"
        counts = f"{task['in_folder']:>9} {task['recorded']:>8} {task['attempts']:>11} {ticks:>10}"
        lines.append(f"{task['task']:<20} {counts}  {task['name']}")
    rate = f"{report['episodes_per_minute']} episodes/min, {report['wall_s']} s"
    return "\n".join(
        [*lines, f"{rate}; {report['assets']}; missing {report['missing']}, errors {len(report['errors'])}"]
    )
