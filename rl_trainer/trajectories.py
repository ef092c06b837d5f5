"""Trajectories: what PPO may learn from an episode.

What is scored.  The executed actions of a decision are a function of its tokens up to the last executed one, so this
prefix is the policy's action; its log-probability is exact, since the model is autoregressive.  A chunk that was asked
for ahead is entered at a later index: the tokens of the skipped actions are scored too, since the executed ones were
sampled given them, and the choice may have been theirs.  The discount counts what was executed, never what was skipped.

What cuts.  A decision during which somebody else moved the arm (human, expert, blend) is refused: its own end was never
seen.  There, and where the arm held, the trajectory ends, to be bootstrapped from the observation of the next decision,
which was taken before anybody else moved: nothing that others achieve is credited to the policy.  What follows is a
trajectory of its own, so that one episode may give several.  Decisions of which nothing was executed are left out.  An
episode that ends while the arm holds ends as it stands.

Shapes: T decisions, N = K*A action tokens, K actions of a chunk, A numbers of an action.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from policy_server.vla.action_tokens import ActionTokens, statistics_key
from policy_server.vla.config import VLAConfig
from policy_server.vla.preprocessing import BadInput, Prepared, Preprocessor
from policy_server.vla.tokenizer import Tokenizer
from protos import codec, episode_pb2
from protos.episode_file import Episode

OUTCOMES = (episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE)


class RefusedEpisode(ValueError):
    """An episode that nothing may be learned from.  `reason` is a word to count by; the message says more."""

    def __init__(self, episode: Episode, reason: str, message: str = ""):
        super().__init__(f"{episode.start.episode_id}: {reason}" + (f": {message}" if message else ""))
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Consecutive decisions that the policy alone carried out."""

    episode_id: str
    task: str
    initial_state: str
    success: bool
    """of the episode"""
    whole: bool
    """nothing interrupted the episode and nobody else moved the arm: the outcome is this trajectory's own"""
    helped: bool = False
    """somebody else than the policy moved the arm in the episode; a hold is no help"""
    observations: tuple[Prepared, ...]
    """T, each as the model read it, images in uint8"""
    after: Prepared | None
    """observation after the last decision, to bootstrap from: the trajectory was cut, or ran out of time; None when the
    task ended there"""
    token_ids_TN: np.ndarray
    """int64"""
    logprobs_TN: np.ndarray
    """float32, recorded when the tokens were sampled, at temperature_T"""
    mask_TN: np.ndarray
    """bool: the tokens to score, whole actions from the first on"""
    temperature_T: np.ndarray
    """float32, above 0"""
    version_T: np.ndarray
    """int64: the weights that answered"""
    ticks_T: np.ndarray
    """int64: executed actions of each decision, at least 1"""
    rewards_T: np.ndarray
    """float64: 1 for the decision that ended its episode in success, else 0"""

    def __len__(self) -> int:
        return len(self.observations)


@dataclass(frozen=True, kw_only=True)
class Span:
    """The executed actions of one decision: first <= index < stop."""

    decision: int
    first: int
    stop: int


def refusal(episode: Episode) -> str | None:
    """Why PPO may not learn from an episode, or None.  Evaluation episodes never enter training."""
    if episode.start.purpose != episode_pb2.PURPOSE_TRAIN:
        return episode_pb2.Purpose.Name(episode.start.purpose).lower()
    if episode.end.outcome not in OUTCOMES:
        return episode_pb2.Outcome.Name(episode.end.outcome).lower()
    # A greedy choice is no sample: it has no probability to compare with.
    return "greedy" if any(decision.chunk.temperature <= 0 for decision in episode.decisions) else None


def others_moved(ticks: Sequence[episode_pb2.Tick]) -> set[int]:
    """The decisions during which somebody else than the policy moved the arm."""
    return {t.decision for t in ticks if t.source not in (episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_HOLD)}


def pieces(ticks: Sequence[episode_pb2.Tick]) -> list[list[Span]]:
    """The scorable decisions in the order they were executed, cut where they are interrupted.

    The last piece is empty when the interruption lasted to the end of the episode.  Raises CodecError for ticks that no
    arm can have executed.
    """
    refused = others_moved(ticks)
    moved = max((place + 1 for place, tick in enumerate(ticks) if tick.source != episode_pb2.SOURCE_HOLD), default=0)
    found: list[list[Span]] = [[]]
    newest = -1
    for (decision, scorable), run in groupby(ticks[:moved], lambda t: (t.decision, _scorable(t, refused))):
        indices = [tick.index for tick in run]
        if not scorable:
            found += [[]] if found[-1] else []
            continue
        span = Span(decision=decision, first=indices[0], stop=indices[0] + len(indices))
        if decision <= newest or indices != list(range(span.first, span.stop)):
            raise codec.CodecError(
                "executed", f"decision {decision} must be later than {newest} and without gaps, got indices {indices}"
            )
        found[-1].append(span)
        newest = decision
    return found


def _scorable(tick: episode_pb2.Tick, refused: set[int]) -> bool:
    return tick.source == episode_pb2.SOURCE_POLICY and tick.decision not in refused


