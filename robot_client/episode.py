"""One episode of one arm: look, decide, move, tick by tick.

    tick()   one tick of real time; never blocks: without an answer the arm holds
    look()   reads the arm, takes in an answer, asks for the next one
    move()   executes one tick

Drivers (robot_client/drivers.py) give the rhythm.  An ArmError, or a PolicyError after which asking is useless, ends
the episode as an error; anything else is a bug and is raised.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from protos import episode_pb2
from robot_client.answer import Answer
from robot_client.arm import Arm, ArmState, Observation, Outcome
from robot_client.chunks import Chunks, Overlap, ticks_ahead
from robot_client.client import Client, Opened
from robot_client.decisions import Decisions
from robot_client.errors import ArmError, PolicyError, SpecMismatch
from robot_client.observer import Observer
from robot_client.pilot import Pilot, Wish
from robot_client.rollout import EpisodeResult, Rollout
from robot_client.safety import SafetyGate
from robot_client.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """How an arm follows a policy."""

    ahead_ticks: int | None = 0
    """Ask for the next chunk when so many actions remain; 0 asks when the chunk is exhausted, and holds until it is
    there, as a policy is trained; None asks as long before as the latest answers took (in lockstep, where no time
    passes, latency_ticks), and then the arm has moved on from what the policy saw."""
    overlap: Overlap = "latest"
    """Asked ahead, whose action is executed where two chunks have one: the older one's (in_order), the newer one's
    (latest), or a mean (blend), from which nothing can be learned."""
    replan_after: int = 0
    """Execute only the first so many actions of each chunk; 0 executes all."""
    latency_ticks: int = 0
    """Lockstep only: an answer is followed so many ticks after its observation, as over a slow network."""
    max_age_s: float = 1.0
    """Real time only: the oldest observation that may be acted on."""
    frozen_after: int = 3
    """Real time only: so many observations with one capture time are a frozen camera; 0 switches the rule off."""

    def __post_init__(self) -> None:
        for name in ("ahead_ticks", "replan_after", "latency_ticks", "frozen_after"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_age_s <= 0:
            raise ValueError(f"max_age_s must be above 0, got {self.max_age_s}")


NOTHING = Wish()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why an episode is over."""

    outcome: Outcome
    terminal: bool = False
    message: str = ""
    arm_failed: bool = False
    refused: bool = False


