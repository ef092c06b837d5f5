"""Lessons: single decisions to imitate, for a policy that learns from few episodes.

Successes.  The tokens of an episode that succeeded without help, scored at the temperature at which they were sampled:
there, imitating all that the policy does changes it nowhere on average, so that it is the choice of the successes alone
that teaches.  At another temperature it would be taught its samples' spread as well.

Interventions.  A person or an expert takes over, and the episode ends in success.  The label of a decision is what was
executed from its observation on, whoever chose it; scored are the others' actions alone, each given those executed
before it.  They are no samples of the policy's: the temperature is 1, as for demonstrations.  Ticks at which nothing
moved are left out: a hold's, and those at which a person had the arm in hand and only waited.  A policy that learns to
stand still where it was helped stands there for good.

The robot asks about what it sees while a person drives as well, once a chunk; nobody follows those answers.

Shapes: T ticks, M of them at which something moved, K actions of a chunk, A numbers of an action, N = K*A tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.preprocessing import Prepared
from protos import codec, episode_pb2
from protos.episode_file import HELPERS, Episode
from rl_trainer.demonstrations import chunk_labels, no_ops, refusal
from rl_trainer.trajectories import Trajectory, TrajectoryReader

LessonKind = Literal["success", "intervention"]
KINDS: tuple[LessonKind, ...] = get_args(LessonKind)

HOLD, HUMAN, EXPERT = episode_pb2.SOURCE_HOLD, episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_EXPERT
FOLLOWED = (episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_BLEND)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One decision to imitate."""

    kind: LessonKind
    observation: Prepared
    token_ids_N: np.ndarray
    """int64"""
    mask_N: np.ndarray
    """bool: the tokens to imitate, whole actions; the others are read, not scored"""
    temperature: float
    """at which the tokens are scored, above 0"""


class Lessons:
    """The latest lessons, at most `capacity` of each kind; the oldest leave first.

    A function of the episodes and their order alone: a resumed session that reads them again has the same.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, got {capacity}")
        self._kept = {kind: deque[Lesson](maxlen=capacity) for kind in KINDS}

    def add(self, lessons: Iterable[Lesson]) -> None:
        for lesson in lessons:
            self._kept[lesson.kind].append(lesson)

    def __iter__(self) -> Iterator[Lesson]:
        """Kind by kind, the oldest first."""
        for kept in self._kept.values():
            yield from kept

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._kept.values())


def successes(trajectories: Iterable[Trajectory]) -> list[Lesson]:
    """The decisions of episodes that succeeded while nobody else than the policy moved the arm."""
    return [
        Lesson(
            kind="success",
            observation=trajectory.observations[t],
            token_ids_N=trajectory.token_ids_TN[t],
            mask_N=trajectory.mask_TN[t],
            temperature=float(trajectory.temperature_T[t]),
        )
        for trajectory in trajectories
        if trajectory.success and not trajectory.helped
        for t in range(len(trajectory))
    ]


def interventions(episode: Episode, reader: TrajectoryReader) -> list[Lesson]:
    """What a person or an expert did instead of the policy, in an episode that then succeeded; none of any other.

    Evaluation episodes teach nothing.  Raises RefusedEpisode for an episode of another model, or a damaged one.
    """
    if refusal(episode) is not None:
        return []
    with reader.reading(episode):
        executed = Executed.of(episode.ticks, reader.action_tokens)
        if not executed.helped_M.any():
            return []
        seen = [(decision, seen_at(episode.ticks, decision.decision)) for decision in episode.decisions]
        lessons = [_intervention(decision, executed, place, reader) for decision, place in seen if place is not None]
    return [lesson for lesson in lessons if lesson is not None]


def _intervention(
    decision: episode_pb2.Decision, executed: Executed, place: int, reader: TrajectoryReader
) -> Lesson | None:
    """What followed the observation, which was taken before the tick of that place; None where nobody helped in it."""
    labels_KA, helped_K = executed.following(place, reader.action_tokens.chunk_length)
    if not helped_K.any():
        return None
    return Lesson(
        kind="intervention",
        observation=reader.prepared(decision.observation, f"decision {decision.decision}"),
        token_ids_N=reader.action_tokens.encode(labels_KA),
        mask_N=np.repeat(helped_K, labels_KA.shape[1]),
        temperature=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Executed:
    """The ticks of an episode at which something moved."""

    labels_MA: np.ndarray
    """what was executed, an expert's own without its noise"""
    helped_M: np.ndarray
    """bool: a person or an expert drove"""
    earlier_T: np.ndarray
    """int64: how many of them there are before each tick of the episode"""

    @classmethod
    def of(cls, ticks: Sequence[episode_pb2.Tick], tokens: ActionTokens) -> Executed:
        """Raises CodecError for actions that are not the policy's in length."""
        action_dim = len(tokens.low_A)
        labels = [(tick.source == EXPERT and tick.expert_action) or tick.action for tick in ticks]
        if wrong := {len(label) for label in labels} - {action_dim}:
            raise codec.CodecError("executed", f"actions must have {action_dim} numbers, got {sorted(wrong)}")
        labels_TA, source_T = np.array([list(label) for label in labels]), np.array([tick.source for tick in ticks])
        moved_T = source_T != HOLD
        # To a person who only waits, the gripper's command is that of the tick before, whoever gave it.
        moved_T[moved_T] = ~(no_ops(labels_TA[moved_T]) & (source_T[moved_T] == HUMAN))
        return cls(
            labels_MA=labels_TA[moved_T],
            helped_M=np.isin(source_T[moved_T], HELPERS),
            earlier_T=np.cumsum(moved_T) - moved_T,
        )

    def following(self, seen: int, chunk_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(K, A) labels from a tick of the episode on, and bool (K,): which of them are a person's or an expert's.

        Nothing past the end of the episode is.
        """
        first = self.earlier_T[seen]
        [labels_KA] = chunk_labels(self.labels_MA, np.array([first]), chunk_length)
        helped = self.helped_M[first : first + chunk_length]
        return labels_KA, np.pad(helped, (0, chunk_length - len(helped)))


def seen_at(ticks: Sequence[episode_pb2.Tick], decision: int) -> int | None:
    """The place of the first tick after a decision's observation was taken; None where no tick tells it.

    The policy's indices count its own actions since then, others' all ticks since it was asked for.  Before the first
    answer the latter are of decision 0 as well, and count from the episode's beginning: they tell nothing.  Raises
    CodecError for an index that no arm can have counted to.
    """
    applied, asked = list[int](), None
    for place, tick in enumerate(ticks):
        by_policy = tick.source in FOLLOWED
        if tick.decision == decision:
            counted = [*applied, place] if by_policy else range(place + 1)
            if tick.index >= len(counted):
                raise codec.CodecError("executed", f"index must be below {len(counted)}, got {tick.index}")
            if by_policy:
                return counted[-1 - tick.index]
            if asked is None and (decision > 0 or tick.index < place):
                asked = place - tick.index
        if by_policy:
            applied.append(place)
    return asked
