"""Sessions on simulated robots in shifted worlds: one resumable list, fixed before its first run.

    python -m benchmarks.sessions --list                    what there is, and what is done
    python -m benchmarks.sessions [--only camera-0] [--hours 2]   runs what is not done, in the list's order

The policy is nano, the tasks are three of libero_object, with stand-in visuals.  Its success is measured greedy, on
fresh states, before and after; practice is on fixed and drawn states of the train split, sampled, with coarse meshes.

    before-SHIFT        nano as it is, in a world (sim/shifts.py)
    SHIFT-SEED          a session in that world, and what it leaves, evaluated
    fast-, shuffled-, random-SEED     trainers that go wrong: learning rate x 30; advantages dealt out anew, and no
                        cloning; an adapter of random numbers.  What does the gate make of their versions?
    corrected-, ignored-SEED          an expert takes over in a fifth of the episodes; lessons made of it, or none

A result, benchmarks/results/sessions/NAME.json, is never run again.  It has every counted episode in order: its
version, what came of it (S or F, s or f where somebody took over) and when; every line of the session's log; the curve
of the trainer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from policy_server.vla.lora import lora_tensors
from protos.channel import free_port
from rl_trainer.launch import BATCH_WAIT_MS, Child, kept_alive
from rl_trainer.session import SessionRun
from rl_trainer.session_config import At, SessionConfig
from sim.evaluate import WORKER_ENVIRONMENT

RESULTS = Path(__file__).parent / "results" / "sessions"
SUITE, TASKS = "libero_object", (0, 4, 8)
SHIFTS = ("camera", "light", "friction", "objects", "all")
SEEDS = (0, 1, 2)
FRESH_PER_TASK = 50
EPISODES = 400
EPISODES_BAD = 200
CORRECTED = 0.2
SPOILT_SHIFT = CORRECTED_SHIFT = "camera"
FAST = 30
Trainer = Literal["healthy", "fast", "shuffled", "random"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A session, and what its policy can do afterwards; without a trainer, what nano can do."""

    name: str
    shift: str
    trainer: Trainer | None = "healthy"
    seed: int = 0
    episodes: int = EPISODES
    corrected: float = 0.0
    """share of the episodes"""
    intervention_weight: float | None = None
    """None: the trainer's own choice"""
    evaluated: bool = True


EXPERIMENTS = (
    *(Experiment(name=f"before-{shift or 'none'}", shift=shift, trainer=None) for shift in ("", *SHIFTS)),
    *(Experiment(name=f"{shift}-{seed}", shift=shift, seed=seed) for seed in SEEDS for shift in SHIFTS),
    *(
        Experiment(
            name=f"{trainer}-{seed}",
            shift=SPOILT_SHIFT,
            trainer=trainer,
            seed=seed,
            episodes=EPISODES_BAD,
            evaluated=False,
        )
        for seed in SEEDS
        for trainer in ("fast", "shuffled", "random")
    ),
    *(
        Experiment(
            name=f"{name}-{seed}",
            shift=CORRECTED_SHIFT,
            seed=seed,
            corrected=CORRECTED,
            intervention_weight=weight,
        )
        for seed in SEEDS
        for name, weight in (("corrected", None), ("ignored", 0.0))
    ),
)


