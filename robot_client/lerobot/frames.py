"""An episode as frames of a LeRobot data set (protos/lerobot.py): one for each observation that was acted on.

Every executed tick belongs to the latest observation whose actions are counted from it or from a tick before it: what
was held while an answer was awaited, to the one before.  An observation of which nothing was executed makes no frame.
Shapes: F frames of an episode, M ticks of a frame, K actions of A numbers in an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from protos import codec, episode_pb2, lerobot
from protos.episode_file import Episode
from robot_client.arm import ACTION_NAMES
from robot_client.arms.replay import due_ticks


class Unfit(ValueError):
    """Episodes that make no data set.  The message says why."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """An observation and what was executed from it up to the next one."""

    decision: episode_pb2.Decision
    tick: int
    """Ticks executed before its own (robot_client/arms/replay.py: due_ticks)."""
    ticks: Sequence[episode_pb2.Tick]
    """At least one."""


def frames_of(episode: Episode) -> list[Frame]:
    """In the order they were executed; together they hold every tick of the episode."""
    executed = {tick.decision for tick in episode.ticks}
    kept = [decision for decision in episode.decisions if decision.decision in executed]
    if not kept:
        return []
    starts = due_ticks(replace(episode, decisions=kept))
    stops = [*starts[1:], len(episode.ticks)]
    return [
        Frame(decision=decision, tick=start, ticks=episode.ticks[start:stop])
        for decision, start, stop in zip(kept, starts, stops, strict=True)
        if start < stop
    ]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the episodes of one data set must have in common."""

    cameras: tuple[tuple[str, int, int], ...]
    """Name, height and width of each, sorted."""
    state_names: tuple[str, ...]
    """S names."""
    action_length: int
    """A"""
    tick_rate_hz: float