class Episode:
    """start() resets the arm and opens the episode, look() and move() drive it, end() closes it at the server.

    Raises SpecMismatch when the policy cannot drive the arm, or not in the configured way.
    """

    def __init__(
        self,
        arm: Arm,
        rollout: Rollout,
        client: Client,
        spec: PolicySpec,
        config: EpisodeConfig,
        observers: Sequence[Observer] = (),
        pilot: Pilot | None = None,
    ):
        spec.require_fit(arm.spec)
        self.arm = arm
        self.rollout = rollout
        self.ending: Ending | None = None
        self._opened = Opened(episode_id="", version=0, seed=0)
        self._client = client
        self._observers = observers
        self._pilot = pilot
        self._wish, self._wished_tick = NOTHING, -1
        self._held_up = self._late = ""
        self._lockstep = arm.spec.lockstep
        self._latency_ticks = config.latency_ticks
        self._measures_latency = config.ahead_ticks is None
        self._started_s = time.monotonic()
        self._ticks = self._holds = self._clips = self._human = 0
        self._spec = spec
        try:
            self._chunks = Chunks(
                chunk_length=spec.chunk_length,
                ahead_ticks=config.ahead_ticks or 0,
                replan_after=config.replan_after,
                overlap=config.overlap,
            )
        except ValueError as error:
            raise SpecMismatch([str(error)]) from error
        self._asked_tick = -self._chunks.horizon
        self._gate = SafetyGate(
            arm.spec,
            policy_low_A=spec.low_A,
            policy_high_A=spec.high_A,
            max_age_s=0 if self._lockstep else config.max_age_s,
            frozen_after=0 if self._lockstep else config.frozen_after,
        )
        self._decisions = Decisions(
            client,
            deadline_s=client.deadline_s if self._lockstep else min(client.deadline_s, config.max_age_s),
            give_up_after_s=client.give_up_after_s,
            most_ticks=spec.message.max_request_ticks,
        )

    @property
    def over(self) -> bool:
        return self.ending is not None

    @property
    def must_wait(self) -> bool:
        """True while an arm in lockstep may not move: its answer is due."""
        waits = self.pending is not None or self._policy_may_act
        return self._lockstep and self._answer_is_due and waits

    @property
    def pending(self) -> Future[Answer] | None:
        """The answer under way, if any."""
        return self._decisions.pending

    @property
    def wake_at_s(self) -> float:
        """On time.monotonic(): when to look again even if no answer comes."""
        return self._decisions.wake_at_s

    @property
    def has_news(self) -> bool:
        """True when it is worth looking again: an answer is in, has come too late, or may be asked for again."""
        return (self.pending is not None and self.pending.done()) or time.monotonic() >= self.wake_at_s

    def start(self) -> None:
        """Resets the arm, then opens the episode at the server."""
        with self._ending_on_error():
            self.arm.reset(self.rollout.task)
            self._opened = self._client.start_episode(self.rollout, self.arm.spec)
            self._decisions.episode_id = self._opened.episode_id
            for observer in self._observers:
                observer.on_start(self.rollout, self._opened.episode_id)

    def tick(self) -> None:
        """One tick of real time; never blocks."""
        self.look()
        if not self.over:
            self.move()

    def look(self) -> None:
        """Reads the arm; ends the episode when it is over; takes in an answer; asks when a decision is due."""
        with self._ending_on_error():
            self._state = self.arm.state()
            if self._pilot and self._wished_tick != self._ticks:  # in lockstep a tick may take several looks
                self._wish, self._wished_tick = self._pilot.wish(), self._ticks
            self.ending = self._ending(self._state)
            if self.over:
                return
            if not self._lockstep or self._answer_is_due:
                self._take_in(self._decisions.poll())
            may_ask = self._policy_may_act or self._person_may_ask
            if may_ask and self._decision_is_due and self._decisions.may_ask:
                self._ask()
            elif not self._policy_may_act:
                self._decisions.rest()

    def move(self) -> None:
        """Executes the action that is due, or holds."""
        with self._ending_on_error():
            if self._wish.stopped:
                tick = self._hold(f"stopped: {self._wish.stopped}")
            elif self._wish.action_A is not None:
                tick = self._obey(self._wish.action_A)
            else:
                tick = self._follow()
            self._ticks += 1
            self._held_up = ""
            if tick.source == episode_pb2.SOURCE_HOLD:
                self._held_up = tick.reason if self._policy_is_kept_out else self._late
            for observer in self._observers:
                observer.on_tick(self._state, tick)
            self._decisions.executed(tick)

    def stop(self, message: str) -> None:
        """Ends the episode from outside, as an error."""
        self.ending = self.ending or Ending(outcome="error", message=message)

    def end(self) -> EpisodeResult:
        """Closes the episode at the server, which may take a while: the arm holds meanwhile."""
        assert self.ending is not None, "the episode is not over"
        final = None
        with self._ending_on_error():
            if not self._lockstep:
                self.arm.hold()
            if self.ending.outcome != "error":
                if not self.arm.state().blind:  # before anything that takes time, in which a person may tidy up
                    seen = self.arm.observe()
                    final = self._spec.read_of(seen, self.arm.spec)
                    for observer in self._observers:
                        observer.on_final_observation(seen)
                self._decisions.settle()
        if self._opened.episode_id:
            with self._ending_on_error():
                self._close(self.ending, final)
        result = EpisodeResult(
            rollout=self.rollout,
            outcome=self.ending.outcome,
            terminal=self.ending.terminal,
            ticks=self._ticks,
            decisions=self._decisions.answered,
            holds=self._holds,
            clips=self._clips,
            human=self._human,
            episode_id=self._opened.episode_id,
            version=self._opened.version,
            seed=self._opened.seed,
            wall_s=time.monotonic() - self._started_s,
            answer_s=tuple(self._decisions.answer_s),
            message=self.ending.message,
            arm_failed=self.ending.arm_failed,
            refused=self.ending.refused,
        )
        for observer in self._observers:
            observer.on_end(result)
        return result

    @property
    def _answer_is_due(self) -> bool:
        return self._decisions.open and self._ticks - self._asked_tick >= self._latency_ticks

    @property
    def _policy_may_act(self) -> bool:
        state, wish = self._state, self._wish
        return not (state.trouble or state.blind or wish.stopped or wish.action_A is not None)

    @property
    def _person_may_ask(self) -> bool:
        """A person drives: what is seen is asked about for the record; nobody waits for the answer."""
        return self._wish.action_A is not None and not (self._state.trouble or self._state.blind or self._wish.stopped)

    @property
    def _decision_is_due(self) -> bool:
        """The policy needs one, or a person has driven for a chunk's length since one was last asked for."""
        if self._wish.action_A is None:
            return self._chunks.wants_observation
        return self._ticks >= self._asked_tick + self._chunks.horizon

    @property
    def _policy_is_kept_out(self) -> bool:
        """True while the arm stands still for a reason that is not the policy's."""
        return not self._policy_may_act or self._gate.frozen or bool(self._decisions.trouble)

    @property
    def _latency_in_ticks(self) -> int:
        """Of the answers so far; in lockstep, where the clock stands still, the latency that is played."""
        most = self._chunks.horizon - 1
        if self._lockstep:
            return min(most, self._latency_ticks)
        return ticks_ahead(self._decisions.answer_s, 1 / self.arm.spec.tick_rate_hz, most=most)

    def _ending(self, state: ArmState) -> Ending | None:
        if self._wish.outcome is not None:
            return Ending(outcome=self._wish.outcome, terminal=self._wish.outcome != "error", message="said a person")
        if state.outcome is not None:
            return Ending(outcome=state.outcome, terminal=state.outcome != "error")
        if not self.rollout.task.max_ticks or self._ticks < self.rollout.task.max_ticks:
            return None
        if self._held_up:
            return Ending(outcome="error", message=f"time ran out while the arm was held: {self._held_up}")
        return Ending(outcome="failure", terminal=False)

    def _take_in(self, answer: Answer | None) -> None:
        if answer is not None:
            self._chunks.adopt(answer)
            if self._measures_latency:
                self._chunks.ahead_ticks = self._latency_in_ticks
            for observer in self._observers:
                observer.on_answer(answer)

    def _ask(self) -> None:
        observation = self.arm.observe()
        self._gate.looked(observation.capture_time_ns)
        if self._gate.frozen:
            self._decisions.rest()
            return
        self._chunks.looked(observation.capture_time_ns)
        if not self._decisions.open or self._wish.action_A is not None:
            self._asked_tick = self._ticks
        self._decisions.ask(self._spec.read_of(observation, self.arm.spec))
        for observer in self._observers:
            observer.on_observation(observation)

    def _follow(self) -> episode_pb2.Tick:
        """The policy's action, or a hold."""
        planned, now_ns = self._chunks.next(), time.monotonic_ns()
        verdict = self._gate.admit(planned, self._state, now_ns)
        if planned is not None:
            self._late = self._gate.lateness(planned, now_ns)
        if verdict.action_A is None or planned is None:
            return self._hold(verdict.reason)
        sent_A = self.arm.apply(verdict.action_A)
        if sent_A is None:
            return self._hold(self.arm.state().trouble)
        tick = episode_pb2.Tick(
            decision=planned.decision,
            index=planned.index,
            action=sent_A.tolist(),
            source=episode_pb2.SOURCE_BLEND if planned.blended else episode_pb2.SOURCE_POLICY,
            reason=verdict.reason,
        )
        self._chunks.applied()
        self._clips += bool(verdict.reason)
        return tick

    def _obey(self, action_A: np.ndarray) -> episode_pb2.Tick:
        """A person's action, within the same limits as the policy's; the chunk under way is forgotten.

        The arm's own trouble is answered by a hold first.
        """
        verdict = self._gate.admit_person(action_A, self._state)
        if verdict.action_A is None:
            return self._hold(verdict.reason)
        sent_A = self.arm.apply(verdict.action_A)
        if sent_A is None:
            return self._hold(self.arm.state().trouble)
        decision, index = self._chunks.since_decision
        tick = episode_pb2.Tick(
            decision=decision,
            index=index,
            action=sent_A.tolist(),
            source=episode_pb2.SOURCE_HUMAN,
            reason=verdict.reason,
        )
        self._chunks.taken_over()
        self._clips += bool(verdict.reason)
        self._human += 1
        return tick

    def _hold(self, reason: str) -> episode_pb2.Tick:
        decision, index = self._chunks.since_decision
        action_A = self.arm.hold()
        self._chunks.held()
        self._holds += 1
        return episode_pb2.Tick(
            decision=decision,
            index=index,
            action=action_A.tolist(),
            source=episode_pb2.SOURCE_HOLD,
            reason="; ".join(filter(None, (reason, self._decisions.trouble))),
        )

    def _close(self, ending: Ending, final: Observation | None) -> None:
        """A success or a failure counts only when acknowledged; an error is reported once, if the server is there."""
        failed = ending.outcome == "error"
        with contextlib.suppress(*((PolicyError,) if failed else ())):
            self._client.end_episode(
                self._opened.episode_id,
                ending.outcome,
                terminal=ending.terminal,
                executed=self._decisions.unreported,
                final_observation=final,
                message=ending.message,
                give_up_after_s=0 if failed else None,
            )

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except (ArmError, PolicyError) as error:
            message = f"{type(error).__name__}: {error}"
            self.ending = Ending(
                outcome="error",
                message=message,
                arm_failed=isinstance(error, ArmError),
                refused=isinstance(error, PolicyError) and not error.repeatable and not self._opened.episode_id,
            )