@dataclass(frozen=True, kw_only=True)
class SessionsConfig:
    """Runs the experiments that have no result yet."""

    only: tuple[str, ...] = ()
    """names; none given: all"""
    list: bool = False
    """print what there is, and stop"""
    hours: float = float("inf")
    """begin nothing new after so long"""
    results: Path = field(default=RESULTS)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A server, and simulated robots in a shifted world, whose workers come and go."""

    folder: Path
    at: At
    shift: str

    def evaluated(self, version: int) -> dict[str, Any]:
        """The report's totals, and each episode's outcome by task and initial state."""
        out = self.folder / f"evaluated-{version}"
        command = ["sim", "evaluate", "--server", self.at.server, "--suite", SUITE, "--protocol", "fresh"]
        command += ["--tasks", *map(str, TASKS), "--episodes-per-task", str(FRESH_PER_TASK), "--version", str(version)]
        command += ["--shift", self.shift] if self.shift else []
        subprocess.run([sys.executable, "-m", *command, "--slots", "8", "--videos", "0", "--out", str(out)], check=True)
        report = json.loads((out / "report.json").read_text())
        episodes = report.pop("episodes")
        return report | {"outcomes": {f"{one['task']}:{one['initial_state']}": one["outcome"] for one in episodes}}

    @contextmanager
    def practising(self, corrected: float) -> Iterator[None]:
        """Workers run what there is to practise."""
        command = ["sim", "worker", "--server", self.at.server, "--suites", SUITE, "--slots", "8", "--coarse-practice"]
        command += ["--shift", self.shift] if self.shift else []
        command += ["--correction.share", str(corrected)]
        log = self.folder / "worker.log"
        worker = Child("workers", _python(command), log, environment=WORKER_ENVIRONMENT, on_loss=print)
        with kept_alive([worker]):
            yield


@contextmanager
def lab(shift: str) -> Iterator[Lab]:
    """All of it is gone in the end."""
    with tempfile.TemporaryDirectory() as name:
        folder, port, admin = Path(name), free_port(), free_port()
        command = ["policy_server", "serve", "--port", str(port), "--admin-port", str(admin)]
        command += ["--episodes", str(folder / "episodes"), "--versions", str(folder / "versions")]
        command += ["--max-batch", "16", "--max-wait-ms", str(BATCH_WAIT_MS)]
        with kept_alive([Child("server", _python(command), folder / "server.log", on_loss=print)]):
            at = At(server=f"127.0.0.1:{port}", admin=f"127.0.0.1:{admin}")
            yield Lab(folder=folder, at=at, shift=shift)


def main(config: SessionsConfig) -> int:
    """0 when every experiment that was asked for has its result."""
    if unknown := sorted({*config.only} - {experiment.name for experiment in EXPERIMENTS}):
        raise ValueError(f"only must be among {[experiment.name for experiment in EXPERIMENTS]}, got {unknown}")
    paths = {
        one: config.results / f"{one.name}.json" for one in EXPERIMENTS if one.name in config.only or not config.only
    }
    if config.list:
        print("\n".join(f"{'done' if path.exists() else '    '}  {one.name}" for one, path in paths.items()))
        return 0
    give_up_s = time.monotonic() + 3600 * config.hours
    config.results.mkdir(parents=True, exist_ok=True)
    for experiment, path in paths.items():
        if not path.exists() and time.monotonic() < give_up_s:
            with lab(experiment.shift) as here:
                result = {"experiment": asdict(experiment), **carry_out(experiment, here)}
            path.write_text(json.dumps(result, indent=1) + "\n")
    return int(not all(path.exists() for path in paths.values()))


def carry_out(experiment: Experiment, here: Lab) -> dict[str, Any]:
    """The session, what came of its episodes, and what its live version does."""
    if experiment.trainer is None:
        return {"evaluation": here.evaluated(0)}
    config = config_of(experiment, here)
    with closing(SessionRun(config)) as run, here.practising(experiment.corrected):
        spoil(run, experiment.trainer)
        run.go()
        live = run.client.get(config.session_id).live_version
    log = [json.loads(line) for line in (here.folder / f"versions/sessions/{config.session_id}.jsonl").open()]
    return {
        "charter": log[0],
        "episodes": [_episode(event, log[0]) for event in log[1:] if event["what"] == "episode"],
        "log": [event for event in log[1:] if event["what"] != "episode"],
        "curve": [json.loads(line) for line in (config.out / "curve.jsonl").open()],
        "evaluation": here.evaluated(live) if experiment.evaluated else None,
    }


def config_of(experiment: Experiment, here: Lab) -> SessionConfig:
    """The session's defaults, but for what the experiment is about."""
    config = SessionConfig(
        at=here.at,
        out=here.folder / "session",
        task=f"{SUITE} {TASKS}",
        budget_episodes=experiment.episodes,
        suite=SUITE,
        tasks=TASKS,
        split="train_drawn",
        seed=experiment.seed,
    )
    learner = config.learner
    if experiment.trainer == "fast":
        learner = replace(learner, learning_rate=FAST * learner.learning_rate)
    if experiment.trainer == "shuffled":
        learner = replace(learner, success_weight=0.0)
    if experiment.intervention_weight is not None:
        learner = replace(learner, intervention_weight=experiment.intervention_weight)
    return replace(config, learner=learner)


def spoil(run: SessionRun, trainer: Trainer) -> None:
    """What is wrong with a trainer, but for what its configuration says."""
    learner, rng = run.learner, np.random.default_rng(run.config.seed)
    advantages, matrices = learner._advantages, lora_tensors(run.checkpoint.model)

    def shuffled(trajectories, rewards, looked) -> tuple[np.ndarray, np.ndarray]:
        advantage_n, target_n = advantages(trajectories, rewards, looked)
        return rng.permutation(advantage_n), target_n

    def random(*batch, **options) -> dict[str, float]:
        with torch.no_grad():
            for name, matrix in matrices.items():
                if "lora_B" in name:  # as PEFT does without init_lora_weights
                    torch.nn.init.kaiming_uniform_(matrix, a=5**0.5)
        learner.steps += 1
        return {}

    if trainer == "shuffled":
        learner._advantages = shuffled
    if trainer == "random":
        learner.update = random


def _episode(event: dict[str, Any], charter: dict[str, Any]) -> tuple[int, str, float]:
    """Version, outcome, and seconds since the session began."""
    trial = event["trial"]
    letter = "S" if trial["success"] else "F"
    seconds = (event["unix_ns"] - charter["started_unix_ns"]) / 1e9
    return event["version"], letter.lower() if trial["intervened"] else letter, round(seconds, 1)


def _python(command: list[str]) -> list[str]:
    return [sys.executable, "-m", *command]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SessionsConfig, description=__doc__)))
