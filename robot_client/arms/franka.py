"""Franka's Panda and FR3 through franky (the extra `franka`), which plans each millisecond between our set points.

A set point is a pose with a velocity.  franky's loop in this process speaks to the robot at 1 kHz: should the process
stall, the robot misses its packets and stops by itself, after 20 of them as libfranka documents; should only our thread
stall, franky comes to rest at the last set point.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import franky
import numpy as np

from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose
from robot_client.real_arm import RealArm, RealArmConfig

CONNECT_S = 5.0
REST_S = 3.0
"""How long a stop may take; once the robot is silent, libfranka gives a motion up after one second."""
HAND_S = 5.0
"""How long the hand may take for what it was told last; fully closing takes a second."""
HAND_PERIOD_S = 0.02
WIDTH_TOLERANCE_M = 0.002
PERIODS_AHEAD = 2
"""A set point is reached so long after it is given: the next may then be late by a period, and nobody feels it."""
AT_ONCE = franky.RelativeDynamicsFactor.MAX_DYNAMICS
"""Within the robot's own limits, each axis for itself: asked to end all at one time, Ruckig may fail near the end."""
READY = (franky.RobotMode.Idle, franky.RobotMode.Move)
FAILURES = (franky.Exception, franky.InvalidMotionTypeException, RuntimeError, ValueError, TimeoutError)
"""libfranka's own, franky's, and those of the planner, the checks and the sockets below, which come as Python's."""
Client = TypeVar("Client")
log = logging.getLogger(__name__)


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
        """host: its address.  dynamics: fraction of the robot's limits on speed, acceleration and jerk that is full
        speed on the way home.  realtime: insist on a real-time kernel, as Franka advises."""
        if not 0 < dynamics <= 1:
            raise ValueError(f"dynamics must be in (0, 1], got {dynamics:g}")
        self.rate_hz = rate_hz
        self._dynamics = dynamics
        self._fault, self._closed = "", False
        self._stop: type[franky.CartesianStopMotion | franky.JointStopMotion] | None = None
        kernel = franky.RealtimeConfig.Enforce if realtime else franky.RealtimeConfig.Ignore
        try:
            self._robot = _dial(franky.Robot, host, realtime_config=kernel)
        except FAILURES as error:
            raise ArmError(f"no Franka at {host}: {error}") from error
        try:
            self._hand = _Hand(host, force_n=grip_force_n, speed_m_s=grip_speed_m_s) if hand else None
        except FAILURES as error:
            del self._robot  # a traceback would keep it, and with it the connection
            raise ArmError(f"no hand at {host}: {error}") from error

    def read(self) -> Reading:
        self._attempt(self._robot.poll_motion)  # raises what ended the last motion
        try:
            state = self._robot.state
        except FAILURES as error:
            raise ArmError(f"lost the Franka: {error}") from error
        if state.robot_mode not in READY:
            self._fail(f"the robot is in mode {state.robot_mode.name} ({state.current_errors})")
        if self._hand and self._hand.fault:
            self._fail(self._hand.fault)
        if self._fault:
            self.stop()
        matrix_44 = np.array(state.O_T_EE.matrix)
        return Reading(
            pose=Pose(matrix_44[:3, 3], matrix_44[:3, :3]),
            joints_J=np.array(state.q),
            opening=self._hand.opening if self._hand else 1.0,
            fault=self._fault,
        )

    def begin(self) -> None:
        self._come_to_rest()

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        """Through the set point with its velocity; back to it, to rest there, when no other comes."""
        matrix_44 = np.eye(4)
        matrix_44[:3, :3], matrix_44[:3, 3] = pose.rotation, pose.position_m
        velocity = franky.RobotVelocity(franky.Twist(twist_6[:3], twist_6[3:]))
        state = franky.CartesianState(franky.RobotPose(franky.Affine(matrix_44)), velocity)
        due = franky.Duration(round(1000 * PERIODS_AHEAD / self.rate_hz))
        there = franky.CartesianWaypoint(state, minimum_time=due)
        rest = franky.CartesianWaypoint(franky.Affine(), franky.ReferenceType.Relative, AT_ONCE)
        motion = franky.CartesianWaypointMotion([there, rest], return_when_finished=False)
        self._lead(motion, franky.CartesianStopMotion)

    def stop(self) -> None:
        if self._stop and self._robot.is_in_control:
            self._attempt(self._robot.move, self._stop(AT_ONCE), asynchronous=True)
        self._stop = None

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        self._come_to_rest()
        factor = self._dynamics * speed
        motion = franky.JointMotion(joints_J, relative_dynamics_factor=factor, return_when_finished=False)
        self._lead(motion, franky.JointStopMotion)

    def grip(self, opening: float) -> None:
        if self._hand:
            self._hand.move(opening)

    def recover(self) -> None:
        try:
            self._robot.recover_from_errors()
        except FAILURES as error:
            raise ArmError(f"the Franka does not recover: {error}") from error
        if self._hand:
            self._hand.recover()
        self._fault = ""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._attempt(self._robot.join_motion, REST_S)
        if self._hand:
            self._hand.close()
        # Their ends close the connections, and the robot takes no second ones before.
        del self._robot, self._hand

    def _lead(self, motion: franky.Motion, stop: type[franky.CartesianStopMotion | franky.JointStopMotion]) -> None:
        """On a motion that does not end by itself: the next one would begin while it is still doing so."""
        if not self._fault:
            self._stop = stop
            self._attempt(self._robot.move, motion, asynchronous=True)

    def _come_to_rest(self) -> None:
        """The kind of motion can change at rest only, and a pose in motion is out of date."""
        self.stop()
        if self._attempt(self._robot.join_motion, REST_S) is False:
            raise ArmError(f"the Franka has not come to rest in {REST_S:g} s")
        # A round trip: franky-sim takes the last packet of a motion for one of the next, where they come together.
        self.read()

    def _attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A failure is a fault; it may be that of the motion before, which franky raises with the next call."""
        try:
            return call(*arguments, **options)
        except FAILURES as error:
            self._fail(str(error))

    def _fail(self, words: str) -> None:
        self._fault = self._fault or words


class _Hand:
    """Franka's hand, which answers a command when it is done and a reading when it sends one: threads wait for both.

    A command is sent when the one before is done: franky-sim never answers one that another overtakes.
    """

    def __init__(self, host: str, *, force_n: float, speed_m_s: float):
        self._hand = _dial(franky.Gripper, host)
        self._force_n, self._speed_m_s = force_n, speed_m_s
        self._open_m = self._hand.max_width or 0.08
        self._asked = self._sent = None
        self.fault = ""
        self._watch()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=[work], name="hand", daemon=True)
            for work in (self._watch, self._obey)
        ]
        for thread in self._threads:
            thread.start()

    def move(self, opening: float) -> None:
        self._asked = opening

    def recover(self) -> None:
        """Stays as it is until it is asked for something again."""
        self._asked = self._sent = None
        self.fault = ""

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(HAND_S)
            if thread.is_alive():
                log.warning("Franka's hand has not answered for %g s, and keeps its connection until it does", HAND_S)
        del self._hand

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._closing.wait(HAND_PERIOD_S):
            try:
                work()
            except FAILURES as error:
                self.fault = f"hand: {error}"

    def _watch(self) -> None:
        self.opening = min(max(self._hand.width / self._open_m, 0.0), 1.0)

    def _obey(self) -> None:
        """Closing grasps with a force, whatever is between the fingers; anything else is a position."""
        opening = self._asked
        if opening is None or opening == self._sent or self.fault:
            return
        self._sent = opening
        if opening > WIDTH_TOLERANCE_M / self._open_m:
            self._hand.move(opening * self._open_m, self._speed_m_s)
        else:
            self._hand.grasp(0.0, self._speed_m_s, self._force_n, epsilon_outer=self._open_m)


def _dial(make: Callable[..., Client], host: str, **options: Any) -> Client:
    """A client of the robot.  libfranka would wait for ever for one that has a client already: TimeoutError instead."""
    answer: Future[Client] = Future()

    def dial() -> None:
        try:
            answer.set_result(make(host, **options))
        except Exception as error:  # the caller's, whichever it is
            answer.set_exception(error)

    threading.Thread(target=dial, name="dial", daemon=True).start()
    if wait([answer], CONNECT_S).not_done:
        raise TimeoutError(f"no answer in {CONNECT_S:g} s, as when it has another client")
    return answer.result()


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("franka", FrankaHardware, config)
