"""Milestones: which frames of a successful episode show that a step of the task is done, by three rules.

    keyframes   the paper's: the episode is split where the gripper comes to rest at another openness; inside a segment,
                a frame at which a moving hand has come to rest is a keyframe, and so is the episode's last; the frames
                that lead to a keyframe, within its segment, are positive
    window      the published repository's once: every 5th frame is a candidate; positive are the last 10 frames, and
                those within 2 of (the gripper is told to close) + 11 or (it is told to open) + 0
    progress    ours, for a potential: a milestone does not show how many came before it, so every frame is labelled
                with the part of the episode's segments that lie behind it, in its own segment growing with time

The first two were made for a frame at every tick.  Here a frame is an observation, several ticks after the one before
it; what the rules say in frames is read as ticks, and a window is never narrower than the gap between two frames, so
that what happened is shown by one of them.

Shapes: D frames of an episode, T ticks, n candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from protos.episode_file import Episode
from rl_trainer.demonstrations import BadDemonstration, Demonstration

POSITION = ("eef_x", "eef_y", "eef_z")
FINGERS = ("finger_left", "finger_right")


@dataclass(frozen=True, kw_only=True)
class MilestoneConfig:
    """What counts as a step of the task."""

    rule: Literal["keyframes", "window", "progress"] = "progress"
    """progress is for rewards shaped by a potential, the other two for the paper's plain sum"""
    gripper_m_s: float = 0.03
    """keyframes and progress: fingers that open or close faster than this are moving"""
    still_m_s: float = 0.06
    """keyframes: a hand slower than this is at rest"""
    lead_s: float = 0.25
    """keyframes: frames this long before a keyframe lead to it"""
    candidate_ticks: int = 5
    """window: from one candidate to the next"""
    last_ticks: int = 10
    """window: the end of an episode"""
    after_close_ticks: int = 11
    """window: from the command to close to the middle of what is positive"""
    after_open_ticks: int = 0
    around_ticks: int = 2
    """window: positive on both sides of the middle"""

    def __post_init__(self) -> None:
        for name in ("gripper_m_s", "still_m_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("lead_s", "last_ticks", "after_close_ticks", "after_open_ticks", "around_ticks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.candidate_ticks < 1:
            raise ValueError(f"candidate_ticks must be >= 1, got {self.candidate_ticks}")


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What the rules look at in an episode."""

    tick_D: np.ndarray
    """int64, ascending: ticks executed when each frame was taken"""
    position_D3: np.ndarray
    """of the hand, m"""
    openness_D: np.ndarray
    """distance of the fingers, m"""
    command_T: np.ndarray
    """what the gripper was told at each tick, from 0 (close) to 1 (open)"""
    tick_rate_hz: float


def motion_of(episode: Episode, seen: Demonstration) -> Motion:
    """seen: the same episode's frames.  Raises BadDemonstration when its state does not say where the hand is."""
    names = list(seen.state_names)
    if missing := [name for name in POSITION + FINGERS if name not in names]:
        raise BadDemonstration(f"its state must name {missing}, got {names}")
    state = {name: seen.state_DS[:, names.index(name)].astype(np.float64) for name in POSITION + FINGERS}
    return Motion(
        tick_D=seen.tick_D,
        position_D3=np.stack([state[name] for name in POSITION], 1),
        # LIBERO's fingers lie on one axis with opposite signs.
        openness_D=state["finger_left"] - state["finger_right"],
        command_T=np.array([tick.action[-1] for tick in episode.ticks]),
        tick_rate_hz=seen.tick_rate_hz,
    )


def labelled(motion: Motion, config: MilestoneConfig) -> tuple[np.ndarray, np.ndarray]:
    """int64 (n,) the candidates among the frames, and float64 (n,) their labels: 1 for a milestone, or progress."""
    if config.rule != "window":
        label = _leading if config.rule == "keyframes" else _passed
        return np.arange(len(motion.tick_D)), label(motion, config).astype(np.float64)
    step = max(1, round(config.candidate_ticks / _gap(motion.tick_D)))
    candidates_n = np.arange(0, len(motion.tick_D), step)
    return candidates_n, _in_window(motion.tick_D[candidates_n], motion.command_T, config).astype(np.float64)


def keyframes(motion: Motion, config: MilestoneConfig) -> np.ndarray:
    """bool (D,): a hand that moved in this segment has come to rest, or the episode is over."""
    moving_D = _speeds(motion.position_D3, motion) >= config.still_m_s
    keyframe_D = np.zeros(len(moving_D), bool)
    for segment in _segments(motion, config):
        keyframe_D[segment] = np.logical_or.accumulate(moving_D[segment]) & ~moving_D[segment]
    keyframe_D[-1] = True
    return keyframe_D


def _leading(motion: Motion, config: MilestoneConfig) -> np.ndarray:
    """bool (D,): the keyframes and what leads to them."""
    lead = config.lead_s * motion.tick_rate_hz
    keyframe_D, positive_D = keyframes(motion, config), np.zeros(len(motion.tick_D), bool)
    for segment in _segments(motion, config):
        tick_d, key_k = motion.tick_D[segment], motion.tick_D[segment][keyframe_D[segment]]
        before_dk = key_k[None] - tick_d[:, None]
        positive_D[segment] = ((before_dk >= 0) & (before_dk <= lead)).any(1)
    return positive_D


def _passed(motion: Motion, config: MilestoneConfig) -> np.ndarray:
    """float64 (D,): from 0 at the first frame to 1 at the last, as much in every segment."""
    ends = [motion.tick_D[segment.stop - 1] for segment in _segments(motion, config)]
    return np.interp(motion.tick_D, [motion.tick_D[0], *ends], np.linspace(0, 1, len(ends) + 1))


def _segments(motion: Motion, config: MilestoneConfig) -> list[slice]:
    """Frames up to and with the one at which moving fingers have come to rest, and so on."""
    moving_D = _speeds(motion.openness_D[:, None], motion) > config.gripper_m_s
    stops = (np.flatnonzero(moving_D[:-1] & ~moving_D[1:]) + 1).tolist()
    return [slice(first, stop) for first, stop in zip([0, *stops], [*stops, len(moving_D)], strict=True)]


def _speeds(values_DX: np.ndarray, motion: Motion) -> np.ndarray:
    """float64 (D,): a second, on the way to each frame; 0 for the first."""
    elapsed_s = np.diff(motion.tick_D) / motion.tick_rate_hz
    return np.append(0.0, np.linalg.norm(np.diff(values_DX, axis=0), axis=1) / elapsed_s)


def _in_window(tick_n: np.ndarray, command_T: np.ndarray, config: MilestoneConfig) -> np.ndarray:
    """bool (n,) for candidates at these ticks."""
    open_T = command_T >= 0.5
    closed = np.flatnonzero(open_T[:-1] & ~open_T[1:]) + 1 + config.after_close_ticks
    opened = np.flatnonzero(~open_T[:-1] & open_T[1:]) + 1 + config.after_open_ticks
    reach = max(config.around_ticks, _gap(tick_n) / 2)
    near_n = (np.abs(tick_n[:, None] - np.append(closed, opened)[None]) <= reach).any(1)
    return near_n | (tick_n >= len(command_T) - config.last_ticks)


def _gap(tick_n: np.ndarray) -> float:
    """Ticks between two frames, as a rule."""
    return float(np.median(np.diff(tick_n))) if len(tick_n) > 1 else 1.0
