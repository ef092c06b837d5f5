"""A robot that is wherever it was last told to be, one period later; it remembers its calls, and fails when told to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose

HOME = Pose.of((0.5, 0.0, 0.3), (np.pi, 0.0, 0.0))
JOINTS = np.array([0.0, -0.5, 0.5])
JOINT_STEP_RAD = 0.05
"""At full speed, a call of read()."""


class FakeHardware:
    watchdog_s = float("inf")

    def __init__(self, *, rate_hz: float = 100.0, refuse: str = "", break_after: int = 0, fault_file: str = ""):
        """refuse: what the constructor complains of.  break_after: reads until the connection breaks.

        fault_file: while such a file is there, its text is the fault; recover() removes it.
        """
        if refuse:
            raise ArmError(refuse)
        self.rate_hz = rate_hz
        self.pose, self.joints_J, self.opening = HOME, JOINTS.copy(), 1.0
        self.fault = ""
        self.stuck = False
        self.log: list[str] = []
        self.set_points: list[Pose] = []
        self.twists: list[np.ndarray] = []
        self._break_after = break_after
        self._fault_file = Path(fault_file) if fault_file else None
        self._reads = 0
        self._joints_goal_J, self._step_rad = self.joints_J, 0.0

    def read(self) -> Reading:
        self._reads += 1
        if self._fault_file and self._fault_file.exists():
            self.fault = self._fault_file.read_text()
        if self._break_after and self._reads > self._break_after:
            raise ArmError("the cable came off")
        self.joints_J = self.joints_J + np.clip(self._joints_goal_J - self.joints_J, -self._step_rad, self._step_rad)
        return Reading(pose=self.pose, joints_J=self.joints_J, opening=self.opening, fault=self.fault)

    def begin(self) -> None:
        self.log.append("begin")

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        self.set_points.append(pose)
        self.twists.append(twist_6)
        if not self.stuck:
            self.pose = pose

    def stop(self) -> None:
        self.log.append("stop")
        self._joints_goal_J = self.joints_J

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        self.log.append("move_joints")
        self._joints_goal_J, self._step_rad = joints_J, speed * JOINT_STEP_RAD

    def grip(self, opening: float) -> None:
        self.log.append(f"grip {opening:g}")
        self.opening = opening

    def recover(self) -> None:
        self.log.append("recover")
        if self._fault_file:
            self._fault_file.unlink(missing_ok=True)
        self.fault = ""

    def close(self) -> None:
        self.log.append("close")
