"""Actions to token ids and back.

    id     = vocabulary - digitize(clip(x, -1, 1), edges)            edges = linspace(-1, 1, bins)
    x      = centres[clip(vocabulary - id - 1, 0, bins - 2)]         centres: the mid-points of the edges
    action = 0.5 (x + 1) (high - low) + low where mask, else x       low, high: 1 % and 99 % quantiles

`vocabulary` counts no padding rows (32000 for OpenVLA, whose embedding has 32064).  Shapes: K chunk, A action, N = K A.
"""

from __future__ import annotations

import numpy as np

from policy_server.vla.config import VLAConfig


class UnknownStatistics(ValueError):
    """The checkpoint has no statistics of that name."""


class ActionTokens:
    """The arithmetic for one checkpoint and one data set's statistics."""

    def __init__(self, config: VLAConfig, unnorm_key: str | None = None):
        self.key = statistics_key(config, unnorm_key)
        statistics = config.norm_stats[self.key]["action"]
        self.low_A = np.array(statistics["q01"], np.float64)
        self.high_A = np.array(statistics["q99"], np.float64)
        self.mask_A = np.array(statistics.get("mask", [True] * len(self.low_A)), bool)
        self.chunk_length, self.vocabulary = config.chunk_length, config.vocabulary
        self.edges = np.linspace(-1, 1, config.n_action_bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2

    def encode(self, actions_KA: np.ndarray) -> np.ndarray:
        """int64 ids (..., N) of actions (..., K, A) in the policy's units."""
        ids = self.token_ids(self.normalise(actions_KA))
        return ids.reshape(*ids.shape[:-2], -1)

    def decode(self, token_ids_N: np.ndarray) -> np.ndarray:
        """float64 actions (..., K, A) in the policy's units of ids (..., N)."""
        ids = np.asarray(token_ids_N)
        shape = (*ids.shape[:-1], self.chunk_length, len(self.low_A))
        return self.unnormalise(self.centre(ids).reshape(shape))

    def token_ids(self, normalised: np.ndarray) -> np.ndarray:
        """int64 ids of numbers in [-1, 1], which are clipped to it."""
        return self.vocabulary - np.digitize(np.clip(normalised, -1, 1), self.edges)

    def centre(self, token_ids: np.ndarray) -> np.ndarray:
        """float64 in (-1, 1); ids that are no action tokens count as the nearest that is."""
        return self.centres[np.clip(self.vocabulary - np.asarray(token_ids) - 1, 0, len(self.centres) - 1)]

    def normalise(self, actions_A: np.ndarray) -> np.ndarray:
        """Inverse of unnormalise; a dimension of no extent becomes 0."""
        extent = self.high_A - self.low_A
        scaled = 2 * (actions_A - self.low_A) / np.where(extent > 0, extent, 1) - 1
        return np.where(self.mask_A, np.where(extent > 0, scaled, 0), actions_A)

    def unnormalise(self, normalised_A: np.ndarray) -> np.ndarray:
        scaled = 0.5 * (normalised_A + 1) * (self.high_A - self.low_A) + self.low_A
        return np.where(self.mask_A, scaled, normalised_A)


def statistics_key(config: VLAConfig, unnorm_key: str | None) -> str:
    """The key of norm_stats to use: the one named, or its `_no_noops` form; the only one where none is named."""
    available = list(config.norm_stats)
    if unnorm_key is None:
        if len(available) == 1:
            return available[0]
        raise UnknownStatistics(f"the checkpoint has statistics of several data sets, name one of {available}")
    for key in (unnorm_key, f"{unnorm_key}_no_noops"):
        if key in config.norm_stats:
            return key
    raise UnknownStatistics(f"unnorm_key must be one of {available}, got {unnorm_key!r}")
