"""A picture of what the policy saw: the observations of an episode, as an animated GIF, WebP or PNG."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from robot_client.arm import Observation
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout

log = logging.getLogger(__name__)

SUFFIXES = (".gif", ".png", ".webp")


class Film(Observer):
    """Keeps a frame at each decision, its cameras side by side, and writes the film at the end of each episode."""

    def __init__(self, path: Path, *, frames_per_s: float = 10.0):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"a film must end in one of {list(SUFFIXES)}, got {path.name!r}")
        self._path = path
        self._frame_ms = round(1000 / frames_per_s)
        self._frames: list[Image.Image] = []

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self._frames.clear()

    def on_observation(self, observation: Observation) -> None:
        frames = [observation.images[name] for name in sorted(observation.images)]
        height = max(frame.shape[0] for frame in frames)
        padded = [np.pad(frame, ((0, height - frame.shape[0]), (0, 0), (0, 0))) for frame in frames]
        self._frames.append(Image.fromarray(np.concatenate(padded, axis=1)))

    def on_end(self, result: EpisodeResult) -> None:
        if self._frames:
            first, *rest = self._frames
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                first.save(self._path, save_all=True, append_images=rest, duration=self._frame_ms, loop=0)
            except OSError as error:
                log.error("no film, the episode counts all the same: %s", error)
