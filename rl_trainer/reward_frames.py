"""Frames to train a process reward model on: milestones of successful episodes, and what failing ones came to.

Shapes: n frames of all episodes, S numbers of the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from policy_server.vla.preprocessing import BadInput, Prepared, Preprocessor
from protos import codec, episode_pb2
from protos.episode_file import SUFFIX, DamagedEpisode, Episode, read_episode
from rl_trainer.augment import Draw, augment_images, augment_state
from rl_trainer.demonstrations import BadDemonstration, Source, demonstration_from_episode, refusal
from rl_trainer.milestones import MilestoneConfig, labelled, motion_of
from rl_trainer.samples import held_out

FAILURE = episode_pb2.Outcome.Name(episode_pb2.OUTCOME_FAILURE).lower()


@dataclass(frozen=True, kw_only=True)
class RewardFrames:
    """One row per frame."""

    observations: Sequence[Prepared]
    """n, as the policy reads them"""
    target_n: np.ndarray
    """float64 in [0, 1], 1 for a milestone, or how much is done; 0 in a failing episode"""
    success_n: np.ndarray
    """bool: of a successful episode"""
    validation_n: np.ndarray
    """bool: the frame's episode is held out"""

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def positive_n(self) -> np.ndarray:
        """bool: shows a milestone, or what is in the later half"""
        return self.target_n > 0.5

    @property
    def state_std(self) -> np.ndarray:
        """float32 (S,) over the frames; of no numbers for a model without state."""
        states = [observation.state for observation in self.observations if observation.state is not None]
        return np.std(states, 0).astype(np.float32) if states else np.zeros(0, np.float32)


def collect_frames(
    paths: Sequence[Path],
    preprocessor: Preprocessor,
    milestones: MilestoneConfig,
    *,
    camera: str,
    episodes: int,
    validation_fraction: float,
    seed: int,
    refused: Counter[str],
) -> RewardFrames:
    """At most so many episodes of *.episode files, in an order that the seed decides.

    The unusable are counted in `refused` by reason; the damaged are also printed by name.
    """
    files = [path for path in Source(paths=paths).files() if path.suffix == SUFFIX]
    observations, rows = list[Prepared](), list[tuple[np.ndarray, ...]]()
    for number in np.random.default_rng(seed).permutation(len(files)):
        if len(rows) == episodes:
            break
        try:
            episode = read_episode(files[number])
            if (reason := refusal(episode)) not in (None, FAILURE):
                refused[reason] += 1
                continue
            prepared, target_D = _labelled_frames(episode, preprocessor, milestones, camera)
        except (DamagedEpisode, BadDemonstration, BadInput, codec.CodecError) as error:
            refused["damaged"] += 1
            print(f"refused {files[number].name}: {error}", flush=True)
            continue
        held = held_out(episode.start.episode_id, validation_fraction)
        rows.append((target_D, np.full(len(prepared), reason is None), np.full(len(prepared), held)))
        observations += prepared
    if not rows:
        raise ValueError(f"no episode of {len(files)} can be learned from; refused: {dict(refused) or 'none'}")
    target_n, success_n, validation_n = (np.concatenate(column) for column in zip(*rows, strict=True))
    return RewardFrames(observations=observations, target_n=target_n, success_n=success_n, validation_n=validation_n)


def _labelled_frames(
    episode: Episode, preprocessor: Preprocessor, milestones: MilestoneConfig, camera: str
) -> tuple[list[Prepared], np.ndarray]:
    """The candidates of an episode as the policy reads them, and float64 (D,) their labels."""
    seen = demonstration_from_episode(episode, camera)
    rows, target_D = np.arange(len(seen.tick_D)), np.zeros(len(seen.tick_D))
    if episode.end.outcome == episode_pb2.OUTCOME_SUCCESS:
        rows, target_D = labelled(motion_of(episode, seen), milestones)
    prepared = [preprocessor.prepare(seen.frames_DHW3[row], seen.instruction, seen.state_DS[row]) for row in rows]
    return prepared, target_D


def balanced_rows(positive_n: np.ndarray, batch: int, *, seed: int, step: int) -> np.ndarray:
    """int64 (batch,) rows of one optimiser step: half of them positive, drawn with replacement."""
    rng = np.random.default_rng((seed, step))
    half = batch // 2
    positive, negative = np.flatnonzero(positive_n), np.flatnonzero(~positive_n)
    return np.concatenate([rng.choice(positive, half), rng.choice(negative, batch - half)])


def augmented(observations: Sequence[Prepared], state_std: np.ndarray, amount: float, drawn: Draw) -> list[Prepared]:
    """The observations with the draw's jitter; amount: of the noise on the state, in state_std."""
    images = augment_images(torch.from_numpy(np.stack([one.image for one in observations])), drawn).numpy()
    if not len(state_std):
        return [replace(one, image=image) for one, image in zip(observations, images, strict=True)]
    states_BS = torch.from_numpy(np.stack([one.state for one in observations if one.state is not None]))
    states = augment_state(states_BS, torch.from_numpy(state_std), amount, drawn).numpy()
    return [
        replace(one, image=image, state=state) for one, image, state in zip(observations, images, states, strict=True)
    ]
