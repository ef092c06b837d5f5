"""Whether a process grows: a straight line through its resident memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PARTS = 10


def growth(samples: Sequence[tuple[float, float]], *, from_s: float) -> dict[str, Any]:
    """Of samples (s, MB) from a moment on: what a line of least squares gains to the end, as a share of its start."""
    times_s, mb = np.array([sample for sample in samples if sample[0] >= from_s]).T
    slope, intercept = np.polyfit(times_s, mb, 1)
    first_mb, last_mb = (float(intercept + slope * moment) for moment in (times_s[0], times_s[-1]))
    return {
        "growth": round(last_mb / first_mb - 1, 4),
        "fit": f"least squares over {len(mb)} samples from {times_s[0]:.0f} s to {times_s[-1]:.0f} s",
        "mb, line": [round(first_mb, 1), round(last_mb, 1)],
        "mb a minute": round(60 * float(slope), 3),
        "mb, mean of each tenth": [round(float(part.mean()), 1) for part in np.array_split(mb, PARTS)],
    }
