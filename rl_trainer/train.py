"""Online improvement of a served policy: `python -m rl_trainer train --suite libero_object --out DIR`.

    while the budget lasts:
        rollouts go to the server's queue, workers run them, episodes come back       (rollouts.py)
        episodes become trajectories, trajectories a batch                            (trajectories.py, batching.py)
        the learner updates critic and policy                                         (learner.py)
        the new weights are published, with proof that they are what is served        (publisher.py)

Rank 0 leads: it alone talks to the server and writes.  The other ranks wait for trajectories and compute their part.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import binomtest

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from policy_server.vla.lora import apply_lora, save_lora
from protos import episode_pb2, rollout_pb2
from rl_trainer.critic import Critic
from rl_trainer.curriculum import Cell, Curriculum, CurriculumConfig
from rl_trainer.launch import Child, free_port, kept_alive
from rl_trainer.learner import Learner, LearnerConfig
from rl_trainer.metrics import Curve
from rl_trainer.publisher import Publisher
from rl_trainer.ranks import Ranks, launched
from rl_trainer.reward_alarm import AlarmConfig, RewardAlarm
from rl_trainer.reward_model import load_reward_model
from rl_trainer.rollouts import Finished, RolloutQueue
from rl_trainer.shaping import ShapingConfig, shaped_rewards
from rl_trainer.train_state import TrainState
from rl_trainer.trajectories import RefusedEpisode, Trajectory, TrajectoryReader

STATE = "state.safetensors"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Improves a policy online, by PPO on what workers do with it."""

    out: Path
    """where checkpoints, curves and, for a server of this run's own, episodes go"""
    suite: str = "libero_object"
    """of `python -m sim suites`"""
    tasks: tuple[int, ...] = ()
    """of the suite; none given: all"""
    split: str = "train"
    """initial states to practise on"""
    model: str = "nano"
    """the policy to begin with: nano, or a checkpoint's folder or hub id; a server that is given must serve it"""
    server: str = ""
    """HOST:PORT of a running policy server with workers of its own; none given: both are started here"""
    admin: str = ""
    """HOST:PORT of that server's admin service"""
    iterations: int = 50
    minutes: float | None = None
    """wall time of the whole run; with iterations, whichever comes first"""
    rollouts: int = 32
    """episodes of an iteration"""
    group: int = 1
    """episodes that begin alike, for grpo and rloo; divides rollouts"""
    temperature: float = 1.0
    """of training episodes"""
    overlap: bool = False
    """collect the next iteration's episodes, with weights one update old, while this one is learned from"""
    evaluate_every: int = 10
    """iterations between two evaluations, greedy, on states that are never practised on; 0: none"""
    evaluate_split: str = "tune"
    evaluate_states: int = 0
    """of each task, the first so many of the split; 0: all"""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    reward_model: Path | None = None
    """what `python -m rl_trainer reward-model` has left; none given: success alone is rewarded"""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    lora_rank: int = 0
    """train an adapter of this rank; 0 trains all weights"""
    lora_alpha: float = 32.0
    processes: int = 2
    """simulator processes started here"""
    slots: int = 4
    """episodes interleaved in each"""
    coarse_practice: bool = False
    """training episodes are drawn with simplified meshes, in a third of the time; evaluations never are"""
    deterministic: bool = False
    """the server's answers do not depend on what shares their pass; with no overlap, a run can be repeated"""
    ranks: int = 1
    """data-parallel processes of the learner"""
    threads: int = 1
    """torch threads of each"""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in the model; masters are float32 always"""
    seed: int = 0
    resume: bool = False
    """go on from --out"""

    def __post_init__(self) -> None:
        for name in ("iterations", "rollouts", "group", "ranks", "threads", "processes", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.rollouts % self.group:
            raise ValueError(f"rollouts must be whole groups of {self.group}, got {self.rollouts}")
        if self.learner.advantage != "gae" and self.group < 2:
            raise ValueError(f"{self.learner.advantage} compares episodes that begin alike: group must be >= 2, got 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if bool(self.server) != bool(self.admin):
            raise ValueError(f"server and admin are given together, got {self.server!r} and {self.admin!r}")


BUDGET = ("iterations", "minutes", "resume", "out", "evaluate_every", "processes", "slots", "server", "admin")
"""What may differ between a run and its continuation."""


def train(config: TrainConfig) -> None:
    """Runs until the budget is spent."""
    _claim(config)
    with launched(config.ranks, _follow, config) as ranks:
        learner, checkpoint = _learner(config, ranks)
        with ExitStack() as stack:
            server, admin, check = stack.enter_context(_processes(config))
            run = Run(config, learner, checkpoint, server, admin, check)
            stack.callback(run.close)
            run.go()
            ranks.share(None)  # the other ranks may leave; after a failure they wait for something else, and are killed


def _claim(config: TrainConfig) -> None:
    """Makes the folder this run's own, or checks that it is the run to resume."""
    record, wanted = config.out / "train.json", json.loads(json.dumps(asdict(config), default=str))
    if config.resume:
        if not (config.out / STATE).exists():
            raise FileNotFoundError(f"{config.out / STATE}: there is no run to resume")
        before = json.loads(record.read_text())
        changed = [name for name in before if name not in BUDGET and before[name] != wanted.get(name)]
        if changed:
            differences = "; ".join(f"{name} was {before[name]!r}, got {wanted.get(name)!r}" for name in changed)
            raise ValueError(f"{config.out} holds another run: {differences}")
    elif record.exists():
        raise ValueError(f"{config.out} already holds a run: add --resume to go on with it, or choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted, indent=1))


def _learner(config: TrainConfig, ranks: Ranks) -> tuple[Learner, Checkpoint]:
    """The same on every rank."""
    torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.model, dtype=config.dtype, device=config.device)
    if config.lora_rank:
        checkpoint.model.requires_grad_(False)
        torch.manual_seed(config.seed)
        apply_lora(checkpoint.model, rank=config.lora_rank, alpha=config.lora_alpha)
    reference = None
    if config.learner.loss.reference_weight:
        reference = load_checkpoint(config.model, dtype=config.dtype, device=config.device).model
    critic = Critic(checkpoint.config.llm.hidden_size, seed=config.seed).to(config.device)
    learner = Learner(checkpoint.model, critic, config.learner, reference=reference, ranks=ranks, seed=config.seed)
    if config.resume:
        _, tensors = TrainState.load(config.out / STATE)
        learner.load(tensors)
    return learner, checkpoint


