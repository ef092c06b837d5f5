"""The SO-100 and SO-101: six Feetech STS3215 servos on a serial bus (the extra `so100`: feetech-servo-sdk and pin).

Calibrated by `lerobot-calibrate`, whose file is read, and compared with what is in the servos; nothing that lasts is
written to them.  Five joints cannot take every pose: the position is kept exactly, the rotation as far as it goes
(robot_client/kinematics.py).  With the gripper level that is roll and pitch; yaw follows from where the tool is.

A count of a servo is 0.088 degrees, about 0.4 mm at the tool.  Under load a servo rests short of its goal, by up to 2.6
degrees; its gears have one of play (TheRobotStudio/SO-ARM100, issue 134).  The measured pose shows the first alone.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from pathlib import Path
from typing import Literal

import numpy as np

from robot_client.arms.calibration import RAD, read_calibration
from robot_client.arms.so100_servos import Servos
from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.kinematics import Kinematics
from robot_client.pose import Pose
from robot_client.real_arm import RealArm, RealArmConfig

GRIPPER = "gripper"
MODELS = ("so100", "so101")
MAX_RAD_S = 4.7
"""45 turns a minute, without load."""
MAX_RATE_HZ = 100.0
ACCELERATION_RAD_S2 = 6.0
SAG_RAD = 0.06
"""So far a loaded joint may rest from its goal: the difference is added to what it is told, and kept at a stop."""
CLOSE_IN_RAD_S, STILL_READS = 0.2, 10
"""Joints that move by less than two counts in so many readings are at rest."""
PATIENCE = 0.35
"""Of a period: reading, asking again and a set point fit into one."""
LEAST_WAY_RAD = 1e-3


class SO100Hardware:
    """Hardware (robot_client/hardware.py) of one arm.

    A servo holds its last goal for ever: there is no watchdog, but nothing moves on when the calls stop either.  Limp
    until the first begin(), move_joints() or grip().  A fault leaves the arm where it is; begin(), move_joints() and
    grip() then raise ArmError, servo() does nothing.
    """

    watchdog_s = math.inf

    def __init__(
        self,
        *,
        calibration: str,
        port: str = "/dev/ttyACM0",
        model: Literal["so101", "so100"] = "so101",
        rate_hz: float = 50.0,
        speed_rad_s: float = 2.0,
        grip_torque: float = 0.5,
        release: bool = False,
        patience_s: float | None = None,
    ):
        """calibration: LeRobot's JSON file.  speed_rad_s: no joint is faster, move_joints() calls it full.
        grip_torque: of the gripper's full torque; never so much that its overload protection lets go of what it holds.
        release: close() lets the arm drop; else it stays under power, where it is.
        patience_s: for an answer, twice; None: so much that a reading takes less than a period, whatever is missing.
        """
        for name, value, high in (
            ("rate_hz", rate_hz, MAX_RATE_HZ),
            ("speed_rad_s", speed_rad_s, MAX_RAD_S),
            ("grip_torque", grip_torque, 1.0),
        ):
            if not 0 < value <= high:
                raise ValueError(f"{name} must be above 0 and at most {high:g}, got {value:g}")
        if model not in MODELS:
            raise ValueError(f"model must be one of {MODELS}, got {model!r}")
        self.rate_hz = rate_hz
        self._speed_rad_s, self._grip_torque, self._release = speed_rad_s, grip_torque, release
        self._kinematics = Kinematics(Path(__file__).with_name(f"{model}.urdf"))
        self._names = self._kinematics.names
        calibrations = read_calibration(Path(calibration).expanduser(), (*self._names, GRIPPER))
        self._kinematics.narrow(np.array([calibrations[name].high_rad for name in self._names]))
        self._jaw_rad = calibrations[GRIPPER].high_rad
        self._mode, self._fault, self._powered, self._closed = "rest", "", False, False
        self._servos = Servos(port, calibrations, patience_s=patience_s or PATIENCE / rate_hz)
        self.read()
        self._goal_J = self._sent_J = self._measured_J
        self._bias_J = self._way_rad_s = np.zeros(len(self._names))
        self._trail: deque[np.ndarray] = deque(maxlen=STILL_READS)

    def read(self) -> Reading:
        troubles = self._servos.listen()
        if troubles and not self._fault:
            self._fault = "; ".join(troubles)
            self._rest()
        if self._mode == "move":
            self._close_in()
        joints_J = self._measured_J
        opening = (self._servos.angle_rad(GRIPPER) / self._jaw_rad + 1) / 2
        return Reading(
            pose=self._kinematics.pose(joints_J),
            joints_J=joints_J,
            opening=min(max(opening, 0.0), 1.0),
            fault=self._fault,
        )

    def begin(self) -> None:
        self._power()
        self._goal_J = self._measured_J
        self._bias_J = np.clip(self._sent_J - self._goal_J, -SAG_RAD, SAG_RAD)
        self._mode = "servo"

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        """As near as one period brings it; each joint as fast as it must be to be there at the next set point."""
        if self._mode == "servo":
            before_J = self._goal_J
            self._goal_J = self._kinematics.joints_for(pose, before_J, self._speed_rad_s / self.rate_hz)
            way_J = np.maximum(np.abs(self._goal_J - before_J), np.abs(self._goal_J - self._measured_J))
            self._send(self._goal_J + self._bias_J, np.minimum(way_J * self.rate_hz, self._speed_rad_s))

    def stop(self) -> None:
        if self._mode != "rest":
            self._servos.listen()
            self._rest()

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        """All joints arrive together.  Raises ArmError beyond the limits."""
        low_J, high_J = self._kinematics.low_J, self._kinematics.high_J
        if len(joints_J) != len(low_J) or not 0 < speed <= 1:
            raise ArmError(
                f"an SO arm moves {len(low_J)} joints at a speed in (0, 1], got {len(joints_J)} at {speed:g}"
            )
        if not np.all((low_J <= joints_J) & (joints_J <= high_J)):
            low, high, got = (np.round(values_J, 3).tolist() for values_J in (low_J, high_J, joints_J))
            raise ArmError(f"joints must be within {low} to {high} rad, got {got}")
        self._power()
        way_J = np.abs(joints_J - self._measured_J)
        self._way_rad_s = speed * self._speed_rad_s * way_J / max(way_J.max(), LEAST_WAY_RAD)
        self._goal_J, self._mode = np.array(joints_J, np.float64), "move"
        self._trail.clear()
        self._send(self._goal_J + self._bias_J, self._way_rad_s, ACCELERATION_RAD_S2)

    def grip(self, opening: float) -> None:
        self._power()
        self._servos.move({GRIPPER: ((2 * opening - 1) * self._jaw_rad, MAX_RAD_S)}, ACCELERATION_RAD_S2)

    def recover(self) -> None:
        """Turns the servos that had an error off and on, which ends an overload; what lasts is a fault again."""
        self._fault = ""
        self._servos.power_off_ailing()
        self.read()
        if self._powered and not self._fault:
            self._powered = False
            self._power()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ArmError):
            self.stop()
            if self._release:
                self._servos.power_off()
        with contextlib.suppress(ArmError):
            self._servos.close()

    @property
    def _measured_J(self) -> np.ndarray:
        return np.array([self._servos.angle_rad(name) for name in self._names])

    def _power(self) -> None:
        """On, where it is."""
        if not self._powered and not self._fault:
            self.read()
        if self._fault:
            raise ArmError(f"the arm will not move: {self._fault}")
        if not self._powered:
            self._sent_J, self._bias_J = self._measured_J, np.zeros(len(self._names))
            self._servos.limit_torque(GRIPPER, self._grip_torque)
            self._servos.power_on(self._speed_rad_s)
            self._powered = True

    def _rest(self) -> None:
        """At what it was last told, where it is about there: a loaded joint does not sag at every stop."""
        if self._mode != "rest":
            measured_J = self._measured_J
            held_J = np.abs(self._sent_J - measured_J) <= SAG_RAD
            self._send(np.where(held_J, self._sent_J, measured_J), np.full(len(held_J), self._speed_rad_s))
        self._mode = "rest"

    def _close_in(self) -> None:
        """A loaded joint that rests short of the end of its way is told to go farther by as much."""
        self._trail.append(self._measured_J)
        short_J = self._goal_J - self._measured_J
        late_J = (np.abs(short_J) > RAD) & (np.abs(short_J) <= SAG_RAD)
        still = len(self._trail) == STILL_READS and np.ptp(self._trail, axis=0).max() < 1.5 * RAD
        if still and late_J.any():
            self._trail.clear()
            self._bias_J = np.clip(self._bias_J + late_J * short_J, -SAG_RAD, SAG_RAD)
            self._send(self._goal_J + self._bias_J, np.maximum(self._way_rad_s, CLOSE_IN_RAD_S), ACCELERATION_RAD_S2)

    def _send(self, sent_J: np.ndarray, speed_J: np.ndarray, acceleration_rad_s2: float = 0.0) -> None:
        self._sent_J = sent_J
        goals = zip(sent_J.tolist(), speed_J.tolist(), strict=True)
        self._servos.move(dict(zip(self._names, goals, strict=True)), acceleration_rad_s2)


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("so100", SO100Hardware, config)
