"""Sessions on simulated robots in shifted worlds: one resumable list, fixed before its first run.

    python -m benchmarks.sessions --list                    what there is, and what is done
    python -m benchmarks.sessions [--only shifted-2-0] [--hours 2]   runs what is not done, in the list's order

A robot has one task, of libero_object, with stand-in visuals.  TASKS are, of the seven that sessions were not tuned on,
the three at which the prepared policy succeeded least often in the world where all is shifted (FIGURES, "Tries at
sessions").  Success is measured on fresh states, before and after: sampled as the session's robots play, which is what
is judged, and greedy.  Practice is on fixed and drawn states of the train split, sampled, with coarse meshes.  A
session begins with nano as the recipe prepares it for practice (benchmarks/recipe.py), with that policy's critic, in
the world as it is, and its reward model.

    start-SHIFT         what sessions begin with, at the three tasks in a world (sim/shifts.py)
    shifted-TASK-SEED   a session in the world where all is shifted, and what it leaves, evaluated
    fast-, shuffled-, random-SEED     trainers that go wrong: learning rate x 30; advantages dealt out anew, and no
                        cloning; an adapter of random numbers.  What does the gate make of their versions?
    helped-, ignored-SEED             an expert takes over in a fifth of the episodes; lessons made of it, or none

A result, benchmarks/results/sessions/NAME.json, is never run again.  all-TASK-SEED and corrected-0 are of the trainer
before it was changed for what corrected-0 had shown (FIGURES), before-SHIFT is nano, and what those began with.  A
result has every counted episode in order: its version, what came of it (S, F or E, an error; small where somebody took
over) and when; every line of the session's log; the curve of the trainer.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from google.protobuf.json_format import MessageToDict

from benchmarks import recipe
from policy_server.vla.lora import lora_tensors
from protos import session_pb2
from protos.channel import free_port
from rl_trainer.curriculum import CurriculumConfig
from rl_trainer.launch import BATCH_WAIT_MS, Child, kept_alive
from rl_trainer.metrics import read_curve
from rl_trainer.session import SessionRun
from rl_trainer.session_config import At, SessionConfig
from rl_trainer.train_config import STATE
from sim.evaluate import WORKER_ENVIRONMENT

RESULTS = Path(__file__).parent / "results" / "sessions"
SUITE, TASKS = "libero_object", (2, 3, 7)
CRITIC = recipe.practised(
    "object-critic",
    SUITE,
    {**recipe.DRAWN, "iterations": "6", "learner.warm-up": "6", "evaluate-every": "0"},
)
"""Its policy stays as it was prepared."""
SHIFT = "all"
"""Camera, light, friction and objects changed at once."""
SEEDS = (0, 1, 2)
FRESH_PER_TASK = 60
AS_IN_PRACTICE = {"temperature": recipe.TEMPERATURE, "noise_correlation": recipe.CORRELATION}
"""Of the sampled evaluation.  Greedy episodes hardly differ: the object stands still."""
EPISODES = 400
SPOILT_TASK, EPISODES_BAD, OFFER_BAD = 3, 200, 2
"""Of trainers that go wrong: where there is success to be lost; candidates come often, so that there are some."""
CORRECTED = 0.2
FAST = 30
FOR_WORKERS = ("--max-batch", "16", "--max-wait-ms", str(BATCH_WAIT_MS))
Trainer = Literal["healthy", "fast", "shuffled", "random"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A session, and what its policy can do afterwards; without a trainer, what it would begin with."""

    name: str
    shift: str = SHIFT
    trainer: Trainer | None = "healthy"
    task: int = TASKS[0]
    """the session's"""
    seed: int = 0
    episodes: int = EPISODES
    corrected: float = 0.0
    """share of the episodes"""
    intervention_weight: float = 0.0
    evaluated: bool = True


def spoilt(*trainers: Trainer) -> Iterator[Experiment]:
    """A session with each of these, from each seed."""
    for seed in SEEDS:
        for trainer in trainers:
            name = f"{trainer}-{seed}"
            how = {"task": SPOILT_TASK, "episodes": EPISODES_BAD, "evaluated": False}
            yield Experiment(name=name, trainer=trainer, seed=seed, **how)


def corrected() -> Iterator[Experiment]:
    """Sessions with an expert's help: used, and not."""
    for seed in SEEDS:
        for name, weight in (("helped", 0.1), ("ignored", 0.0)):
            yield Experiment(name=f"{name}-{seed}", seed=seed, corrected=CORRECTED, intervention_weight=weight)


