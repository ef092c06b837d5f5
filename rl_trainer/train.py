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
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import numpy as np
import torch

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from policy_server.vla.derived import sharing
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla.model import VLA
from protos import episode_pb2, rollout_pb2
from protos.machine import cores
from rl_trainer.curriculum import Cell, Curriculum
from rl_trainer.devices import compute_device, find_machine
from rl_trainer.launch import RunServer, started_here
from rl_trainer.learner import Learner, left_out
from rl_trainer.live_view import LiveView
from rl_trainer.metrics import Curve
from rl_trainer.observer import Observer, Printer
from rl_trainer.placement import CUDA, Placement
from rl_trainer.placement import plan as place
from rl_trainer.publisher import Publisher
from rl_trainer.ranks import Ranks, launched, require_own_devices
from rl_trainer.report import Reporter
from rl_trainer.reward_alarm import RewardAlarm
from rl_trainer.reward_model import RewardModel, load_reward_model
from rl_trainer.rollouts import Finished, RolloutQueue
from rl_trainer.run_state import held, replaced
from rl_trainer.session_config import SessionConfig
from rl_trainer.shaping import shaped_rewards
from rl_trainer.suite import catalogue, cells_of
from rl_trainer.tally import scalars_of, tally_of
from rl_trainer.train_config import STATE, TrainConfig, claim
from rl_trainer.train_state import TrainState
from rl_trainer.trajectories import RefusedEpisode, Trajectory, TrajectoryReader


def train(config: TrainConfig) -> None:
    """Runs until the budget is spent."""
    placement = None if config.server else placed(config)
    config = claim(config)
    if placement:
        print(placement.table(), flush=True)
        os.environ.update(placement.learner.environment)  # before CUDA is asked for anything; other ranks inherit it
    require_own_devices(config.ranks, compute_device(config.device))
    with held(config.out), launched(config.ranks, follow, config) as ranks:
        learner, checkpoint = make_learner(config, ranks)
        with ExitStack() as stack:
            server, check = config.given_server, lambda: None
            if placement:
                started = started_here(
                    placement,
                    config.out,
                    model=config.model,
                    unnorm_key=config.unnorm_key,
                    dtype=config.dtype,
                    suite=config.suite,
                    slots=config.slots,
                    coarse_practice=config.coarse_practice,
                    deterministic=config.deterministic,
                )
                server, check = stack.enter_context(started)
            run = Run(config, learner, checkpoint, server, check, _observers(config, checkpoint.config.camera))
            stack.callback(run.close)
            run.go()
            ranks.share(None)  # the other ranks may leave; after a failure they wait for something else, and are killed


def placed(config: TrainConfig, *, memory_gb: float | None = None) -> Placement:
    """Where the run's processes go on this machine.  Raises ValueError when memory holds no scene.

    memory_gb: as if it had so many GiB.
    """
    machine = find_machine()
    return place(
        machine if memory_gb is None else replace(machine, memory_gb=memory_gb),
        processes=config.processes,
        visible=os.environ.get(CUDA),
        mujoco_gl=os.environ.get("MUJOCO_GL", ""),
        render_on_learner=config.render_on_learner,
        learner_on_cpu=config.device == "cpu",
    )


def _observers(config: TrainConfig, camera: str) -> list[Observer]:
    """A report in any case; on a terminal a live view, elsewhere lines."""
    shown = Printer(split=config.evaluate_split)
    if sys.stdout.isatty():
        shown = LiveView(
            f"{config.suite} in {config.out}",
            iterations=config.iterations,
            minutes=config.minutes,
            evaluate_every=config.evaluate_every,
            split=config.evaluate_split,
        )
    return [shown, Reporter(config.out, camera=camera)]


def make_learner(config: TrainConfig, ranks: Ranks) -> tuple[Learner, Checkpoint]:
    """The same on every rank."""
    torch.set_num_threads(config.threads)
    device = compute_device(config.device)
    checkpoint, reference = load_checkpoint(config.model, dtype=config.dtype, device=device), None
    if config.lora_rank:
        reference = begin_adapter(checkpoint.model, config)
    else:
        if config.freeze_vision:
            checkpoint.model.freeze_vision()
        if config.learner.loss.reference_weight:
            reference = load_checkpoint(config.model, dtype=config.dtype, device=device).model
    learner = Learner(checkpoint.model, config.learner, reference=reference, ranks=ranks, seed=config.seed)
    if config.resume:
        _, tensors = TrainState.load(config.out / STATE)
        learner.load(tensors)
    return learner, checkpoint


