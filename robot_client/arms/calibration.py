"""LeRobot's calibration files: where a servo's counts put each joint, as `lerobot-calibrate` writes them.

JSON, by joint: id, drive_mode, homing_offset, range_min, range_max, all in counts of the servo.  LeRobot has put the
offset into the servo too, which subtracts it from what it measures, and the range as the limits of its goal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from robot_client.errors import ArmError

COUNTS = 4096
"""A turn."""
RAD = 2 * math.pi / COUNTS
"""A count: 0.088 degrees."""


@dataclass(frozen=True, kw_only=True)
class JointCalibration:
    """Zero is the middle of the range."""

    id: int
    drive_mode: int
    """1 where the joint turns against the counts."""
    homing_offset: int
    range_min: int
    range_max: int

    def __post_init__(self) -> None:
        values = [getattr(self, entry.name) for entry in fields(self)]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise ValueError(f"id, drive_mode, homing_offset, range_min and range_max must be integers, got {values}")
        if not (self.drive_mode in (0, 1) and 0 <= self.range_min < self.range_max < COUNTS):
            raise ValueError(
                f"drive_mode must be 0 or 1 and 0 <= range_min < range_max < {COUNTS}, "
                f"got {self.drive_mode}, {self.range_min} and {self.range_max}"
            )

    @property
    def high_rad(self) -> float:
        """How far the joint goes, either way."""
        return (self.range_max - self.range_min) / 2 * RAD

    def angle_rad(self, counts: float) -> float:
        return self._sign * (counts - (self.range_min + self.range_max) / 2) * RAD

    def counts(self, angle_rad: float) -> int:
        """The nearest one, within the range."""
        counts = round((self.range_min + self.range_max) / 2 + self._sign * angle_rad / RAD)
        return min(max(counts, self.range_min), self.range_max)

    @property
    def _sign(self) -> int:
        return -1 if self.drive_mode else 1


def read_calibration(path: Path, names: Collection[str]) -> dict[str, JointCalibration]:
    """Of these joints, in this order.  Raises ArmError, which names the file, what was got and what is expected."""
    try:
        table = json.loads(path.read_text())
        found = {name: JointCalibration(**entry) for name, entry in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArmError(f"{path} is not a calibration of LeRobot's: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ArmError(f"{path} must calibrate {missing} too, it has {sorted(found)}")
    return {name: found[name] for name in names}
