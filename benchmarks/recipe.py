"""The experiments of the recipe: one resumable list, fixed before its first run, each result a file that is committed.

    python -m benchmarks.recipe --list                    what there is, and what is done
    python -m benchmarks.recipe [--only object-drawn-0] [--hours 2]   runs what is not done, in the list's order

An experiment is a series of runs and evaluations of what the last one leaves.  An interrupted run is resumed while its
folder lies under --runs; a result, benchmarks/results/recipe/NAME.json, is never run again.  Nothing here was changed
after its result was seen: an experiment that was tried otherwise has another name.  What benchmarks/prepared has of a
run is taken from there, so that experiments begin alike wherever they are run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from rl_trainer.metrics import read_curve
from sim.local_server import served

RESULTS = Path(__file__).parent / "results" / "recipe"
PREPARED = Path(__file__).parent / "prepared"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One `python -m sim evaluate`."""

    suite: str
    protocol: str
    """states that were neither trained nor tuned on: held_out or fresh"""
    episodes_per_task: int
    temperature: float = 0.0
    noise_correlation: float = 0.0
    tasks: tuple[int, ...] = ()
    """none: all"""

    @property
    def name(self) -> str:
        sampling = f"t{self.temperature:g}" if self.temperature else "greedy"
        return f"{self.suite}-{self.protocol}-{sampling}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One `python -m rl_trainer COMMAND --out RUNS/NAME ...`, which several experiments may share."""

    name: str
    command: str
    """train, sft or reward-model"""
    options: tuple[str, ...]
    """{runs} in them is the folder with the runs"""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """How a policy is improved, and how it is measured."""

    name: str
    steps: tuple[Step, ...] = ()
    """none: nano as it is"""
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Runs the recipe's experiments that have no result yet."""

    only: tuple[str, ...] = ()
    """names; none given: all"""
    list: bool = False
    """print what there is, and stop"""
    hours: float = float("inf")
    """begin nothing new after so long"""
    runs: Path = Path("runs/recipe")
    """where training runs lie"""
    results: Path = field(default=RESULTS)


def measured(suite: str, temperature: float) -> tuple[Evaluation, ...]:
    """Before and after alike: held-out and fresh states, greedy and sampled, with noise of each token's own.

    Greedy on all fresh states: of 1100 episodes, a rise from 85 to 90 % parts the intervals.
    """
    held, fresh = (10, 100) if suite.startswith("libero") else (50, 100)
    return tuple(
        Evaluation(suite=suite, protocol=protocol, episodes_per_task=per_task, temperature=sampled)
        for sampled, protocol, per_task in (
            (0.0, "held_out", held),
            (0.0, "fresh", fresh),
            (temperature, "held_out", held),
            (temperature, "fresh", held),
        )
    )


Options = dict[str, str | None]
"""Of `python -m rl_trainer`; None: a flag without a value."""

# Tried beforehand on train and tune states (FIGURES.md).  Below a temperature of 0.5, rounding alone sets server and
# learner apart by more than 1e-4; at 1, what is sampled improves and what is greedy does not follow.  Noise of each
# token's own averages out along a chunk: at 0.5 it tells next to nothing about what would be better.  At minibatches
# of 64, noise moved the policy beyond the target divergence within 15 to 30 of 128 steps: most of a batch was never
# learned from.  At rates of 2e-4 and 1.5e-4 greedy success fell within two iterations; at a constant 5e-5 the policy
# stays four points below the average of its own weights.  A critic of two iterations misleads the first updates if
# lambda is short.
TEMPERATURE = 0.5
CORRELATION = 0.9
TAUGHT = 1.0
"""Temperature of the states that the policy is taught on before."""
COLLECT: Options = {"rollouts": "64", "slots": "8", "coarse-practice": None, "ranks": "2"}
PPO: Options = {
    **COLLECT,
    "temperature": str(TEMPERATURE),
    "noise-correlation": str(CORRELATION),
    "learner.learning-rate": "5e-5",
    "learner.average": "0.995",
    "learner.warm-up": "6",
    "learner.minibatch": "256",
    "learner.epochs": "2",
    "learner.critic-learning-rate": "1e-3",
    "learner.critic-epochs": "8",
    "learner.gamma": "0.998",
    "learner.lambda_": "0.6",
    "learner.target-kl": "0.1",
}
DRAWN: Options = {"split": "train_drawn", "evaluate-split": "tune_drawn"}
"""After object-coherent-0, which practised on fixed states alone: 95 % on nine tasks' draws, 0 % on the tenth's."""
NANO = "policy_server/checkpoints/nano"
SEEDS = (0, 1, 2)


