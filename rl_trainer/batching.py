"""From trajectories to one batch of decisions, and from a batch to the passes of a learner.

Shapes: n decisions of a batch, N = K*A action tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from policy_server.vla.model import VLA, Prompts, collate
from policy_server.vla.preprocessing import Prepared
from rl_trainer.trajectories import Trajectory


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The decisions of all trajectories, one after the other."""

    observations: Sequence[Prepared]
    """n"""
    token_ids_nN: torch.Tensor
    behaviour_nN: torch.Tensor
    """float32: log-probabilities when they were sampled"""
    mask_nN: torch.Tensor
    temperature_n: torch.Tensor
    version_n: np.ndarray

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Batch:
        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(trajectory, name) for trajectory in trajectories])

        return cls(
            observations=[observation for trajectory in trajectories for observation in trajectory.observations],
            token_ids_nN=torch.from_numpy(joined("token_ids_TN")),
            behaviour_nN=torch.from_numpy(joined("logprobs_TN")),
            mask_nN=torch.from_numpy(joined("mask_TN")),
            temperature_n=torch.from_numpy(joined("temperature_T")),
            version_n=joined("version_T"),
        )

    def __len__(self) -> int:
        return len(self.observations)


class Prompter:
    """Prompts of rows of a batch, as a model reads them.

    Image tokens are computed once where training leaves them as they are, and kept in the host's memory: 10 KB a
    decision for nano, 2 MB for OpenVLA-7B.
    """

    def __init__(self, model: VLA, observations: Sequence[Prepared], *, keep_images: bool = True):
        self._model, self._observations = model, observations
        self._lengths_n = np.array([len(observation.input_ids) for observation in observations])
        self._keeps = keep_images and model.vision_is_frozen
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, rows: np.ndarray) -> Prompts:
        """Of B rows, on the model's device, with image tokens."""
        prompts = collate([self._observations[row] for row in rows]).to(self._model.device)
        if not self._keeps:
            return replace(prompts, image_tokens_BCD=self._model.image_tokens(prompts.images_BHW3))
        if missing := [place for place, row in enumerate(rows) if row not in self._kept]:
            with torch.no_grad():
                tokens_BCD = self._model.image_tokens(prompts.images_BHW3[missing]).cpu()
            self._kept |= zip(rows[missing].tolist(), tokens_BCD, strict=True)
        kept_BCD = torch.stack([self._kept[row] for row in rows.tolist()])
        return replace(prompts, image_tokens_BCD=kept_BCD.to(self._model.device))

    def parts(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The rows cut into passes of at most `size`, prompts of about one length together: little is padding."""
        ordered = rows[np.argsort(self._lengths_n[rows], kind="stable")]
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def minibatches(count: int, size: int, *, epochs: int, seed: int, iteration: int) -> Iterator[np.ndarray]:
    """Rows of each optimiser step: every epoch a fresh permutation, cut evenly into parts of about `size`."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, iteration, epoch)).permutation(count)
        yield from np.array_split(order, max(1, round(count / size)))
