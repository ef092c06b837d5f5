"""SIGKILL of a training run's processes at random moments, beside the same run left alone.

    python -m benchmarks.kills [--kills 20] [--seed 0] [--json FILE]

Who is killed when is drawn from the seed before anything runs: the trainer (started again with --resume), its server,
one simulator process, or all workers.  Both runs have the same configuration and --deterministic: the killed one has to
end with the same episodes and, bit for bit, the same weights.  A third run shows what that flag costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import psutil
import torch
import tyro

from policy_server.vla.passes import DecodeInput
from policy_server.vla.policy import Policy
from protos import episode_pb2
from protos.episode_file import read_episode
from rl_trainer.metrics import read_curve
from rl_trainer.train_config import RECORD, STATE
from rl_trainer.train_state import TrainState

Victim = Literal["trainer", "server", "one simulator", "all workers"]
HELD_OUT = 2
"""Episodes of an evaluation."""
APPEAR_S = 120.0
"""How long a victim may take to be there again."""
GONE_S = 30.0
"""How soon the children of a killed trainer have to be gone."""
GAP = 1e-4
"""Server against learner, float32."""
MAX_BATCH = 16
"""Of `policy_server serve`; what --deterministic pads every pass to."""


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    """Kill a run's processes and compare its end with that of a run left alone."""

    out: Path | None = None
    """Folder of the runs; none given: a temporary one."""
    kills: int = 20
    """How many."""
    seed: int = 0
    """Of victims and moments, and of the run itself."""
    iterations: int = 8
    """Of each run."""
    rollouts: int = 4
    """Of an iteration."""
    evaluate_every: int = 4
    """Iterations between two evaluations."""
    processes: int = 1
    """Simulator processes, two episodes in each."""
    pause_s: float = 15.0
    """A kill comes when a random number of episodes is in, and up to so much later."""
    cost: bool = True
    """Also run without --deterministic."""
    json: Path | None = None
    """Also write the figures here."""

    @property
    def episodes(self) -> int:
        """Of a whole run."""
        return self.iterations * self.rollouts + HELD_OUT * (1 + self.iterations // self.evaluate_every)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill as it is planned."""

    victim: Victim
    episodes: int
    """that are in the store, of the whole run's; not before"""
    pause_s: float
    """after that, and after the kill before it"""


@dataclass(frozen=True, kw_only=True)
class Killed:
    """One kill as it went."""

    victim: Victim
    at_s: float
    """since the run began"""
    episodes: int
    """in the store"""
    processes: int
    orphans: int = 0
    """children of a killed trainer that were still there GONE_S later"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a run has left on disk."""

    counts: Mapping[str, int]
    """as the trainer counted"""
    steps: list[float]
    """of the curve's iterations"""
    measures: list[dict[str, float]]
    """of the curve, without times and version numbers"""
    rollouts: Counter[str]
    """counted episodes in the server's store, by rollout without the run's name"""
    errors: int
    """episodes there that were cut short"""
    tensors: Mapping[str, torch.Tensor]
    gap: float
    """largest difference between the server's log-probabilities and the learner's"""
    collect_s: float
    """median of an iteration"""
    decisions_per_s: float
    """while collecting"""


def main(config: KillsConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = config.out or Path(folder)
        kills = run_killed(config, out / "killed")
        run_alone(config, out / "alone")
        figures = compare(ended(out / "alone"), ended(out / "killed"))
        figures |= {
            "kills": [asdict(kill) for kill in kills],
            "config": json.loads(json.dumps(asdict(config), default=str)),
        }
        if config.cost:
            run_alone(config, out / "free", deterministic=False)
            figures["cost"] = cost(ended(out / "alone"), ended(out / "free")) | {"passes_ms": passes_ms("nano")}
    print_table(figures)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(figures, indent=1) + "\n")


def planned(config: KillsConfig) -> list[Kill]:
    """Every kind of victim as often as the others, in random order, at random moments of the run's work."""
    chance, kinds = random.Random(config.seed), get_args(Victim)
    victims = [kinds[number % len(kinds)] for number in range(config.kills)]
    chance.shuffle(victims)
    moments = sorted(chance.randrange(config.episodes) for _ in victims)
    return [
        Kill(victim=victim, episodes=episodes, pause_s=chance.uniform(0.0, config.pause_s))
        for victim, episodes in zip(victims, moments, strict=True)
    ]


def start(config: KillsConfig, out: Path, *, deterministic: bool = True) -> subprocess.Popen:
    """A trainer with a server and workers of its own; it goes on where there is a run already."""
    command = [sys.executable, "-m", "rl_trainer", "train", "--suite", "robosuite", "--tasks", "0", "--out", str(out)]
    command += ["--iterations", str(config.iterations), "--rollouts", str(config.rollouts), "--seed", str(config.seed)]
    command += ["--evaluate-every", str(config.evaluate_every), "--evaluate-states", str(HELD_OUT)]
    command += ["--processes", str(config.processes), "--slots", "2"]
    command += ["--learner.warm-up", "1", "--learner.learning-rate", "1e-4", "--learner.average", "0"]
    command += ["--deterministic"] * deterministic + ["--resume"] * (out / RECORD).exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def run_alone(config: KillsConfig, out: Path, *, deterministic: bool = True) -> None:
    trainer = start(config, out, deterministic=deterministic)
    check(trainer.wait(), out)


def run_killed(config: KillsConfig, out: Path) -> list[Killed]:
    """Runs to the end, whatever is killed; the kills that the run lived to see."""
    began_s, kills = time.monotonic(), list[Killed]()
    trainer = start(config, out)
    for kill in planned(config):
        while trainer.poll() is None and stored(out) < kill.episodes:
            time.sleep(0.1)
        time.sleep(kill.pause_s)
        victims = targets(trainer, kill.victim)
        if not victims:
            break  # the run is over
        at_s, in_store, orphans = time.monotonic() - began_s, stored(out), list[psutil.Process]()
        family = psutil.Process(trainer.pid).children(recursive=True)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if kill.victim == "trainer":
            trainer.wait()
            trainer = start(config, out)
            _, orphans = psutil.wait_procs(family, timeout=GONE_S)
        kills.append(
            Killed(
                victim=kill.victim,
                at_s=round(at_s, 1),
                episodes=in_store,
                processes=len(victims),
                orphans=len(orphans),
            )
        )
        print(kills[-1], flush=True)
    check(trainer.wait(), out)
    return kills


def stored(out: Path) -> int:
    """How many counted episodes the server has."""
    return sum(not path.name.endswith(".error.episode") for path in (out / "episodes").glob("*.episode"))


def targets(trainer: subprocess.Popen, victim: Victim) -> list[psutil.Process]:
    """The processes to kill, waited for while they start; none when the run has ended."""
    give_up_at = time.monotonic() + APPEAR_S
    while trainer.poll() is None:
        if victim == "trainer":
            return [psutil.Process(trainer.pid)]
        family = list(_family(trainer.pid))
        found = {
            "server": [process for process, line in family if "-m policy_server serve" in line],
            "one simulator": [process for process, line in family if "spawn_main" in line][-1:],
            "all workers": [process for process, line in family if "spawn_main" in line or "-m sim worker" in line],
        }[victim]
        if found:
            return found
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"there was no {victim} to kill for {APPEAR_S:.0f} s")
        time.sleep(0.1)
    return []