EXPERIMENTS = (
    *(Experiment(name=f"start-{shift or 'none'}", shift=shift, trainer=None) for shift in (SHIFT, "")),
    *(
        Experiment(name=f"shifted-{task}-{seed}", task=task, seed=seed)
        for seed, task in itertools.product(SEEDS, TASKS)
    ),
    *spoilt("fast", "shuffled", "random"),
    *corrected(),
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
    runs: Path = Path("runs/recipe")
    """where the recipe's runs lie, which make the policy that sessions begin with"""
    results: Path = field(default=RESULTS)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a session begins with; without critic and reward model, what only serves."""

    model: str
    critic: Path | None = None
    reward_model: Path | None = None

    @classmethod
    def of_recipe(cls, runs: Path) -> Start:
        """Made where it is neither there nor in benchmarks/prepared, which takes half an hour."""
        *_, steady, reward, critic = [recipe.take(step, runs) for step in (*recipe.prepared(SUITE), CRITIC)]
        return cls(model=str(steady / "last"), critic=critic / STATE, reward_model=reward)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A server, and simulated robots in a shifted world, whose workers come and go."""

    folder: Path
    server: Child
    at: At
    start: Start
    shift: str

    def evaluated(self, version: int, *tasks: int) -> dict[str, dict[str, Any]]:
        """Sampled and greedy, as recipe.report() gives it."""
        options = ["--version", str(version), *(["--shift", self.shift] if self.shift else [])]
        greedy = recipe.Evaluation(suite=SUITE, protocol="fresh", episodes_per_task=FRESH_PER_TASK, tasks=tasks)
        reports = {}
        for name, evaluation in (("greedy", greedy), ("sampled", replace(greedy, **AS_IN_PRACTICE))):
            out = self.folder / f"evaluated-{version}-{name}"
            reports[name] = recipe.report(evaluation, self.at.server, out, *options)
        return reports

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
def lab(start: Start, shift: str, *, serve: Sequence[str] = FOR_WORKERS) -> Iterator[Lab]:
    """All of it is gone in the end.  serve: more flags of the server's."""
    with tempfile.TemporaryDirectory() as name:
        folder, port, admin = Path(name), free_port(), free_port()
        command = ["policy_server", "serve", "--model", start.model, "--port", str(port), "--admin-port", str(admin)]
        command += ["--episodes", str(folder / "episodes"), "--versions", str(folder / "versions")]
        command += serve
        server = Child("server", _python(command), folder / "server.log", on_loss=print)
        with kept_alive([server]):
            at = At(server=f"127.0.0.1:{port}", admin=f"127.0.0.1:{admin}")
            yield Lab(folder=folder, server=server, at=at, start=start, shift=shift)


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
            result = {"experiment": asdict(experiment), **carry_out(experiment, Start.of_recipe(config.runs))}
            recipe.write_json(path, result)
    return int(not all(path.exists() for path in paths.values()))


def carry_out(experiment: Experiment, start: Start) -> dict[str, Any]:
    """What the experiment is about, with what sessions begin with."""
    with lab(start, experiment.shift) as here:
        if experiment.trainer is None:
            return {"evaluation": here.evaluated(0, *TASKS)}
        return have_session(experiment, here)


def have_session(experiment: Experiment, here: Lab) -> dict[str, Any]:
    """What came of its episodes, and what its live version does."""
    config = config_of(experiment, here)
    with closing(SessionRun(config)) as run, here.practising(experiment.corrected):
        spoil(run, experiment.trainer)
        run.go()
        session = run.client.get(config.session_id, with_episodes=True)
    began = session.started_unix_ns
    return {
        "rule": MessageToDict(session.rule),
        "episodes": [[one.version, _letter(one), round((one.unix_ns - began) / 1e9, 1)] for one in session.episodes],
        "log": [
            [event.what, event.version, event.by, round((event.unix_ns - began) / 1e9, 1), event.reason]
            for event in session.log
        ],
        "curve": read_curve(config.out / "curve.jsonl"),
        "evaluation": here.evaluated(session.live_version, experiment.task) if experiment.evaluated else None,
    }


def config_of(experiment: Experiment, here: Lab) -> SessionConfig:
    """The session's defaults, but for what the experiment is about."""
    config = SessionConfig(
        at=here.at,
        out=here.folder / "session",
        model=here.start.model,
        critic=here.start.critic,
        reward="both",
        reward_model=here.start.reward_model,
        task=f"{SUITE}/{experiment.task}",
        budget_episodes=experiment.episodes,
        suite=SUITE,
        tasks=(experiment.task,),
        split="train_drawn",
        curriculum=CurriculumConfig(rule="uniform"),  # the curve of the episodes is one of the policy
        seed=experiment.seed,
    )
    learner = replace(config.learner, warm_up=1, intervention_weight=experiment.intervention_weight)
    if experiment.trainer != "healthy":
        config = replace(config, offer_every=OFFER_BAD)
    if experiment.trainer == "fast":
        learner = replace(learner, learning_rate=FAST * learner.learning_rate)
    if experiment.trainer == "shuffled":
        learner = replace(learner, success_weight=0.0)
    return replace(config, learner=learner)


def spoil(run: SessionRun, trainer: Trainer | None) -> None:
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


def _letter(episode: session_pb2.SessionEpisode) -> str:
    letter = "E" if episode.error else "S" if episode.success else "F"
    return letter.lower() if episode.intervened else letter


def _python(command: list[str]) -> list[str]:
    return [sys.executable, "-m", *command]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SessionsConfig, description=__doc__)))