def _follow(ranks: Ranks, config: TrainConfig) -> None:
    """The life of every rank but the first."""
    learner, _ = _learner(config, ranks)
    while (work := ranks.share(None)) is not None:
        learner.update(*work)


@contextmanager
def _processes(config: TrainConfig) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Addresses of a server and its admin service, and a check that raises when what runs here cannot be kept alive."""
    if config.server:
        yield config.server, config.admin, lambda: None
        return
    port, admin = free_port(), free_port()
    server = f"127.0.0.1:{port}"
    serve = ["policy_server", "serve", "--model", config.model, "--port", str(port), "--admin-port", str(admin)]
    serve += ["--episodes", str(config.out / "episodes"), *(["--deterministic"] if config.deterministic else [])]
    work = ["sim", "worker", "--server", server, "--suites", config.suite]
    work += ["--processes", str(config.processes), "--slots", str(config.slots)]
    work += ["--coarse-practice"] if config.coarse_practice else []
    children = [
        Child(command[0], [sys.executable, "-m", *command], config.out / f"{command[0]}.log", on_loss=print)
        for command in (serve, work)
    ]
    with kept_alive(children) as check:
        yield server, f"127.0.0.1:{admin}", check


def catalogue(suite: str) -> dict:
    """What the simulator says about a suite: tasks (id -> instruction) and splits (name -> states)."""
    command = [sys.executable, "-m", "sim", "suites", "--json", "--suites", suite]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if answer.returncode:
        raise ValueError(f"`python -m sim suites` knows no suite {suite!r}: {answer.stderr.strip().splitlines()[-1]}")
    return json.loads(answer.stdout)[suite]


def cells_of(listed: dict, tasks: Sequence[int], split: str, first: int = 0) -> list[Cell]:
    """Every (task, initial state) of a split; with `first`, the first so many states of each task."""
    ids = list(listed["tasks"])
    if unknown := [task for task in tasks if task not in range(len(ids))]:
        raise ValueError(f"tasks must be in 0..{len(ids) - 1}, got {unknown}")
    if split not in listed["splits"]:
        raise ValueError(f"split must be one of {sorted(listed['splits'])}, got {split!r}")
    states = listed["splits"][split][: first or None]
    return [(ids[task], state) for task in tasks or range(len(ids)) for state in states]


class Run:
    """Rank 0's view of a run."""

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        checkpoint: Checkpoint,
        server: str,
        admin: str,
        check: Callable[[], None],
    ):
        self.config, self.learner, self.checkpoint, self._check = config, learner, checkpoint, check
        listed = catalogue(config.suite)
        self.curriculum = Curriculum(cells_of(listed, config.tasks, config.split), config.curriculum, seed=config.seed)
        self.held_out = cells_of(listed, config.tasks, config.evaluate_split, config.evaluate_states)
        if config.evaluate_every and (shared := {*self.curriculum.cells} & {*self.held_out}):
            raise ValueError(f"split and evaluate_split must not share states, both have {sorted(shared)[0]}")
        self.reader = TrajectoryReader(checkpoint.config, checkpoint.tokenizer)
        self.reward = None
        if config.reward_model is not None:
            self.reward = load_reward_model(config.reward_model, checkpoint.config, checkpoint.tokenizer)
        self.alarm = RewardAlarm(config.alarm)
        self.state = TrainState.fresh(config.out.name)
        if config.resume:
            self.state, _ = TrainState.load(config.out / STATE)
            self.curriculum.load(self.state.curriculum)
            self.alarm.load(self.state.alarm)
        self.queue = RolloutQueue(server, run=self.state.run, cursor=self.state.cursor)
        self.publisher = Publisher(server, admin, model=checkpoint.model, tokenizer=checkpoint.tokenizer)
        self.curve = Curve(config.out, first_step=self.learner.iteration + 1)
        self._began_s = time.monotonic() - self.state.seconds

    @property
    def seconds(self) -> float:
        """Wall time of the run, all its parts together."""
        return time.monotonic() - self._began_s

    def go(self) -> None:
        """Iterates until the budget is spent."""
        config = self.config
        self.publisher.begin(self.state.version)
        self.queue.commit()
        if not config.resume:
            if self._evaluation_due(0):
                self.evaluate()
            self._save()
        while self.learner.iteration < config.iterations and self.seconds < 60 * (config.minutes or float("inf")):
            self.iterate()
            if self._evaluation_due(self.learner.iteration):
                self.evaluate()
            self._save()
        self.queue.commit(leave=True)

    def iterate(self) -> None:
        """Collects, learns, publishes."""
        started_s = self.seconds
        if not self.state.asked:
            self._ask(self.learner.iteration)
        finished = self._collect(self.state.asked)
        self.state.asked = []
        coming = self.learner.iteration + 1
        if self.config.overlap and coming < self.config.iterations and not self._evaluation_due(coming):
            self._ask(coming)
        trajectories = self._trajectories(finished)
        collected_s = self.seconds
        # GRPO and RLOO add up a trajectory's rewards without a discount.
        gamma = self.config.learner.gamma if self.config.learner.advantage == "gae" else 1.0
        rewards = shaped_rewards(trajectories, self.reward, self.config.shaping, gamma=gamma)
        self.learner.ranks.share((trajectories, rewards))
        metrics = self.learner.update(trajectories, rewards, version=self.state.version)
        learned_s = self.seconds
        self.state.version = self.publisher.publish(
            self.state.version, note=f"{self.state.run} {self.learner.iteration}"
        )
        successes = [is_success(item) for item in finished if item.episode is not None]
        metrics |= {
            "success/train": sum(successes) / max(1, len(successes)),
            "return": float(np.mean([rewards_T.sum() for rewards_T in rewards])),
            "seconds/collect": collected_s - started_s,
            "seconds/learn": learned_s - collected_s,
            "seconds/publish": self.seconds - learned_s,
            "wall_clock_s": self.seconds,
            **{name: float(count) for name, count in self.state.counts.items()},
        }
        self.curve.add(self.learner.iteration, **metrics)
        if warning := self.alarm.observe(metrics["return"], metrics["success/train"]):
            print(warning, flush=True)
        print(
            f"iteration {self.learner.iteration}  success {sum(successes)}/{len(successes)}  "
            f"ratio {metrics['ratio']:.3f}  kl {metrics['approx_kl']:.4f}  entropy {metrics['entropy']:.3f}  "
            f"explained {metrics['explained_variance']:.2f}  gap {metrics['logprob_gap']:.1e}  version "
            f"{self.state.version}  {metrics['seconds/collect']:.0f} + {metrics['seconds/learn']:.0f} s",
            flush=True,
        )

    def evaluate(self) -> None:
        """Greedy success on states that are never practised on, with its Wilson interval."""
        name = f"evaluate-{self.learner.iteration}"
        rollouts = [
            self._rollout(name, number, cell, purpose=episode_pb2.PURPOSE_EVALUATE, temperature=0.0)
            for number, cell in enumerate(self.held_out)
        ]
        finished = self._collect(rollouts)
        successes = [is_success(item) for item in finished if item.episode is not None]
        if not successes:
            raise RuntimeError(f"every evaluation episode ended as an error, the first: {finished[0].errors}")
        interval = binomtest(sum(successes), len(successes)).proportion_ci(CONFIDENCE, method="wilson")
        rate = sum(successes) / len(successes)
        self.curve.add(
            self.learner.iteration,
            **{"success/evaluate": rate, "success/low": interval.low, "success/high": interval.high},
            **{"evaluated": len(successes), "evaluation_errors": len(finished) - len(successes)},
            **{name: float(count) for name, count in self.state.counts.items()},
        )
        print(
            f"iteration {self.learner.iteration}  greedy success on {self.config.evaluate_split}: {sum(successes)}/"
            f"{len(successes)} = {100 * rate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]",
            flush=True,
        )

    def _evaluation_due(self, iteration: int) -> bool:
        """Whether the policy is measured after so many iterations; nothing else is collected meanwhile."""
        return bool(self.config.evaluate_every) and iteration % self.config.evaluate_every == 0

    def close(self) -> None:
        """Lets go of the server; the curve is on disk already."""
        self.queue.close()
        self.publisher.close()
        self.curve.close()

    def _ask(self, iteration: int) -> None:
        """Chooses the rollouts of an iteration and enqueues them."""
        cells = self.curriculum.sample(self.config.rollouts // self.config.group, group=self.config.group)
        self.state.asked = [
            self._rollout(
                str(iteration), number, cell, purpose=episode_pb2.PURPOSE_TRAIN, temperature=self.config.temperature
            )
            for number, cell in enumerate(cells)
        ]
        self.queue.enqueue(self.state.asked)

    def _rollout(
        self, name: str, number: int, cell: Cell, *, purpose: episode_pb2.Purpose, temperature: float
    ) -> rollout_pb2.Rollout:
        rollout_id = f"{self.state.run}/{name}/{number}"
        return rollout_pb2.Rollout(
            rollout_id=rollout_id,
            task=cell[0],
            initial_state=cell[1],
            purpose=purpose,
            version=self.state.version,
            temperature=temperature,
            seed=seed_of(self.config.seed, name, number),
        )

    def _collect(self, rollouts: Sequence[rollout_pb2.Rollout]) -> list[Finished]:
        """What came of the rollouts, in their order."""
        self.queue.enqueue(rollouts)  # those that are known already stay as they are
        finished = dict[str, Finished]()
        for item in self.queue.finished(check=self._check):
            finished[item.rollout.rollout_id] = item
        self.state.cursor = self.queue.cursor
        return [finished[rollout.rollout_id] for rollout in rollouts]

    def _trajectories(self, finished: Sequence[Finished]) -> list[Trajectory]:
        """What may be learned from; tells the curriculum how it went, and counts."""
        trajectories, refused = list[Trajectory](), Counter[str]()
        for item in finished:
            if item.episode is None:
                refused["error"] += 1
                continue
            self.curriculum.observe(item.rollout.task, item.rollout.initial_state, is_success(item))
            self.state.counts["environment_steps"] += len(item.episode.ticks)
            self.state.counts["decisions"] += len(item.episode.decisions)
            self.state.counts["episodes"] += 1
            try:
                trajectories += self.reader.read(item.episode)
            except RefusedEpisode as error:
                refused[error.reason] += 1
        if refused:
            print(f"not learned from: {dict(refused)}", flush=True)
        if not trajectories:
            raise RuntimeError(f"no episode of the iteration can be learned from: {dict(refused)}")
        return trajectories

    def _save(self) -> None:
        """The checkpoint, then the cursor: the server may delete what the checkpoint has taken in."""
        self.state.seconds = self.seconds
        self.state.curriculum, self.state.alarm = self.curriculum.state(), self.alarm.state()
        self.state.save(self.config.out / STATE, self.learner.state())
        self.queue.commit()
        folder = self.config.out / "last"
        if self.config.lora_rank:
            save_lora(self.checkpoint.model, folder, base=str(self.config.model))
        else:
            save_checkpoint(folder, self.checkpoint.model, self.checkpoint.tokenizer)
        self.curve.plot(self.config.out / "curve.png", PANELS)


PANELS = {
    "success": ["success/train", "success/evaluate", "success/low", "success/high"],
    "divergence": ["approx_kl", "clip_fraction"],
    "critic": ["value", "explained_variance"],
    "seconds": ["seconds/collect", "seconds/learn", "seconds/publish"],
}


def is_success(item: Finished) -> bool:
    """Whether the rollout's episode succeeded."""
    return item.episode is not None and item.episode.end.outcome == episode_pb2.OUTCOME_SUCCESS


def seed_of(seed: int, name: str, number: int) -> int:
    """A rollout's own random stream: a function of the run's seed and the rollout's place in it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8], "big") >> 1