def _family(pid: int) -> Iterator[tuple[psutil.Process, str]]:
    """The living descendants with their command lines."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            yield process, " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue


def check(code: int, out: Path) -> None:
    if code:
        tail = (out.parent / f"{out.name}.log").read_text().splitlines()[-5:]
        raise RuntimeError(f"the run in {out} ended with code {code}:\n" + "\n".join(tail))


def ended(out: Path) -> Ended:
    """Reads what a run has left."""
    state, tensors = TrainState.load(out / STATE)
    rows = read_curve(out / "curve.jsonl")
    iterations = [row for row in rows if "success/train" in row]
    rollouts, errors = Counter[str](), 0
    for path in (out / "episodes").glob("*.episode"):
        episode = read_episode(path)
        if episode.end.outcome == episode_pb2.OUTCOME_ERROR:
            errors += 1
        else:
            rollouts[episode.start.rollout_id.partition("/")[2]] += 1
    collect_s = [row["seconds/collect"] for row in iterations]
    return Ended(
        counts=state.counts,
        steps=[row["step"] for row in iterations],
        measures=[{name: value for name, value in row.items() if not name.startswith(UNEQUAL)} for row in rows],
        rollouts=rollouts,
        errors=errors,
        tensors=tensors,
        gap=max(row["logprob_gap"] for row in iterations),
        collect_s=statistics.median(collect_s),
        decisions_per_s=state.counts["decisions"] / sum(collect_s),
    )


UNEQUAL = ("seconds/", "wall_clock_s", "staleness", "logprob_gap")
"""What a curve says that need not repeat: times, and what goes by version numbers, of which a killed run uses more."""


def compare(alone: Ended, killed: Ended) -> dict:
    """Rows (alone, killed), and whether everything is as it has to be."""
    differing = [name for name in alone.tensors if not torch.equal(alone.tensors[name], killed.tensors[name])]
    rows: dict[str, tuple[object, object]] = {
        "counted episodes (trainer)": (alone.counts["episodes"], killed.counts["episodes"]),
        "decisions (trainer)": (alone.counts["decisions"], killed.counts["decisions"]),
        "environment steps (trainer)": (alone.counts["environment_steps"], killed.counts["environment_steps"]),
        "iterations in the curve": (len(alone.steps), len(killed.steps)),
        "rollouts in the store": (len(alone.rollouts), len(killed.rollouts)),
        "rollouts counted twice": (twice(alone), twice(killed)),
    }
    laws = {
        "the same counts": all(one == other for one, other in rows.values()),
        "no rollout twice": twice(killed) == 0,
        "none lost, none more": alone.rollouts == killed.rollouts,
        "the same curve": alone.steps == killed.steps and alone.measures == killed.measures,
        f"no log-prob gap of {GAP:g}": max(alone.gap, killed.gap) < GAP,
        "the same weights, optimiser and critic, bit for bit": not differing
        and alone.tensors.keys() == killed.tensors.keys(),
    }
    rows["episodes cut short"] = (alone.errors, killed.errors)
    rows["largest log-prob gap"] = (f"{alone.gap:.1e}", f"{killed.gap:.1e}")
    return {"rows": rows, "laws": laws, "tensors": len(alone.tensors), "differing": differing}


def twice(run: Ended) -> int:
    return sum(count > 1 for count in run.rollouts.values())


def cost(alone: Ended, free: Ended) -> dict[str, float]:
    """What --deterministic costs a run, from two of them one after the other."""
    return {
        "collect_s, deterministic": alone.collect_s,
        "collect_s, free": free.collect_s,
        "decisions/s, deterministic": alone.decisions_per_s,
        "decisions/s, free": free.decisions_per_s,
    }


def passes_ms(model: str, *, rounds: int = 5) -> dict[int, tuple[float, float]]:
    """Batch -> median milliseconds of a pass, deterministic and free, measured in turns."""
    policies = [Policy.load(model, deterministic_batch=batch) for batch in (MAX_BATCH, None)]
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    taken_ms: dict[int, tuple[float, float]] = {}
    for batch in (1, 2, 4, 8, 16):
        series: list[list[float]] = [[], []]
        for _ in range(rounds):
            for policy, times in zip(policies, series, strict=True):
                times.append(_pass_ms(policy, pixels, batch))
        taken_ms[batch] = (statistics.median(series[0]), statistics.median(series[1]))
    return taken_ms


def _pass_ms(policy: Policy, pixels: np.ndarray, batch: int) -> float:
    state_S = np.zeros(policy.config.state_dim, np.float32)
    prepared = policy.prepare(pixels, "lift the cube", state_S)
    inputs = [DecodeInput(prepared=prepared, temperature=1.0, seed=seed, decision=0) for seed in range(batch)]
    started_s = time.process_time()  # of this process: others on the machine do not count
    policy.decode(inputs)
    return 1e3 * (time.process_time() - started_s)


def print_table(figures: dict) -> None:
    print(f"\n{len(figures['kills'])} kills: {dict(Counter(kill['victim'] for kill in figures['kills']))}")
    print(f"  {'':<32}{'alone':>10}{'killed':>10}")
    for name, (alone, killed) in figures["rows"].items():
        print(f"  {name:<32}{alone!s:>10}{killed!s:>10}")
    for law, held in figures["laws"].items():
        print(f"  {'held  ' if held else 'BROKEN'} {law}")
    print(f"  {figures['tensors'] - len(figures['differing'])} of {figures['tensors']} tensors bit-equal")
    print(f"  orphans of a killed trainer after {GONE_S:.0f} s: {sum(kill['orphans'] for kill in figures['kills'])}")
    for name, value in figures.get("cost", {}).items():
        if name != "passes_ms":
            print(f"  {name:<32}{value:>10.2f}")
    for batch, (padded, free) in figures.get("cost", {}).get("passes_ms", {}).items():
        print(f"  pass of {batch:>2}: {padded:6.0f} ms of CPU deterministic, {free:6.0f} ms free, {padded / free:.1f}x")


if __name__ == "__main__":
    main(tyro.cli(KillsConfig, description=__doc__))
