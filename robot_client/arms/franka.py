"""Franka's Panda and FR3 through franky (the extra `franka`), which plans each millisecond between our set points.

A set point is a pose with a velocity.  franky's loop in this process speaks to the robot at 1 kHz: should the process
stall, the robot misses its packets and stops by itself, after 20 of them as libfranka documents.
"""

from __future__ import annotations

import threading

import franky
import numpy as np

from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose
from robot_client.real_arm import RealArm, RealArmConfig

HAND_PERIOD_S = 0.02
WIDTH_TOLERANCE_M = 0.002
READY = (franky.RobotMode.Idle, franky.RobotMode.Move)
STOPS = {
    franky.ControlSignalType.CartesianPose: franky.CartesianStopMotion,
    franky.ControlSignalType.JointPositions: franky.JointStopMotion,
}


class FrankaHardware:
    """One arm, with Franka's hand or without one."""

    watchdog_s = 0.02

    def __init__(
        self,
        *,
        host: str,
        rate_hz: float = 50.0,
        dynamics: float = 0.3,
        realtime: bool = True,
        hand: bool = True,
        grip_force_n: float = 20.0,
        grip_speed_m_s: float = 0.1,
    ):
        """host: its address.  dynamics: fraction of franky's limits on speed, acceleration and jerk, between two set
        points and on the way home.  realtime: insist on a real-time kernel, as Franka advises."""
        if not 0 < dynamics <= 1:
            raise ValueError(f"dynamics must be in (0, 1], got {dynamics:g}")
        self.rate_hz = rate_hz
        self._fault, self._closed = "", False
        self._next: franky.JointMotion | None = None
        kernel = franky.RealtimeConfig.Enforce if realtime else franky.RealtimeConfig.Ignore
        try:
            self._robot = franky.Robot(host, realtime_config=kernel)
            self._robot.relative_dynamics_factor = dynamics
            self._hand = _Hand(host, force_n=grip_force_n, speed_m_s=grip_speed_m_s) if hand else None
        except (franky.Exception, RuntimeError) as error:
            raise ArmError(f"no Franka at {host}: {error}") from error

    def read(self) -> Reading:
        self._go_on()
        try:
            state = self._robot.state
        except franky.Exception as error:
            raise ArmError(f"lost the Franka: {error}") from error
        if not self._fault and state.robot_mode not in READY:
            self._fault = f"the robot is in mode {state.robot_mode.name} ({state.current_errors})"
        matrix_44 = np.array(state.O_T_EE.matrix)
        return Reading(
            pose=Pose(matrix_44[:3, 3], matrix_44[:3, :3]),
            joints_J=np.array(state.q),
            opening=self._hand.opening if self._hand else 1.0,
            fault=self._fault or (self._hand.fault if self._hand else ""),
        )

    def begin(self) -> None:
        self._next = None

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        matrix_44 = np.eye(4)
        matrix_44[:3, :3], matrix_44[:3, 3] = pose.rotation, pose.position_m
        velocity = franky.RobotVelocity(franky.Twist(twist_6[:3], twist_6[3:]))
        state = franky.CartesianState(franky.RobotPose(franky.Affine(matrix_44)), velocity)
        # A way home that is still coming to rest goes first: the kind of signal cannot change in motion.
        if self._signal in (None, franky.ControlSignalType.CartesianPose):
            self._move(franky.CartesianMotion(state))

    def stop(self) -> None:
        self._next = None
        if signal := self._signal:
            self._move(STOPS[signal]())

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        self._next = franky.JointMotion(joints_J, relative_dynamics_factor=speed)

    def grip(self, opening: float) -> None:
        if self._hand:
            self._hand.move(opening)

    def recover(self) -> None:
        try:
            self._robot.recover_from_errors()
            if self._hand:
                self._hand.recover()
        except franky.Exception as error:
            raise ArmError(f"the Franka does not recover: {error}") from error
        self._fault = ""

    def close(self) -> None:
        if self._closed:
            return
        self.stop()
        if self._hand:
            self._hand.close()
        # Their ends close the connections, and the robot takes no second ones before.
        del self._robot, self._hand
        self._closed = True

    @property
    def _signal(self) -> franky.ControlSignalType | None:
        """What kind of motion is under way."""
        return self._robot.current_control_signal_type if self._robot.is_in_control else None

    def _go_on(self) -> None:
        """Notes what ended the last motion; sets out for home once the robot is at rest."""
        try:
            at_rest = not self._robot.poll_motion()
        except franky.Exception as error:
            self._fault = self._fault or str(error)
            return
        if at_rest and self._next is not None and self._move(self._next):
            self._next = None

    def _move(self, motion: franky.Motion) -> bool:
        """False when the last motion, of another kind, is still being wound up: ask again in the next period."""
        try:
            self._robot.move(motion, asynchronous=True)
        except franky.InvalidMotionTypeException:
            return False
        except franky.Exception as error:
            self._fault = self._fault or str(error)
        return True


class _Hand:
    """Franka's hand, whose every call waits for the one before: a thread waits in our place."""

    def __init__(self, host: str, *, force_n: float, speed_m_s: float):
        self._hand = franky.Gripper(host)
        self._force_n, self._speed_m_s = force_n, speed_m_s
        self._open_m = self._hand.max_width or 0.08
        self.fault = ""
        self.opening = self._hand.width / self._open_m
        self._asked: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="hand", daemon=True)
        self._thread.start()

    def move(self, opening: float) -> None:
        self._asked = opening

    def recover(self) -> None:
        self.fault = ""

    def close(self) -> None:
        self._closing.set()
        self._thread.join(1.0)

    def _attend(self) -> None:
        sent = None
        while not self._closing.wait(HAND_PERIOD_S):
            asked = self._asked
            try:
                self.opening = min(max(self._hand.width / self._open_m, 0.0), 1.0)
                if asked is not None and asked != sent and not self.fault:
                    sent = asked
                    self._send(asked)
            except (franky.Exception, franky.GripperException) as error:
                self.fault = f"hand: {error}"

    def _send(self, opening: float) -> None:
        """Closing grasps with a force, whatever is between the fingers; anything else is a position."""
        if opening > WIDTH_TOLERANCE_M / self._open_m:
            self._hand.move_async(opening * self._open_m, self._speed_m_s)
        else:
            self._hand.grasp_async(0.0, self._speed_m_s, self._force_n, epsilon_outer=self._open_m)


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("franka", FrankaHardware, config)