class TrajectoryReader:
    """Reads episodes with the eyes of one model.  Raises UnknownStatistics when it has none of that name.

    limit_ends: what is asked for is success in time, so that an episode which ran out of it has failed for good; else
    it was truncated, and might have come to success.
    """

    def __init__(
        self, config: VLAConfig, tokenizer: Tokenizer, *, unnorm_key: str | None = None, limit_ends: bool = False
    ):
        self._config, self._limit_ends = config, limit_ends
        self._unnorm_key = statistics_key(config, unnorm_key)
        self._preprocessor = Preprocessor(config, tokenizer, unnorm_key=self._unnorm_key)
        self.action_tokens = ActionTokens(config, self._unnorm_key)

    def read(self, episode: Episode) -> list[Trajectory]:
        """The trajectories of an episode, at least one.  Raises RefusedEpisode."""
        if (reason := refusal(episode)) is not None:
            raise RefusedEpisode(episode, reason)
        with self.reading(episode):
            *cut, last = pieces(episode.ticks)
            whole = not cut and not others_moved(episode.ticks)
            trajectories = [self._trajectory(episode, spans, ends=False, whole=False) for spans in cut]
            trajectories += [self._trajectory(episode, last, ends=True, whole=whole)] if last else []
        if not trajectories:
            raise RefusedEpisode(episode, "nothing_to_score")
        return trajectories

    @contextmanager
    def reading(self, episode: Episode) -> Iterator[None]:
        """Raises RefusedEpisode for one of another model, and for anything read inside that is not what it says."""
        expected = (self._config.image_path, self._unnorm_key)
        prepared = (episode.start.image_path, episode.start.unnorm_key)
        if prepared != expected:
            raise RefusedEpisode(episode, "other_model", f"its inputs must be prepared by {expected}, got {prepared}")
        try:
            yield
        except (codec.CodecError, BadInput) as error:
            raise RefusedEpisode(episode, "damaged", str(error)) from error

    def prepared(self, observation: episode_pb2.Observation, field: str) -> Prepared:
        """As the model reads it.  Raises CodecError, which names the field, and BadInput."""
        camera, state_dim = self._config.camera, self._config.state_dim
        if camera not in observation.images:
            raise codec.CodecError(field, f"images must include {camera!r}, got {sorted(observation.images)}")
        pixels_HW3 = codec.decode_image(observation.images[camera], f"{field}.images[{camera}]")
        state_S = None
        if state_dim:
            state_S = codec.decode_tensor(observation.state, f"{field}.state", dtype="float32", shape=(state_dim,))
        return self._preprocessor.prepare(pixels_HW3, observation.instruction, state_S)

    def _trajectory(self, episode: Episode, spans: Sequence[Span], *, ends: bool, whole: bool) -> Trajectory:
        """ends: the last of the spans was the episode's last movement."""
        recorded = {decision.decision: decision for decision in episode.decisions}
        if unknown := [span.decision for span in spans if span.decision not in recorded]:
            raise codec.CodecError("executed", f"decisions {unknown} are not recorded")
        decisions = [recorded[span.decision] for span in spans]
        success = episode.end.outcome == episode_pb2.OUTCOME_SUCCESS
        rewards_T = np.zeros(len(spans))
        rewards_T[-1] = ends and success
        return Trajectory(
            episode_id=episode.start.episode_id,
            task=episode.start.task,
            initial_state=episode.start.initial_state,
            success=success,
            whole=whole,
            helped=bool(others_moved(episode.ticks)),
            observations=tuple(self.prepared(d.observation, f"decision {d.decision}") for d in decisions),
            after=self._final(episode) if ends else self._next(episode, spans[-1].decision),
            token_ids_TN=np.stack([self._token_ids(decision) for decision in decisions]),
            logprobs_TN=np.stack([self._logprobs(decision) for decision in decisions]),
            mask_TN=np.stack([self._mask(span) for span in spans]),
            temperature_T=np.array([decision.chunk.temperature for decision in decisions], np.float32),
            version_T=np.array([decision.chunk.version for decision in decisions], np.int64),
            ticks_T=np.array([span.stop - span.first for span in spans], np.int64),
            rewards_T=rewards_T,
        )

    def _final(self, episode: Episode) -> Prepared | None:
        ended = episode.end.terminal or self._limit_ends
        return None if ended else self.prepared(episode.end.final_observation, "final_observation")

    def _next(self, episode: Episode, decision: int) -> Prepared:
        """The observation of the first decision that was answered after this one."""
        later = [d for d in episode.decisions if d.decision > decision]
        if not later:
            raise codec.CodecError("executed", f"decision {decision} was interrupted, but no later one is recorded")
        return self.prepared(later[0].observation, f"decision {later[0].decision}")

    def _token_ids(self, decision: episode_pb2.Decision) -> np.ndarray:
        field, config = f"decision {decision.decision}.token_ids", self._config
        first, stop = config.action_begin, config.vocabulary
        ids_N = codec.decode_tensor(decision.chunk.token_ids, field, dtype="int32", shape=(config.action_tokens,))
        if ids_N.min() < first or ids_N.max() >= stop:
            raise codec.CodecError(field, f"must be in [{first}, {stop - 1}], got [{ids_N.min()}, {ids_N.max()}]")
        return ids_N.astype(np.int64)

    def _logprobs(self, decision: episode_pb2.Decision) -> np.ndarray:
        field = f"decision {decision.decision}.token_logprobs"
        logprobs_N = codec.decode_tensor(
            decision.chunk.token_logprobs, field, dtype="float32", shape=(self._config.action_tokens,)
        )
        if not np.isfinite(logprobs_N).all():
            raise codec.CodecError(field, f"must be finite, got {logprobs_N.tolist()}")
        return logprobs_N

    def _mask(self, span: Span) -> np.ndarray:
        """bool (N,): every token that the executed actions depend on."""
        if span.stop > self._config.chunk_length:
            raise codec.CodecError("executed", f"index must be below {self._config.chunk_length}, got {span.stop - 1}")
        return np.arange(self._config.action_tokens) < span.stop * self._config.action_dim
