"""Statistics of a data set's columns, over one episode and over all, as LeRobot's policies normalise by them.

Quantiles of an episode are values of it, where lerobot takes a bin of a histogram; over episodes both take the weighted
mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
MOST_FRAMES, MOST_PIXELS = 100, 150
"""An episode's image statistics are taken over so many frames at most, and so many pixels along a side."""

Stats = dict[str, np.ndarray]


def statistics(values_nC: np.ndarray) -> Stats:
    """Each (C,): least and greatest in the column's own dtype, the others float64; the count int64 (1,)."""
    floats_nC = values_nC.astype(np.float64)
    quantiles = np.quantile(floats_nC, QUANTILES, axis=0, method="inverted_cdf")
    return {
        "min": values_nC.min(0),
        "max": values_nC.max(0),
        "mean": floats_nC.mean(0),
        "std": floats_nC.std(0),
        "count": np.array([len(values_nC)]),
        **{f"q{round(100 * q):02d}": row for q, row in zip(QUANTILES, quantiles, strict=True)},
    }


def image_statistics(frames: Sequence[np.ndarray]) -> Stats:
    """Of each colour in [0, 1], float64 (3, 1, 1); the count is of the frames that were looked at."""
    shown = [frames[f] for f in np.unique(np.linspace(0, len(frames) - 1, MOST_FRAMES).round().astype(int))]
    step = max(1, min(shown[0].shape[:2]) // MOST_PIXELS)
    values_n3 = np.concatenate([pixels[::step, ::step].reshape(-1, 3) for pixels in shown]) / 255
    found = statistics(values_n3)
    return {name: value.reshape(3, 1, 1) for name, value in found.items() if name != "count"} | {
        "count": np.array([len(shown)])
    }


def merged(before: Stats | None, new: Stats) -> Stats:
    """Statistics of both together, as lerobot aggregates episodes: a quantile is the weighted mean of quantiles."""
    if before is None:
        return new
    total = before["count"] + new["count"]
    share = new["count"][0] / total[0]
    means = [name for name in new if name not in ("min", "max", "std", "count")]
    together = {name: before[name] + share * (new[name] - before[name]) for name in means}
    spread = before["std"] ** 2 + share * (new["std"] ** 2 - before["std"] ** 2)
    between = share * (1 - share) * (new["mean"] - before["mean"]) ** 2
    return together | {
        "min": np.minimum(before["min"], new["min"]),
        "max": np.maximum(before["max"], new["max"]),
        "std": np.sqrt(spread + between),
        "count": total,
    }