def begin_adapter(model: VLA, config: TrainConfig | SessionConfig) -> VLA | None:
    """Gives the model a fresh adapter.  Returns the policy to hold on to, if any: the base, which stays as it is."""
    reference = sharing(model, model.state_dict()) if config.learner.loss.reference_weight else None
    torch.manual_seed(config.seed)
    apply_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, vision=not config.freeze_vision)
    return reference


def reward_of(config: TrainConfig | SessionConfig, checkpoint: Checkpoint) -> RewardModel | None:
    """What judges the policy's observations, where there is such a model; on the learner's device."""
    if config.reward_model is None:
        return None
    config.shaping.check_labels(config.reward_model)
    return load_reward_model(
        config.reward_model,
        checkpoint.config,
        checkpoint.tokenizer,
        unnorm_key=config.unnorm_key,
        device=compute_device(config.device),
        dtype=config.dtype,
    )


def follow(ranks: Ranks, config: TrainConfig) -> None:
    """The life of every rank but the first."""
    learner, _ = make_learner(config, ranks)
    while (work := ranks.share(None)) is not None:
        learner.update(*work)


class NothingDone(RuntimeError):
    """All that workers were asked for ended as errors, or as what nothing can be learned from."""


class Run:
    """Rank 0's view of a run."""

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        checkpoint: Checkpoint,
        server: RunServer,
        check: Callable[[], None],
        observers: Sequence[Observer] = (),
    ):
        self.config, self.learner, self.checkpoint, self._check = config, learner, checkpoint, check
        self.observers = observers
        listed = catalogue(config.suite)
        self.curriculum = Curriculum(cells_of(listed, config.tasks, config.split), config.curriculum, seed=config.seed)
        self.held_out = cells_of(listed, config.tasks, config.evaluate_split, config.evaluate_states)
        if config.evaluate_every and (shared := {*self.curriculum.cells} & {*self.held_out}):
            raise ValueError(f"split and evaluate_split must not share states, both have {sorted(shared)[0]}")
        self.instructions = {task: listed["tasks"][task] for task, _ in [*self.curriculum.cells, *self.held_out]}
        self.reader = TrajectoryReader(checkpoint.config, checkpoint.tokenizer, unnorm_key=config.unnorm_key)
        self.reward = reward_of(config, checkpoint)
        self.alarm = RewardAlarm(config.alarm)
        self.state = TrainState.fresh(config.out.name)
        if config.resume:
            self.state, _ = TrainState.load(config.out / STATE)
            self.curriculum.load(self.state.curriculum)
            self.alarm.load(self.state.alarm)
        self.queue = RolloutQueue(
            server.address, run=self.state.run, credentials=server.credentials, cursor=self.state.cursor
        )
        self.publisher = Publisher(
            server.address,
            server.admin_address,
            model=checkpoint.model,
            tokenizer=checkpoint.tokenizer,
            credentials=server.credentials,
            admin_credentials=server.admin_credentials,
        )
        self.curve = Curve(config.out, first_step=self.learner.iteration + 1, but=self._unsure)
        self._began_s = time.monotonic() - self.state.seconds

    @property
    def seconds(self) -> float:
        """Wall time of the run, all its parts together."""
        return time.monotonic() - self._began_s

    def go(self) -> None:
        """Iterates until the budget is spent."""
        config = self.config
        self._tell(lambda o: o.on_start(self.instructions, self.curve.rows, self.seconds))
        if config.server_sleeps:
            self.publisher.wake_server()  # whoever was killed while it slept has not
        self.publisher.begin(self.state.version)
        self._save()  # the run has its name on disk before anything is asked for in it
        if config.resume:
            self.queue.forgive()
        self._measure()
        while self.learner.iteration < config.iterations and self.seconds < 60 * (config.minutes or float("inf")):
            self.iterate()
            self._save()
            self._measure()
        if self.state.asked:  # time is up while workers have the next iteration's: a continuation asks for them again
            self.queue.cancel()
        self.queue.commit(leave=not self.state.asked)

    def iterate(self) -> None:
        """Collects, learns, publishes."""
        started_s = self.seconds
        if not self.state.asked:
            self._ask(self.learner.iteration)
        self._tell(lambda o: o.on_phase("collect", len(self.state.asked)))
        finished = self._collect(self.state.asked)
        self.state.asked, self.state.measured = [], False
        coming = self.learner.iteration + 1
        if self.config.overlap and coming < self.config.iterations and not self._evaluation_due(coming):
            self._ask(coming)
        self.queue.forget_unasked()
        trajectories = self._trajectories(finished)
        collected_s = self.seconds
        self._tell(lambda o: o.on_phase("learn"))
        gamma = self.config.learner.reward_gamma
        rewards = shaped_rewards(trajectories, self.reward, self.config.shaping, gamma=gamma)
        with self.publisher.server_asleep() if self.config.server_sleeps else nullcontext():
            self.learner.ranks.share((trajectories, rewards))
            metrics = self.learner.update(trajectories, rewards, version=self.state.version)
        learned_s = self.seconds
        self._tell(lambda o: o.on_phase("publish"))
        ages = [self.state.age(version) for trajectory in trajectories for version in trajectory.version_T]
        self._publish()
        metrics |= {
            "staleness": float(np.mean(ages)),
            "success/train": tally_of(finished).rate,
            "return": float(np.mean([rewards_T.sum() for rewards_T in rewards])),
            "seconds/collect": collected_s - started_s,
            "seconds/learn": learned_s - collected_s,
            "seconds/publish": self.seconds - learned_s,
            **{f"probability/{task}": share for task, share in self.curriculum.task_probabilities.items()},
            **scalars_of(finished, "train"),
        }
        alarm = self.alarm.observe(metrics["return"], metrics["success/train"])
        row = self.curve.add(self.learner.iteration, **metrics, reward_alarm=float(bool(alarm)), **self._spent())
        for warning in (left_out(metrics), alarm):
            if warning:
                self._tell(lambda o, warning=warning: o.on_note(warning))
        self._tell(lambda o: o.on_iteration(row))

    def _publish(self) -> None:
        """The weights as they are, to be practised with, and their average, if there is one, for everybody else."""
        note, averaged = f"{self.state.run} {self.learner.iteration}", self.config.learner.average > 0
        self.state.versions.append(self.publisher.publish(self.state.version, note=note, live=not averaged))
        self.state.released = self.state.version
        if averaged:
            with self.learner.averaged():
                self.state.released = self.publisher.publish(self.state.version, note=f"{note}, averaged")

    def evaluate(self) -> None:
        """Greedy success of what is released, on states that are never practised on, with its Wilson interval.

        The best so far is kept; of several that did as well, the latest.
        """
        name, purpose = f"evaluate-{self.learner.iteration}", episode_pb2.PURPOSE_EVALUATE
        rollouts = [
            self._rollout(name, number, cell, version=self.state.released, purpose=purpose)
            for number, cell in enumerate(self.held_out)
        ]
        started_s = self.seconds
        self._tell(lambda o: o.on_phase("evaluate", len(rollouts)))
        finished = self._collect(rollouts)
        tally = tally_of(finished)
        if not tally.episodes:
            raise NothingDone(f"every evaluation episode ended as an error, the first: {finished[0].errors}")
        if all(tally.rate >= row["success/evaluate"] for row in self.curve.rows if "success/evaluate" in row):
            self._save_policy("best")
        low, high = tally.interval
        row = self.curve.add(
            self.learner.iteration,
            **{"success/evaluate": tally.rate, "success/low": low, "success/high": high},
            **{"evaluated": tally.episodes, "evaluation_errors": len(finished) - tally.episodes},
            **{"optimiser_steps": self.learner.steps, "seconds/evaluate": self.seconds - started_s},
            **scalars_of(finished, "evaluate"),
            **self._spent(),
        )
        self._tell(lambda o: o.on_evaluation(row, finished))

    def _measure(self) -> None:
        """Evaluates where that is due and was not done yet."""
        if self._evaluation_due(self.learner.iteration) and not self.state.measured:
            self.evaluate()
            self.state.measured = True
            self._save()

    def _unsure(self, row: Mapping[str, float]) -> bool:
        """Whether a row of the curve is an evaluation that the state does not know of: it is done again."""
        return "success/evaluate" in row and row["step"] == self.learner.iteration and not self.state.measured

    def _evaluation_due(self, iteration: int) -> bool:
        """Whether the policy is measured after so many iterations; nothing else is collected meanwhile."""
        return bool(self.config.evaluate_every) and iteration % self.config.evaluate_every == 0

    def close(self) -> None:
        """Lets go of the server; the curve is on disk already."""
        self.queue.close()
        self.publisher.close()
        self.curve.close()
        self._tell(lambda o: o.close())

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            tell(observer)

    def _spent(self) -> dict[str, float]:
        """What a row of the curve says about the run so far."""
        counts = {name: float(self.state.counts[name]) for name in ("environment_steps", "decisions", "episodes")}
        return counts | {"wall_clock_s": self.seconds, "version": float(self.state.version)}

    def _ask(self, iteration: int) -> None:
        """Chooses the rollouts of an iteration and enqueues them."""
        cells = self.curriculum.sample(self.config.rollouts // self.config.group, group=self.config.group)
        noise = {"temperature": self.config.temperature, "noise_correlation": self.config.noise_correlation}
        how = {"version": self.state.version, "purpose": episode_pb2.PURPOSE_TRAIN, **noise}
        self.state.asked = [self._rollout(str(iteration), number, cell, **how) for number, cell in enumerate(cells)]
        self.queue.enqueue(self.state.asked)

    def _rollout(
        self,
        name: str,
        number: int,
        cell: Cell,
        *,
        version: int,
        purpose: episode_pb2.Purpose,
        temperature: float = 0.0,
        noise_correlation: float = 0.0,
    ) -> rollout_pb2.Rollout:
        """Greedy unless told otherwise."""
        rollout_id = f"{self.state.run}/{name}/{number}"
        return rollout_pb2.Rollout(
            rollout_id=rollout_id,
            task=cell[0],
            initial_state=cell[1],
            purpose=purpose,
            version=version,
            seed=seed_of(self.config.seed, name, number),
            temperature=temperature,
            noise_correlation=noise_correlation,
        )

    def _collect(self, rollouts: Sequence[rollout_pb2.Rollout]) -> list[Finished]:
        """What came of the rollouts, in their order."""
        self.queue.enqueue(rollouts)  # those that are known already stay as they are
        finished = dict[str, Finished]()
        for item in self.queue.finished(check=self._check):
            finished[item.rollout.rollout_id] = item
            self._tell(lambda o, item=item: o.on_rollout(item))
        return [finished[rollout.rollout_id] for rollout in rollouts]

    def _trajectories(self, finished: Sequence[Finished]) -> list[Trajectory]:
        """What may be learned from; tells the curriculum how it went, and counts."""
        trajectories, refused = list[Trajectory](), Counter[str]()
        with ThreadPoolExecutor(cores()) as pool:  # images, most of it, do not hold Python's lock
            read = list(pool.map(self._read, finished))
        for item, found in zip(finished, read, strict=True):
            if item.episode is not None:
                self.curriculum.observe(item.rollout.task, item.rollout.initial_state, item.success)
                self.state.counts["environment_steps"] += len(item.episode.ticks)
                self.state.counts["decisions"] += len(item.episode.decisions)
                self.state.counts["episodes"] += 1
            if isinstance(found, str):
                refused[found] += 1
            else:
                trajectories += found
        if refused:
            self._tell(lambda o: o.on_note(f"not learned from: {dict(refused)}"))
        if not trajectories:
            raise NothingDone(f"no episode of the iteration can be learned from: {dict(refused)}")
        return trajectories

    def _read(self, item: Finished) -> list[Trajectory] | str:
        """An episode's trajectories, or why nothing can be learned from it."""
        if item.episode is None:
            return "error"
        try:
            return self.reader.read(item.episode)
        except RefusedEpisode as error:
            return error.reason

    def _save(self) -> None:
        """The checkpoint, then the cursor: the server may delete what the checkpoint has taken in."""
        self._tell(lambda o: o.on_phase("save"))
        self.state.seconds, self.state.cursor = self.seconds, self.queue.cursor
        self.state.curriculum, self.state.alarm = self.curriculum.state(), self.alarm.state()
        self.state.save(self.config.out / STATE, self.learner.state())
        self.queue.commit()
        self._save_policy("last")
        self._tell(lambda o: o.on_save())

    def _save_policy(self, name: str) -> None:
        """What is released, as a checkpoint or an adapter that a server can be given."""
        with self.learner.averaged(), replaced(self.config.out / name) as folder:
            if self.config.lora_rank:
                save_lora(self.checkpoint.model, folder, base=str(self.config.model))
            else:
                save_checkpoint(folder, self.checkpoint.model, self.checkpoint.tokenizer)


def seed_of(seed: int, name: str, number: int) -> int:
    """A rollout's own random stream: a function of the run's seed and the rollout's place in it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8], "big") >> 1
