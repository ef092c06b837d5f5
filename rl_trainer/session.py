"""A session: test-time fine-tuning on the robots in front of you, `python -m rl_trainer session start`.

    while the budget lasts:
        robots play episodes, with the session's live version or, by chance, with the candidate     (the server)
        finished episodes come in; their successes and their helpers' corrections become lessons
        enough is new: PPO and lessons make new weights                                               (learner.py)
        nothing is on trial: they are published with proof, and offered                               (publisher.py)
        the gate promotes them or not                                                                 (the server)

A trial takes many episodes, and the learner goes on meanwhile: what it offers next is ahead of what was tried.  After
a roll back or a refusal it begins again at the live version.  The state is saved after each update, before each offer
and after each verdict; what came in since then is read again by a trainer that was killed.  Until then the server
deletes no episode that an update may still use.  Lessons of older ones are read again too, as far as it has those.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import torch
from safetensors.torch import load_file

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.lora import WEIGHTS, load_lora, lora_tensors, merge_lora, save_lora
from protos import episode_pb2, rollout_pb2, session_pb2
from protos.episode_file import HELPERS, Episode
from rl_trainer.curriculum import Curriculum
from rl_trainer.devices import compute_device
from rl_trainer.learner import Learner, left_out
from rl_trainer.lessons import Lesson, Lessons, interventions, successes
from rl_trainer.metrics import Curve
from rl_trainer.patience import Refusal
from rl_trainer.publisher import Publisher
from rl_trainer.rollout_client import Idleness
from rl_trainer.run_state import differences, held, keep_record, load_state, replaced, save_state
from rl_trainer.session_client import SessionClient
from rl_trainer.session_config import SessionConfig
from rl_trainer.session_report import film, write_session_report
from rl_trainer.shaping import shaped_rewards
from rl_trainer.suite import catalogue, cells_of
from rl_trainer.tally import Tally
from rl_trainer.train import begin_adapter, reward_of
from rl_trainer.trajectories import RefusedEpisode, Trajectory, TrajectoryReader

STATE, RECORD, VERSIONS = "session.safetensors", "session.json", "versions"
FREE = ("at", "budget_episodes", "budget_minutes", "resume", "out", "ahead")
"""What may differ between a session and its continuation."""
EVENT = ("unix_ns", "what", "version", "by", "reason")
"""What is kept of a line of the session's log."""
POLL_S = 0.5
VERDICT_S = 600.0
"""When the budget is spent: longest that a verdict is waited for after the last episode came in."""
VERDICTS = ("promote", "roll back", "undecided", "withdrawn", "refuse")
KEPT = ("promote", "undecided", "withdrawn")
"""Verdicts after which the learner goes on from where it is."""
LATER = (grpc.StatusCode.FAILED_PRECONDITION,)
"""An offer that is refused so is made again: the session was paused, or there is nothing to compare on yet."""
NEVER = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
"""One that is refused so is given up: the version is gone from the server, or is not what was proved."""
UNNAMED = -1
"""The version of weights that were not published."""


@dataclass(kw_only=True)
class SessionState:
    """All that is not in the learner's tensors."""

    version: int
    """what the learner's weights are, as the server numbers them; or UNNAMED"""
    live: int
    """the session's live version, when it was last looked at"""
    first: int
    """number of the last episode before the session"""
    cursor: int
    """of the last one that was taken in"""
    candidate: int | None = None
    """offered, or about to be; its verdict is not known yet"""
    fingerprint: str = ""
    """of the candidate, as it was proved"""
    pool: dict[str, int] = field(default_factory=dict)
    """number of an episode that may be learned from -> updates that it had part in"""
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    """episodes, successes without help, rollouts, updates; settled: updates at the last offer or return"""
    curriculum: dict[str, Any] = field(default_factory=dict)


def train_session(config: SessionConfig) -> None:
    """Runs until the session is stopped, or the budget spent: its robots then go on with the live version."""
    torch.set_num_threads(config.threads)
    with held(config.out):
        run = SessionRun(config)
        try:
            run.go()
        finally:
            run.close()


def claim(config: SessionConfig) -> SessionConfig:
    """Makes the folder this session's own, or checks that it is the one to resume; gives what to do.

    A session keeps its id, wherever its folder is moved.  Raises ValueError.
    """
    if config.resume != (config.out / STATE).exists():
        raise ValueError(f"{config.out} holds {'no session to resume' if config.resume else 'a session: add --resume'}")
    begun_as = json.loads((config.out / RECORD).read_text())["session"] if config.resume else ""
    config = replace(config, session=config.session or begun_as or config.session_id)
    if config.resume and (changed := differences(config.out / RECORD, config, but=FREE)):
        raise ValueError(f"{config.out} holds another session: {changed}")
    keep_record(config.out / RECORD, config, unsaid=("at",))
    return config