@dataclass(kw_only=True)
class Survey:
    """What a first reading of the episodes finds out about all of them."""

    kinds: dict[Kind, str] = field(default_factory=dict)
    """The kinds there are, each with the first episode of that kind."""
    apart: Counter[int] = field(default_factory=Counter)
    """How often two observations were so many ticks apart."""
    most_ticks: int = 0
    """M"""
    chunk_lengths: set[int] = field(default_factory=set)
    """K of the policies that answered; empty when none was asked."""
    watched: bool = False
    """Whether an expert watched anywhere."""
    arms: set[str] = field(default_factory=set)

    def add(self, episode: Episode, frames: Sequence[Frame]) -> None:
        """Raises Unfit for an episode that is not even like itself, CodecError for bytes that are not what they say."""
        lengths = {len(tick.action) for tick in episode.ticks}
        lengths |= {len(tick.expert_action) for tick in episode.ticks if tick.expert_action}
        if len(lengths) != 1:
            raise Unfit(f"its actions differ in length: {sorted(lengths)}")
        first = frames[0].decision.observation
        state_names = tuple(episode.start.state_names)
        entries = len(state_of(first))
        if len(state_names) != entries:
            state_names = tuple(f"state_{s}" for s in range(entries))
        kind = Kind(
            cameras=tuple((name, image.height, image.width) for name, image in sorted(first.images.items())),
            state_names=state_names,
            action_length=lengths.pop(),
            tick_rate_hz=episode.start.tick_rate_hz,
        )
        self.kinds.setdefault(kind, episode.start.episode_id)
        self.apart.update(b.tick - a.tick for a, b in pairwise(frames))
        self.most_ticks = max(self.most_ticks, *(len(frame.ticks) for frame in frames))
        self.chunk_lengths |= {f.decision.chunk.actions.shape[0] for f in frames if f.decision.HasField("chunk")}
        self.watched |= any(tick.expert_action for tick in episode.ticks)
        self.arms.add(episode.start.arm)

    def kind(self) -> Kind:
        """Raises Unfit unless there is one kind."""
        if len(self.kinds) > 1:
            raise Unfit(f"episodes must agree in cameras, state, action and tick rate, got {self.kinds}")
        if len(self.chunk_lengths) > 1:
            raise Unfit(f"answers must all have the same number of actions, got {sorted(self.chunk_lengths)}")
        return next(iter(self.kinds))

    def fps(self) -> float:
        """Frames a second.  Raises Unfit when the observations are not equally far apart, or the rate is unknown."""
        rate_hz = self.kind().tick_rate_hz
        if len(self.apart) > 1 or not rate_hz:
            raise Unfit(
                "a LeRobot data set has one fps, but observations are "
                f"{dict(sorted(self.apart.items()))} (ticks apart: how often) at {rate_hz:g} ticks a second; "
                "with --fps the timestamps are nominal, and the column "
                f"{lerobot.TICK!r} says after how many ticks an observation was acted on"
            )
        return rate_hz / next(iter(self.apart), self.most_ticks)

    def features(self, *, image_dtype: str) -> dict[str, dict[str, Any]]:
        """The columns as meta/info.json describes them.  image_dtype: "image" or "video"."""
        kind, M, K = self.kind(), self.most_ticks, max(self.chunk_lengths, default=0)
        A = kind.action_length
        action_names: list[str] = [*ACTION_NAMES] if len(ACTION_NAMES) == A else [f"action_{a}" for a in range(A)]
        features = {
            lerobot.IMAGES + name: _feature(image_dtype, height, width, 3, names=["height", "width", "channels"])
            for name, height, width in kind.cameras
        }
        if kind.state_names:
            features[lerobot.STATE] = _feature("float32", len(kind.state_names), names=list(kind.state_names))
        features |= {
            lerobot.ACTION: _feature("float32", A, names=action_names),
            lerobot.REWARD: _feature("float32"),
            lerobot.DONE: _feature("bool"),
            lerobot.TRUNCATED: _feature("bool"),
            lerobot.SUCCESS: _feature("bool"),
            lerobot.DECISION: _feature("int64"),
            lerobot.TICK: _feature("int64"),
            lerobot.CAPTURE_TIME_NS: _feature("int64"),
            lerobot.EXECUTED_ACTIONS: _feature("float32", M * A),
            lerobot.EXECUTED_IS_PAD: _feature("bool", M),
            lerobot.EXECUTED_SOURCE: _feature("int64", M),
            lerobot.EXECUTED_DECISION: _feature("int64", M),
            lerobot.EXECUTED_INDEX: _feature("int64", M),
            lerobot.EXECUTED_REASONS: _feature("string"),
            lerobot.START: _feature("string"),
            lerobot.END: _feature("string"),
        }
        if self.watched:
            features[lerobot.EXPERT_ACTIONS] = _feature("float32", M * A)
            features[lerobot.EXPERT_WATCHED] = _feature("bool", M)
        if K:
            features[lerobot.ANSWER_ACTIONS] = _feature("float32", K * A)
            features[lerobot.ANSWER_TOKEN_IDS] = _feature("int64", K * A)
            features[lerobot.ANSWER_LOGPROBS] = _feature("float32", K * A)
            features[lerobot.ANSWER_VERSION] = _feature("int64")
            features[lerobot.ANSWER_TEMPERATURE] = _feature("float32")
        return features


def _feature(dtype: str, *shape: int, names: list[str] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or (1,), "names": names}


def columns_of(
    episode: Episode, frames: Sequence[Frame], features: dict[str, dict[str, Any]], *, expert: bool
) -> dict[str, np.ndarray]:
    """Every column of ours but the images, each (F, width); numbers in the features' dtypes, text as str objects.

    expert: `action` is what the expert would have done, where one watched.  Raises CodecError.
    """
    F, M = len(frames), features[lerobot.EXECUTED_SOURCE]["shape"][0]
    A = features[lerobot.ACTION]["shape"][0]
    columns: dict[str, np.ndarray] = {
        name: np.zeros((F, feature["shape"][0]), object if feature["dtype"] == "string" else feature["dtype"])
        for name, feature in features.items()
        if feature["dtype"] not in ("image", "video")
    }
    columns[lerobot.START][:] = _json(episode.start)
    columns[lerobot.END][:] = _json(_without_images(episode.end))
    columns[lerobot.EXECUTED_IS_PAD][:] = True
    if lerobot.ANSWER_VERSION in columns:
        columns[lerobot.ANSWER_VERSION][:] = -1
    succeeded = episode.end.outcome == episode_pb2.OUTCOME_SUCCESS
    columns[lerobot.DONE][-1] = True
    columns[lerobot.REWARD][-1] = columns[lerobot.SUCCESS][-1] = succeeded
    columns[lerobot.TRUNCATED][-1] = not episode.end.terminal
    for f, frame in enumerate(frames):
        row: dict[str, np.ndarray] = {name: column[f] for name, column in columns.items()}
        _fill_observation(row, frame)
        _fill_ticks(row, frame, M, A)
        first = frame.ticks[0]
        row[lerobot.ACTION][:] = (expert and first.expert_action) or first.action
        if frame.decision.HasField("chunk"):
            _fill_answer(row, frame.decision.chunk)
    return columns