def step(name: str, command: str, *data: str, **options: str | None) -> Step:
    """data: of --data."""
    words = [word for name, value in options.items() for word in (f"--{name}", value) if word is not None]
    return Step(name=name, command=command, options=(*(("--data", *data) if data else ()), *words))


def watched(name: str, suite: str, temperature: float, iterations: int) -> Step:
    """Episodes of nano as it is."""
    budget = {"iterations": str(iterations), "learner.warm-up": str(iterations), "evaluate-every": "0"}
    noise = {"temperature": str(temperature), "noise-correlation": "0"}
    how = {"model": "nano", "learner.critic-epochs": "1", **COLLECT, **noise}
    return step(name, "train", **{"suite": suite, **budget, **how})


def prepared(suite: str) -> tuple[Step, ...]:
    """Where nano goes when it is greedy and when it samples; what teaches it to sample; a reward.

    Taught by itself to do when it samples what it does when it is greedy (rl_trainer/teacher.py).
    """
    label = suite.removeprefix("libero_")
    states = (f"{label}-greedy-states", f"{label}-sampled-states")
    episodes = tuple(f"{{runs}}/{run}/episodes" for run in states)
    teaching = {"init": NANO, "teacher": "nano", "augmentation.token-noise": "3", "bin-smoothing": "2"}
    budget = {"minutes": "9", "ranks": "2", "learning-rate": "3e-4", "autocast": None}
    return (
        watched(states[0], suite, 0.001, 4),
        watched(states[1], suite, TAUGHT, 3),
        step(f"{label}-steady", "sft", *episodes, **teaching, **budget),
        step(f"{label}-reward", "reward-model", *episodes),
    )


def practised(name: str, suite: str, options: Options) -> Step:
    """PPO from what was prepared, with options besides those of PPO."""
    label = suite.removeprefix("libero_")
    model, reward = f"{{runs}}/{label}-steady/last", f"{{runs}}/{label}-reward"
    return step(name, "train", **{"suite": suite, "model": model, "reward-model": reward, **PPO, **options})


def improved(name: str, suite: str, options: Options, evaluations: tuple[Evaluation, ...]) -> Experiment:
    """What was prepared, after practice."""
    steps = (*prepared(suite), practised(name, suite, options))
    return Experiment(name=name, steps=steps, evaluations=evaluations)


def whole(suite: str, *, iterations: int, evaluate_states: int) -> tuple[Experiment, ...]:
    """All tasks of a suite: before, and after by seed; after is the policy that was best on tune states."""
    label, evaluations = suite.removeprefix("libero_"), measured(suite, TEMPERATURE)
    budget = {
        "iterations": str(iterations),
        "learner.anneal": str(iterations),
        "evaluate-every": "8",
        "evaluate-states": str(evaluate_states),
    }
    if suite.startswith("libero"):
        budget |= DRAWN
    return (
        Experiment(name=f"{label}-before", evaluations=evaluations),
        *(improved(f"{label}-drawn-{seed}", suite, {**budget, "seed": str(seed)}, evaluations) for seed in SEEDS),
    )


# The paper's table: the recipe, and the recipe but for one thing.  Two rows more: what overlapping costs and gains; the
# noise of each token its own.  The paper's 18 runs are to take four hours: each is short, and its warm-up with it.
ABLATED: dict[str, Options] = {
    "full": {},
    "no-process-reward": {"shaping.rule": "none"},
    "no-curriculum": {"curriculum.rule": "uniform"},
    "temperature-1": {"temperature": "1.0"},
    "no-warm-up": {"learner.warm-up": "0"},
    "learning-rate-x10": {"learner.learning-rate": "5e-4"},
    "overlapped": {"overlap": None},
    "independent-noise": {"noise-correlation": "0"},
}
SHORT: Options = {"iterations": "10", "learner.anneal": "10", "learner.warm-up": "3", "evaluate-every": "0"}

# On the task that nano, greedy, fails most often; rewards are outcomes alone, which is what groups compare.
WHICH_ADVANTAGE: dict[str, Options] = {
    "gae": {},
    "grpo": {"learner.advantage": "grpo", "group": "8"},
    "rloo": {"learner.advantage": "rloo", "group": "8"},
}
HARDEST = 2
ONE_TASK: Options = {**SHORT, **DRAWN, "tasks": str(HARDEST), "shaping.rule": "none", "evaluate-every": "2"}