class SessionRun:
    """The trainer of one session."""

    def __init__(self, config: SessionConfig):
        self.config = config = claim(config)
        self.name, server = config.session, config.at.run_server
        self.learner, self.checkpoint = make_learner(config)
        self.client = SessionClient(server)
        self.publisher = Publisher(
            server.address,
            server.admin_address,
            model=self.checkpoint.model,
            tokenizer=self.checkpoint.tokenizer,
            credentials=server.credentials,
            admin_credentials=server.admin_credentials,
        )
        self.reader = TrajectoryReader(
            self.checkpoint.config,
            self.checkpoint.tokenizer,
            unnorm_key=config.unnorm_key,
            limit_ends=True,  # as the gate counts
        )
        self.reward = reward_of(config, self.checkpoint)
        self.curriculum = None
        if config.suite:
            cells = cells_of(catalogue(config.suite), config.tasks, config.split)
            self.curriculum = Curriculum(cells, config.curriculum, seed=config.seed)
        self._idleness, self._set_aside = Idleness(server.address), set[str]()
        self.lessons = Lessons(config.lesson_capacity)
        self._trajectories: dict[str, list[Trajectory]] = {}
        """of the episodes in the pool"""
        self.publisher.begin(config.base_version)
        self.state = self._begin()
        self.curve = Curve(config.out, first_step=self.state.counts["updates"] + 1)
        self._began_s = time.monotonic() - self.state.seconds
        self._heard_s = time.monotonic()
        """when an episode came in last"""
        self._save()

    @property
    def seconds(self) -> float:
        """Wall time of the session, all its parts together."""
        return time.monotonic() - self._began_s

    @property
    def is_over(self) -> bool:
        """The budget is spent."""
        config = self.config
        return self.state.counts["episodes"] >= config.budget_episodes or self.seconds > 60 * (
            config.budget_minutes or float("inf")
        )

    def go(self) -> None:
        """Until the budget is spent, or the session stopped."""
        print(f"session {self.name}: robots join with --session {self.name}", flush=True)
        while self.step():
            time.sleep(POLL_S)
        if self.curriculum is not None:
            self.client.rollouts.cancel(self.name)
        self._tell_the_end()
        self.client.rollouts.keep_after(self.name, self.state.cursor, leave=True)

    def step(self) -> bool:
        """Looks at the session and does what is due; False when it is over.

        When the budget is spent, workers go on until what is on trial has its verdict, as long as their episodes come
        in; robots are not waited for.
        """
        session, over = self.client.get(self.name), self.is_over
        self._heed(session)
        awaited = self.state.candidate is not None and self.curriculum is not None
        awaited &= time.monotonic() - self._heard_s < VERDICT_S
        if session.state == session_pb2.SESSION_STATE_STOPPED or (over and not awaited):
            return False
        if session.state == session_pb2.SESSION_STATE_RUNNING:
            self._ask_for_practice()
            self._take_in()
            if over:
                return True
            if self._new >= self.config.update_every:
                self.improve()
            if self._due:
                self._put_forward()
        return True

    def improve(self) -> None:
        """An update from what came in."""
        state, numbers = self.state, list(self.state.pool)
        trajectories = [trajectory for number in numbers for trajectory in self._trajectories[number]]
        steps = self.learner.steps
        metrics = self.learner.update(trajectories, self._rewards(trajectories), self.lessons, version=state.version)
        for number in numbers:
            state.pool[number] += 1
            if state.pool[number] >= self.config.reuse:
                del state.pool[number], self._trajectories[number]
        state.counts["updates"] += 1
        self.curve.add(state.counts["updates"], **metrics, **self._spent())
        if warning := left_out(metrics):
            print(warning, flush=True)
        if self.learner.steps > steps:  # while the critic warms up the policy is the same
            state.version = UNNAMED
        self._save()

    def close(self) -> None:
        self.client.close()
        self.publisher.close()
        self.curve.close()

    def _begin(self) -> SessionState:
        """Where the session stands: begun now, or found."""
        if self.config.resume:
            fields, tensors = load_state(self.config.out / STATE)
            self.learner.load(tensors)
            state = SessionState(counts=Counter(fields.pop("counts")), **fields)
            if self.curriculum is not None:
                self.curriculum.load(state.curriculum)
            self._read_again(state)
            return state
        newest = self.client.newest(self.name)
        self.client.start(self.config.request)
        session = self.client.get(self.name)
        if session.log:
            raise ValueError(
                f"session {self.name!r} has a history already, of which this folder knows nothing (live is version"
                f" {session.live_version}): resume from the folder of its trainer, or give --session another name"
            )
        state = SessionState(version=self.config.base_version, live=session.live_version, first=newest, cursor=newest)
        self._keep_weights(self.config.base_version)
        return state

    def _read_again(self, state: SessionState) -> None:
        """The lessons and the pool of a trainer that was killed."""
        for number, episode in self.client.all_episodes(self.name, state.first):
            if number > state.cursor:
                break
            self._learn_from(str(number), episode, pooled=str(number) in state.pool)
        state.pool = {number: uses for number, uses in state.pool.items() if number in self._trajectories}

    def _heed(self, session: session_pb2.Session) -> None:
        """What became of the candidate, and what people did."""
        state = self.state
        tried = session.candidate_version if session.HasField("candidate_version") else None
        if state.candidate is not None and tried != state.candidate:
            events = [e for e in session.log if e.version == state.candidate and e.what in VERDICTS]
            if not events:  # killed between publishing and offering, or paused then
                if session.state == session_pb2.SESSION_STATE_RUNNING:
                    self._offer()
                return
            verdict = events[-1]
            print(f"version {verdict.version}: {verdict.what} ({verdict.by}): {verdict.reason}", flush=True)
            if verdict.what not in KEPT:
                self._become(session.live_version)
            elif verdict.what == "promote":
                state.live = state.candidate
            state.candidate = None
            self._save()
            self._report()
        if session.live_version != state.live:  # by a person's word
            self._become(session.live_version)
            state.live = session.live_version
            self._save()

    def _put_forward(self) -> None:
        """The learner's weights are published, and offered."""
        state = self.state
        note = f"session {self.name} {state.counts['updates']}"
        state.counts["settled"] = state.counts["updates"]
        state.version = state.candidate = self.publisher.publish(state.live, note=note, live=False)
        assert self.publisher.proof is not None
        state.fingerprint = self.publisher.proof.fingerprint
        self._keep_weights(state.version)
        self._save()
        self._offer()

    def _offer(self) -> None:
        """The candidate, if there is one; what came of it is in the session's log."""
        if self.state.candidate is None:
            return
        try:
            reply = self.client.offer(self.name, self.state.candidate, self.state.fingerprint)
        except Refusal as error:
            if error.code not in (*LATER, *NEVER):
                raise
            print(f"version {self.state.candidate} is not offered: {error}", flush=True)
            if error.code in NEVER:
                self.state.version, self.state.candidate = UNNAMED, None
                self._save()
            return
        became = "on trial" if reply.accepted else "refused"
        print(f"version {self.state.candidate} is {became}: {reply.reason}", flush=True)

    def _take_in(self) -> None:
        """Episodes that have ended since."""
        newest, episodes = self.client.episodes(self.name, self.state.cursor)
        if episodes:
            self._heard_s = time.monotonic()
        for number, episode in episodes:
            success = episode.end.outcome == episode_pb2.OUTCOME_SUCCESS
            own = success and not any(tick.source in HELPERS for tick in episode.ticks)  # as the gate counts
            self.state.counts["episodes"] += 1
            self.state.counts["successes"] += own
            if self.curriculum is not None and episode.start.rollout_id:
                self.curriculum.observe(episode.start.task, episode.start.initial_state, own)
            self._learn_from(str(number), episode, pooled=True)
            film(self.config.out / "report", episode, success=success, camera=self.checkpoint.config.camera)
            if str(number) in self._trajectories:
                self.state.pool[str(number)] = 0
        self.state.cursor = newest

    def _learn_from(self, number: str, episode: Episode, *, pooled: bool) -> None:
        """Its lessons are remembered, and its trajectories where it is in the pool: none, if others drove all of it."""
        taught, trajectories = list[Lesson](), list[Trajectory]()
        try:
            taught = interventions(episode, self.reader)
            trajectories = self.reader.read(episode)
        except RefusedEpisode as error:
            if not taught or not self.config.learner.intervention_weight:
                print(f"not learned from: {error}", flush=True)
                return
        self.lessons.add([*taught, *successes(trajectories)])
        if pooled:
            self._trajectories[number] = trajectories

    @property
    def _new(self) -> int:
        """Episodes that no update has seen."""
        return sum(uses == 0 for uses in self.state.pool.values())

    @property
    def _due(self) -> bool:
        """Nothing is on trial, and the learner is far enough ahead of what was."""
        state = self.state
        ahead = state.counts["updates"] - state.counts["settled"]
        return state.candidate is None and state.version == UNNAMED and ahead >= self.config.offer_every

    def _rewards(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
        return shaped_rewards(
            trajectories,
            self.reward,
            self.config.shaping,
            gamma=self.config.learner.reward_gamma,
            outcome=self.config.reward != "process",
        )

    def _ask_for_practice(self) -> None:
        """Workers have something to do."""
        if self.curriculum is None:
            return
        queue = self.client.rollouts.status(self.name)
        self._idleness.look(queue)
        for error in [aside.errors[-1] for aside in queue.set_aside]:
            if error not in self._set_aside:
                print(f"practice is set aside that failed whenever it was tried: {error}", flush=True)
                self._set_aside.add(error)
        missing = self.config.ahead - queue.waiting - queue.leased
        if missing <= 0:
            return
        first = self.state.counts["rollouts"]
        self.state.counts["rollouts"] += missing
        self.client.rollouts.enqueue(
            [
                rollout_pb2.Rollout(
                    rollout_id=f"{self.name}/{first + number}",
                    task=task,
                    initial_state=initial_state,
                    purpose=episode_pb2.PURPOSE_TRAIN,
                    session_id=self.name,
                )
                for number, (task, initial_state) in enumerate(self.curriculum.sample(missing))
            ]
        )

    def _become(self, version: int) -> None:
        """The learner goes back to a version of the session."""
        path = self.config.out / VERSIONS / str(version) / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(f"{path}: version {version} became live, but this trainer has not made it")
        matrices = lora_tensors(self.checkpoint.model)
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                matrices[name].copy_(tensor)
        self.learner.policy_optimizer.begin_again()
        self.state.version = version
        self.state.counts["settled"] = self.state.counts["updates"]

    def _keep_weights(self, version: int) -> None:
        with replaced(self.config.out / VERSIONS / str(version)) as folder:
            save_lora(self.checkpoint.model, folder, base=self.config.model)

    def _save(self) -> None:
        self.state.seconds = time.monotonic() - self._began_s
        if self.curriculum is not None:
            self.state.curriculum = self.curriculum.state()
        fields = asdict(self.state) | {"counts": dict(self.state.counts)}
        save_state(self.config.out / STATE, fields, self.learner.state())
        needed = min([self.state.cursor + 1, *map(int, self.state.pool)])
        self.client.rollouts.keep_after(self.name, needed - 1)

    def _spent(self) -> dict[str, float]:
        tally = Tally(self.state.counts["successes"], self.state.counts["episodes"])
        return {
            "episodes": float(tally.episodes),
            "successes": float(tally.successes),
            "wall_clock_s": self.seconds,
            "version": float(self.state.version),
        }

    def _report(self) -> session_pb2.Session:
        """Writes it from how the session stands now."""
        session = self.client.get(self.name, with_episodes=True)
        write_session_report(self.config.out, session, self.seconds)
        return session

    def _tell_the_end(self) -> None:
        self._save()
        session = self._report()
        log = [{name: getattr(event, name) for name in EVENT} for event in session.log]
        (self.config.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
        adapter = self.config.out / VERSIONS / str(session.live_version)
        print(f"version {session.live_version} is live; its adapter is {adapter}", flush=True)


def make_learner(config: SessionConfig) -> tuple[Learner, Checkpoint]:
    """An adapter to be trained, equal to the base version."""
    how = {"dtype": config.dtype, "device": compute_device(config.device)}
    checkpoint, reference = load_checkpoint(config.model, **how), None
    if config.adapter is None:
        reference = begin_adapter(checkpoint.model, config)
    else:
        load_lora(checkpoint.model, config.adapter)
        if config.freeze_vision:
            checkpoint.model.freeze_vision()
        if config.learner.loss.reference_weight:
            reference = load_checkpoint(config.model, **how).model
            load_lora(reference, config.adapter)
            merge_lora(reference)
    learner = Learner(checkpoint.model, config.learner, reference=reference, seed=config.seed)
    if config.critic is not None and not config.resume:
        _, tensors = load_state(config.critic)
        critic = {name.removeprefix("critic."): t for name, t in tensors.items() if name.startswith("critic.")}
        learner.critic_optimizer.load(critic)
    return learner, checkpoint