def _fill_observation(row: dict[str, np.ndarray], frame: Frame) -> None:
    observation = frame.decision.observation
    row[lerobot.DECISION][:] = frame.decision.decision
    row[lerobot.TICK][:] = frame.tick
    row[lerobot.CAPTURE_TIME_NS][:] = observation.capture_time_ns
    if lerobot.STATE in row:
        row[lerobot.STATE][:] = state_of(observation, len(row[lerobot.STATE]))


def _fill_ticks(row: dict[str, np.ndarray], frame: Frame, M: int, A: int) -> None:
    executed_MA = row[lerobot.EXECUTED_ACTIONS].reshape(M, A)  # a view
    for m, tick in enumerate(frame.ticks):
        executed_MA[m] = tick.action
        row[lerobot.EXECUTED_IS_PAD][m] = False
        row[lerobot.EXECUTED_SOURCE][m] = tick.source
        row[lerobot.EXECUTED_DECISION][m] = tick.decision
        row[lerobot.EXECUTED_INDEX][m] = tick.index
        if tick.expert_action:
            row[lerobot.EXPERT_ACTIONS].reshape(M, A)[m] = tick.expert_action
            row[lerobot.EXPERT_WATCHED][m] = True
    row[lerobot.EXECUTED_REASONS][:] = "\n".join(" ".join(tick.reason.splitlines()) for tick in frame.ticks)


def _fill_answer(row: dict[str, np.ndarray], chunk: episode_pb2.Chunk) -> None:
    for name, tensor, dtype in (
        (lerobot.ANSWER_ACTIONS, chunk.actions, "float32"),
        (lerobot.ANSWER_TOKEN_IDS, chunk.token_ids, "int32"),
        (lerobot.ANSWER_LOGPROBS, chunk.token_logprobs, "float32"),
    ):
        values = codec.decode_tensor(tensor, name, dtype=dtype).reshape(-1)
        if len(values) != len(row[name]):
            raise codec.CodecError(name, f"must be {len(row[name])} numbers, got {len(values)}")
        row[name][:] = values
    row[lerobot.ANSWER_VERSION][:] = chunk.version
    row[lerobot.ANSWER_TEMPERATURE][:] = chunk.temperature


def state_of(observation: episode_pb2.Observation, length: int | None = None) -> np.ndarray:
    """float32 (S,), empty when there is none.  Raises CodecError unless it has the expected length."""
    if not observation.HasField("state"):
        return np.zeros(0, np.float32)
    return codec.decode_tensor(observation.state, "state", dtype="float32", shape=(length,))


def pixels_of(frame: Frame, camera: str, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3).  Raises CodecError unless the frame has this camera's image, of this (H, W)."""
    images = frame.decision.observation.images
    if camera not in images:
        raise codec.CodecError(camera, f"must be in every observation, got {sorted(images)}")
    pixels_HW3 = codec.decode_image(images[camera], camera)
    if pixels_HW3.shape[:2] != size:
        height, width = pixels_HW3.shape[:2]
        raise codec.CodecError(camera, f"must be {size[0]}x{size[1]} as in the first frame, got {height}x{width}")
    return pixels_HW3


def _json(message: Message) -> str:
    return MessageToJson(message, indent=None, preserving_proto_field_name=True)


def _without_images(end: episode_pb2.EpisodeEnd) -> episode_pb2.EpisodeEnd:
    kept = episode_pb2.EpisodeEnd()
    kept.CopyFrom(end)
    kept.ClearField("final_observation")
    return kept