EXPERIMENTS = (
    *whole("libero_object", iterations=64, evaluate_states=10),
    *(
        improved(
            f"{name}-{seed}",
            "libero_object",
            {**SHORT, **DRAWN, **changed, "seed": str(seed)},
            (Evaluation(suite="libero_object", protocol="held_out", episodes_per_task=10),),
        )
        for seed in SEEDS
        for name, changed in ABLATED.items()
    ),
    *(
        improved(
            f"one-task-{name}",
            "libero_object",
            {**ONE_TASK, **changed},
            tuple(
                Evaluation(suite="libero_object", protocol=protocol, episodes_per_task=count, tasks=(HARDEST,))
                for protocol, count in (("held_out", 10), ("fresh", 50))
            ),
        )
        for name, changed in WHICH_ADVANTAGE.items()
    ),
    *whole("robosuite", iterations=32, evaluate_states=20),
)


def main(config: RecipeConfig) -> int:
    """0 when every experiment that was asked for has its result."""
    if unknown := sorted({*config.only} - {experiment.name for experiment in EXPERIMENTS}):
        raise ValueError(f"only must be among {[experiment.name for experiment in EXPERIMENTS]}, got {unknown}")
    wanted = [experiment for experiment in EXPERIMENTS if not config.only or experiment.name in config.only]
    if config.list:
        print("\n".join(f"{'done' if _result(config, one).exists() else '    '}  {one.name}" for one in wanted))
        return 0
    give_up_s = time.monotonic() + 3600 * config.hours
    for experiment in wanted:
        if not _result(config, experiment).exists() and time.monotonic() < give_up_s:
            carry_out(experiment, config)
    return int(not all(_result(config, experiment).exists() for experiment in wanted))


def carry_out(experiment: Experiment, config: RecipeConfig) -> None:
    """Takes the steps that are not done, evaluates what the last one left, and writes the result once all is there."""
    model, curves = "nano", {}
    for step in experiment.steps:
        left = take(step, config.runs)
        model = str(left / ("best" if (left / "best").exists() else "last"))
        curves[step.name] = read_curve(left / "curve.jsonl")
    folder = config.runs / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for evaluation in experiment.evaluations:
        kept = folder / f"{evaluation.name}.json"
        if not kept.exists():
            write_json(kept, evaluate(evaluation, model))
        reports[evaluation.name] = json.loads(kept.read_text())
    path = _result(config, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"experiment": asdict(experiment), "curves": curves, "evaluations": reports})


def write_json(path: Path, result: dict) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)


def take(step: Step, runs: Path) -> Path:
    """The folder of a step that is done."""
    folder = runs / step.name
    if not folder.exists() and (prepared := PREPARED / step.name).exists():
        coming = folder.with_name(f"{step.name}.coming")
        shutil.copytree(prepared, coming, dirs_exist_ok=True)
        coming.rename(folder)  # whole or not at all
    done = folder / "done"
    if not done.exists():
        resume = ["--resume"] if (folder / "state.safetensors").exists() else []
        options = [option.format(runs=runs) for option in step.options]
        _run("rl_trainer", step.command, "--out", str(folder), *options, *resume)
        done.touch()
    return folder


def evaluate(evaluation: Evaluation, model: str) -> dict:
    """Of a model, which is served for it."""
    with tempfile.TemporaryDirectory() as out, served(model=model) as address:
        return report(evaluation, address, Path(out))


def report(evaluation: Evaluation, server: str, out: Path, *options: str) -> dict:
    """The report's totals, and each episode's outcome by task and initial state."""
    _run(
        *("sim", "evaluate", "--server", server, "--suite", evaluation.suite, "--protocol", evaluation.protocol),
        *("--episodes-per-task", str(evaluation.episodes_per_task), "--temperature", str(evaluation.temperature)),
        *("--noise-correlation", str(evaluation.noise_correlation)),
        *("--slots", "8", "--videos", "0", "--out", str(out), *options),
        *(("--tasks", *map(str, evaluation.tasks)) if evaluation.tasks else ()),
    )
    whole = json.loads((out / "report.json").read_text())
    episodes = whole.pop("episodes")
    return whole | {"outcomes": {f"{one['task']}:{one['initial_state']}": one["outcome"] for one in episodes}}


def _run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True)


def _result(config: RecipeConfig, experiment: Experiment) -> Path:
    return config.results / f"{experiment.name}.json"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RecipeConfig, description=__doc__)))
