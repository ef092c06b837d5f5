"""The experiments of the recipe: one resumable list, fixed before its first run, each result a file that is committed.

    python -m benchmarks.recipe --list                    what there is, and what is done
    python -m benchmarks.recipe [--only goal-0] [--hours 2]   runs what is not done, in the list's order

An experiment is a training run and evaluations of what it leaves.  An interrupted run is resumed while its folder lies
under --runs; a result, benchmarks/results/recipe/NAME.json, is never run again.  Nothing here was changed after its
result was seen: an experiment that was tried otherwise has another name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from sim.local_server import served

RESULTS = Path(__file__).parent / "results" / "recipe"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One `python -m sim evaluate`."""

    suite: str
    protocol: str
    """states that were neither trained nor tuned on: held_out or fresh"""
    episodes_per_task: int
    temperature: float = 0.0

    @property
    def name(self) -> str:
        sampling = f"t{self.temperature:g}" if self.temperature else "greedy"
        return f"{self.suite}-{self.protocol}-{sampling}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A policy, how it is improved, and how it is measured."""

    name: str
    train: tuple[str, ...] = ()
    """options of `python -m rl_trainer train`; none: nano as it is"""
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
    """Before and after alike: held-out and fresh states, greedy and as it was sampled in training."""
    per_task = 10 if suite.startswith("libero") else 50
    return tuple(
        Evaluation(suite=suite, protocol=protocol, episodes_per_task=per_task, temperature=sampled)
        for sampled in (0.0, temperature)
        for protocol in ("held_out", "fresh")
    )


# Tried beforehand on the train split of libero_goal: no temperature from 0.1 to 1 succeeds more often than another, and
# below 0.5 rounding alone sets server and learner apart by more than 1e-4.  With minibatches of 64, noise moved the
# policy beyond the target divergence within 15 to 30 of 128 steps: most of a batch was never learned from.
TEMPERATURE = 1.0
PPO = (
    *("--temperature", str(TEMPERATURE), "--rollouts", "64", "--slots", "8", "--coarse-practice", "--ranks", "2"),
    *("--learner.learning-rate", "3e-5", "--learner.minibatch", "512", "--learner.epochs", "4"),
    *("--learner.critic-learning-rate", "1e-3", "--learner.target-kl", "0.1"),
)
GOAL = ("--suite", "libero_goal", "--iterations", "40", "--evaluate-every", "5", "--evaluate-states", "5", *PPO)
SEEDS = (0, 1, 2)

EXPERIMENTS = (
    Experiment(name="goal-before", evaluations=measured("libero_goal", TEMPERATURE)),
    *(
        Experiment(
            name=f"goal-{seed}", train=(*GOAL, "--seed", str(seed)), evaluations=measured("libero_goal", TEMPERATURE)
        )
        for seed in SEEDS
    ),
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
    """Trains, evaluates what the training left, and writes the result once all of it is there."""
    folder, model = config.runs / experiment.name, "nano"
    if experiment.train:
        resume = ["--resume"] if (folder / "state.safetensors").exists() else []
        _run("rl_trainer", "train", "--out", str(folder), *experiment.train, *resume)
        model = str(folder / "last")
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for evaluation in experiment.evaluations:
        kept = folder / f"{evaluation.name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(evaluate(evaluation, model)))
        reports[evaluation.name] = json.loads(kept.read_text())
    curve = folder / "curve.jsonl"
    result = {
        "experiment": asdict(experiment),
        "curve": [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else [],
        "evaluations": reports,
    }
    path = _result(config, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def evaluate(evaluation: Evaluation, model: str) -> dict:
    """The report's totals, and each episode's outcome by task and initial state."""
    with tempfile.TemporaryDirectory() as out, served(model=model) as address:
        _run(
            *("sim", "evaluate", "--server", address, "--suite", evaluation.suite, "--protocol", evaluation.protocol),
            *("--episodes-per-task", str(evaluation.episodes_per_task), "--temperature", str(evaluation.temperature)),
            *("--slots", "8", "--videos", "0", "--out", out),
        )
        report = json.loads((Path(out) / "report.json").read_text())
    episodes = report.pop("episodes")
    report["outcomes"] = {f"{one['task']}:{one['initial_state']}": one["outcome"] for one in episodes}
    return report


def _run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True)


def _result(config: RecipeConfig, experiment: Experiment) -> Path:
    return config.results / f"{experiment.name}.json"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RecipeConfig, description=__doc__)))
