"""The Hardware protocol: a robot as its vendor's SDK shows it, and nothing of policies.

One thread of one process (robot_client/servo.py) makes every call, so an implementation needs no lock.  No call may
block for longer than a servo period, but for the constructor, recover(), and begin() and move_joints() where they
change the controller's mode at rest.  What a person must not miss is left to him: recover() alone clears a fault.

Any method may raise ArmError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from robot_client.pose import Pose


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the robot says of itself now."""

    pose: Pose
    """Of the tool centre point, in the robot's base frame; measured, not commanded."""
    joints_J: np.ndarray
    """float64 (J,) rad, measured."""
    opening: float
    """Of the gripper, measured: 0 closed, 1 open."""
    fault: str = ""
    """Why the robot will not move until recover(): its own words; empty when it will."""


class Hardware(Protocol):
    """Constructed with its settings as keyword arguments of simple types: the table [hardware] of a profile."""

    rate_hz: float
    """How many set points a second servo() is given."""
    watchdog_s: float
    """With no call for so long after servo(), the controller stops the robot; inf where it rests at its last set point
    and needs no such watchdog."""

    def read(self) -> Reading: ...

    def begin(self) -> None:
        """Takes control where the robot is; from now on servo() is called rate_hz times a second, until stop()."""
        ...

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        """The set point of this period, in the base frame: where to be, and how fast (m/s, rad/s) it moves there.

        One that the robot does not take, for what came since read(), is a fault of the next reading.
        """
        ...

    def stop(self) -> None:
        """Ends servo() or move_joints(): comes to rest at once, stays under power.  Does nothing when at rest.

        With a fault, too, which stays.
        """
        ...

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        """Sets out for these joint positions (rad) at a fraction in (0, 1] of full speed; returns at once.

        Has arrived when read() says so.
        """
        ...

    def grip(self, opening: float) -> None:
        """Sets out to open or close the gripper, 0 to 1; returns at once."""
        ...

    def recover(self) -> None:
        """Clears a fault."""
        ...

    def close(self) -> None:
        """Stops, and lets go of the connection."""
        ...
