"""Process reward: what models trained by each label rule say of episodes they never saw, against privileged progress.

    python -m benchmarks.process_reward [--work runs/process_reward]

Experts and a policy that samples are recorded with the simulator's own progress beside every observation
(benchmarks/witnessed.py); a model is trained by `python -m rl_trainer reward-model` for each rule, on episodes from
states of the split train; what it predicts on episodes from states of the split tune is compared with their progress,
apart for experts and for failing policies.  Beside them a clock, since on an expert's episode the time that has passed
predicts progress as well as anything; and a model that was shown no failures.  An interrupted run goes on where it was.
Prints a table, writes benchmarks/results/process_reward.json.

Shapes: E episodes, D observations of one of them, n of several.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import bootstrap, pearsonr, spearmanr

from benchmarks.witnessed import Amounts, record_task, witnessed
from policy_server.vla.checkpoint import load_config, local_folder
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.tokenizer import Tokenizer
from protos import episode_pb2
from protos.episode_file import SUFFIX, Episode, read_episode
from rl_trainer.demonstrations import demonstration_from_episode
from rl_trainer.milestones import MilestoneConfig, labelled, motion_of
from rl_trainer.reward_model import RECORD, auc, load_reward_model
from sim.evaluate import WORKER_ENVIRONMENT

TASKS = ("libero_goal/8", "robosuite/0", "libero_object/4", "libero_goal/1", "libero_object/9")
AMOUNTS = Amounts()
POLICY, TEMPERATURE = "nano", 1.0
RULES = ("keyframes", "window", "progress")
MODELS = {**{rule: (rule, True) for rule in RULES}, "progress-successes": ("progress", False)}
"""name -> rule, and whether the failing episodes are learned from"""
STEPS, BATCH, SEED = 300, 32, 0
RESAMPLES, CONFIDENCE = 1000, 0.95
HELD = 0.35
"""Progress above which the object is in the hand, or already where it should be (sim/expert_skills.py)."""
RESULT = Path("benchmarks/results/process_reward.json")
TRAINING = ("expert_train", "policy_train")


@dataclass(frozen=True, kw_only=True)
class ProcessRewardConfig:
    """Measures process reward models by label rule."""

    work: Path = Path("runs/process_reward")
    """Episodes and models; what is there already is kept."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A held-out episode."""

    success: bool
    observations: list[Prepared]
    """D"""
    progress_D: np.ndarray
    """float64, privileged"""
    tick_D: np.ndarray
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """rule -> candidates and labels; none of a failing episode"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval over resampled episodes."""

    value: float
    low: float
    high: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def main(config: ProcessRewardConfig) -> None:
    os.environ.update(WORKER_ENVIRONMENT)
    folders = [config.work / task.replace("/", "-") for task in TASKS]
    for task, folder in zip(TASKS, folders, strict=True):
        record_task(task, folder, AMOUNTS, model=POLICY, temperature=TEMPERATURE)
    costs = {name: train(*how, folders, config.work / name) for name, how in MODELS.items()}
    checkpoint = local_folder(POLICY)
    policy, tokenizer = load_config(checkpoint), Tokenizer.load(checkpoint)
    read = Reader(Preprocessor(policy, tokenizer), policy.camera)
    experts = [read(*one) for folder in folders for one in witnessed(folder, "expert_held")]
    rollouts = [read(*one) for folder in folders for one in witnessed(folder, "policy_held")]
    judges: dict[str, Callable[[Seen], np.ndarray]] = {"a clock": lambda seen: seen.tick_D.astype(float)}
    for name in MODELS:
        model = load_reward_model(config.work / name, policy, tokenizer)
        judges[name] = lambda seen, model=model: model.predict(seen.observations)
    results = {name: measured(name, judge, experts, rollouts) for name, judge in judges.items()}
    print(table(results))
    counts = {
        "experts": len(experts),
        "policy successes": sum(one.success for one in rollouts),
        "policy failures": sum(not one.success for one in rollouts),
    }
    print(f"held out: {counts}; trained {STEPS} steps of {BATCH}: {costs}")
    settings = {"tasks": TASKS, **asdict(AMOUNTS), "policy": POLICY, "temperature": TEMPERATURE}
    settings |= {"steps": STEPS, "batch": BATCH, "seed": SEED, "resamples": RESAMPLES}
    record = {"settings": settings, "held_out": counts, "training": costs}
    record["measured"] = {name: {what: asdict(one) for what, one in row.items()} for name, row in results.items()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(rule: str, failures: bool, folders: Sequence[Path], out: Path) -> dict[str, float]:
    """Trains a model as a user would; gives the seconds it took, of the wall's clock and of a core."""
    cost = out.with_suffix(".json")
    if not ((out / RECORD).exists() and cost.exists()):
        command = [sys.executable, "-m", "rl_trainer", "reward-model", "--out", str(out), "--policy", POLICY]
        command += ["--milestones.rule", rule, "--steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(SEED)]
        files = [path for folder in folders for group in TRAINING for path in (folder / group).glob(f"*{SUFFIX}")]
        command += ["--data", *(str(path) for path in files if failures or succeeded(read_episode(path)))]
        started_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        core_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cost.write_text(json.dumps({"wall_s": round(time.monotonic() - started_s), "core_s": round(core_s)}))
    return json.loads(cost.read_text())


def succeeded(episode: Episode) -> bool:
    return episode.end.outcome == episode_pb2.OUTCOME_SUCCESS


class Reader:
    """Episodes as the policy reads them."""

    def __init__(self, preprocessor: Preprocessor, camera: str):
        self._preprocessor, self._camera = preprocessor, camera

    def __call__(self, episode: Episode, progress: Sequence[float]) -> Seen:
        seen = demonstration_from_episode(episode, self._camera)
        if len(seen.tick_D) != len(progress):
            raise ValueError(f"{seen.name}: {len(progress)} observations, {len(seen.tick_D)} of them acted on")
        labels = {}
        if succeeded(episode):
            motion = motion_of(episode, seen)
            labels = {rule: labelled(motion, MilestoneConfig(rule=rule)) for rule in RULES}  # pyright: ignore[reportArgumentType]
        return Seen(
            success=succeeded(episode),
            observations=[
                self._preprocessor.prepare(frame, seen.instruction, state_S)
                for frame, state_S in zip(seen.frames_DHW3, seen.state_DS, strict=True)
            ],
            progress_D=np.array(progress),
            tick_D=seen.tick_D,
            labels=labels,
        )


def measured(
    name: str, judge: Callable[[Seen], np.ndarray], experts: Sequence[Seen], rollouts: Sequence[Seen]
) -> dict[str, Estimate]:
    """What a judge's predictions are worth: as a classifier of frames and of episodes, and as progress."""
    predicted = {id(seen): judge(seen) for seen in (*experts, *rollouts)}
    failing = [seen for seen in rollouts if not seen.success]
    numbers = {}
    if name in ("keyframes", "window"):
        for who, episodes in {"experts": experts, "rollouts": rollouts}.items():
            rows = [answers(predicted[id(seen)], seen, name) for seen in episodes]
            numbers[f"milestones of {who}, AUC"] = pooled(auc, rows)
    for what, reduce in {"last": lambda p_D: p_D[-1], "highest": np.max}.items():
        ends = [(reduce(predicted[id(seen)])[None], np.array([seen.success])) for seen in rollouts]
        numbers[f"success by the {what}, AUC"] = pooled(auc, ends)
    for who, episodes in {"experts": experts, "failing": failing}.items():
        pairs = [(predicted[id(seen)], seen.progress_D) for seen in episodes]
        numbers[f"{who}, object in hand, AUC"] = pooled(auc, [(one_D, true_D > HELD) for one_D, true_D in pairs])
        for kind, correlation in {"Spearman": spearmanr, "Pearson": pearsonr}.items():
            numbers[f"{who}, {kind} within"] = within(correlation, pairs)
            numbers[f"{who}, {kind} pooled"] = pooled(lambda x_n, y_n, of=correlation: of(x_n, y_n).statistic, pairs)
    return numbers


Pair = tuple[np.ndarray, np.ndarray]


def answers(predicted_D: np.ndarray, seen: Seen, rule: str) -> Pair:
    """Predictions of the rule's candidates, and which of them are milestones; none is in a failing episode."""
    if not seen.success:
        return predicted_D, np.zeros(len(predicted_D), bool)
    candidates_n, labels_n = seen.labels[rule]
    return predicted_D[candidates_n], labels_n > 0.5


def pooled(statistic: Callable[[Any, Any], float], pairs: Sequence[Pair]) -> Estimate:
    """Of all observations together; what is resampled are episodes."""

    def of(chosen: np.ndarray) -> float:
        first, second = zip(*(pairs[index] for index in chosen), strict=True)
        return statistic(np.concatenate(first), np.concatenate(second))

    return estimate(of, len(pairs))


def within(correlation: Callable[..., Any], pairs: Sequence[Pair]) -> Estimate:
    """The mean over episodes; one in which either never changes has none."""
    changing = [pair for pair in pairs if len(pair[0]) > 2 and all(np.ptp(one) > 0 for one in pair)]
    each_E = np.array([correlation(*pair).statistic for pair in changing])
    return estimate(lambda chosen: float(each_E[chosen].mean()), len(each_E))


def estimate(statistic: Callable[[np.ndarray], float], episodes: int) -> Estimate:
    rows = np.arange(episodes)
    interval = bootstrap(
        (rows,),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value=float(statistic(rows)), low=float(interval.low), high=float(interval.high), episodes=episodes)


def table(results: dict[str, dict[str, Estimate]]) -> str:
    """A line for each measure, a column for each judge."""
    names = list(dict.fromkeys(what for row in results.values() for what in row))
    n = {what: row[what].episodes for row in results.values() for what in row}
    lines = ["| measure | n | " + " | ".join(results) + " |", "|---" * (2 + len(results)) + "|"]
    for what in names:
        cells = [str(row[what]) if what in row else "-" for row in results.values()]
        lines.append(f"| {what} | {n[what]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(ProcessRewardConfig, description=__doc__))
