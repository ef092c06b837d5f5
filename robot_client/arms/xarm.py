"""UFACTORY's xArm 5, 6 and 7, 850 and Lite 6, through the vendor's SDK (the extra `xarm`), firmware 2.4.101 or later.

Set points are absolute poses in servo mode, joint motion is planned by the controller in position mode; at rest the arm
stands ready in servo mode.  Reading waits for nothing: the SDK keeps the 100 Hz report of port 30003, which firmware
2.4.0 and later fill from the encoders.  Error codes are not in it, and are asked for when something is wrong.
Switched off in the SDK: what waits for the arm to move on, and what clears an error to set a baud rate.

What the SDK is asked takes a round trip (1 to 3 ms to a real arm): servo() one, stop() five, of which the first stops.
begin() right after stop(), and move_joints(), wait for a change of mode; recover() waits for the brakes.

A fault stays until recover(), whatever the controller says later; a set point that is refused is one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from xarm.core.config.x_code import ControllerError, ControllerWarn
from xarm.wrapper import XArmAPI
from xarm.x3.code import APIState

from robot_client.arms.xarm_gripper import GRIPPERS
from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose, rotation, rotation_vector
from robot_client.real_arm import RealArm, RealArmConfig

FIRMWARE = (2, 4, 101)
MAX_RATE_HZ = 250.0
"""The controller drops what comes faster."""
MAX_STEP_M = 0.01
"""The controller ignores a set point farther from the one before."""
MAX_SPEED_RAD_S = math.pi
REPORT_S = 0.01
SAME_RAD = 0.1

POSITION, SERVO = 0, 1
STOP = 4
READY = (0, 1, 2)
STATES = {3: "paused", 4: "stopped", 5: "set up anew"}
API_CODES = {code: name for name, code in vars(APIState).items() if isinstance(code, int)}

logging.getLogger("origin.print").setLevel(logging.WARNING)  # else the SDK prints a line at every stop


@dataclass(frozen=True, kw_only=True)
class _Report:
    at_s: float
    state: int
    mode: int
    pose_6: list[float]
    """mm; roll, pitch, yaw in rad."""
    joints_7: list[float]


class XArmHardware:
    """One arm.  A set point is a position: with no call after servo() it rests there, and no watchdog is needed."""

    watchdog_s = math.inf

    def __init__(
        self,
        *,
        host: str,
        rate_hz: float = 100.0,
        gripper: Literal["xarm", "lite6", "none"] = "xarm",
        patience_s: float = 0.2,
    ):
        """host: address, in numbers.  patience_s: how long an answer, a report or a change of mode may take."""
        if not 0 < rate_hz <= MAX_RATE_HZ:
            raise ValueError(f"rate_hz must be above 0 and at most {MAX_RATE_HZ:g}, got {rate_hz:g}")
        if gripper not in GRIPPERS:
            raise ValueError(f"gripper must be one of {sorted(GRIPPERS)}, got {gripper!r}")
        self.rate_hz = rate_hz
        self._host, self._patience_s = host, patience_s
        self._report = _Report(at_s=-math.inf, state=STOP, mode=POSITION, pose_6=[], joints_7=[])
        self._mode, self._entered_s, self._moving, self._fault = POSITION, -math.inf, False, ""
        self._gripper = GRIPPERS["none"](None)
        self._arm = _connect(host)
        try:
            self._open(gripper)
        except ArmError:
            self.close()
            raise
        self._set_point_m = self.read().pose.position_m

    def _open(self, gripper: str) -> None:
        if self._arm.version_number < FIRMWARE:
            wanted, found = (".".join(map(str, version)) for version in (FIRMWARE, self._arm.version_number))
            raise ArmError(f"the xArm at {self._host} needs firmware {wanted} or later, got {found}")
        self._arm.set_timeout(self._patience_s)
        self._arm.register_report_callback(self._on_report)
        self._wait(lambda: self._report.joints_7, "report")
        self._gripper = GRIPPERS[gripper](self._arm)
        if not self._complaint():  # a fault that is there already is left for a person to see
            self._require(self._arm.motion_enable(True), "power")
            self._enter(SERVO)
            self._wait(self._in_force, f"mode {SERVO}")

    def read(self) -> Reading:
        age_s = time.monotonic() - self._report.at_s
        if age_s > self._patience_s:
            raise ArmError(f"the xArm at {self._host} has said nothing for {age_s:.2f} s")
        report = self._report
        self._fault = self._fault or self._look(report)
        return Reading(
            pose=_pose(report.pose_6),
            joints_J=np.array(report.joints_7[: self._arm.axis]),
            opening=self._gripper.opening,
            fault=self._fault,
        )

    def begin(self) -> None:
        self._settle(SERVO)
        self._agree()
        self._set_point_m = self.read().pose.position_m
        self._moving = True

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        step_m = float(np.linalg.norm(pose.position_m - self._set_point_m))
        if step_m > MAX_STEP_M:
            raise ArmError(f"a set point must be within {MAX_STEP_M:g} m of the one before, got {step_m:.4f} m")
        goal_6 = [*(1e3 * pose.position_m), *pose.rotation_vector_rad]
        try:
            self._require(self._arm.set_servo_cartesian_aa(goal_6, is_radian=True), "a set point")
            self._set_point_m = pose.position_m
        except ArmError as error:  # as when something happened since the last read()
            self._fault = self._fault or str(error)

    def stop(self) -> None:
        if self._moving:
            self._require(self._arm.set_state(STOP), "a stop")
            self._moving = False
            if not self._fault:  # else it stays stopped: to make it ready is to clear what others have done
                self._enter(SERVO)

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        if len(joints_J) != self._arm.axis:
            raise ArmError(f"the xArm at {self._host} has {self._arm.axis} joints, got {len(joints_J)} positions")
        self._settle(POSITION)
        self._moving = True  # whatever becomes of the answer
        code = self._arm.set_servo_angle(angle=list(joints_J), speed=speed * MAX_SPEED_RAD_S, is_radian=True)
        self._require(code, f"joint positions {np.round(joints_J, 3).tolist()}")

    def grip(self, opening: float) -> None:
        self._gripper.move(opening)

    def recover(self) -> None:
        for clear in (self._arm.clean_error, self._arm.clean_warn, self._gripper.recover):
            clear()
        self._arm.motion_enable(True)
        self._moving, self._fault = False, ""
        self._enter(SERVO)
        self._complaint()  # else the SDK goes on by the old code

    def close(self) -> None:
        with contextlib.suppress(ArmError):
            self.stop()
        self._gripper.close()
        self._arm.disconnect()

    def _on_report(self, told: dict[str, Any]) -> None:
        """In a thread of the SDK."""
        pose_6, joints_7 = told["cartesian"], told["joints"]
        self._report = _Report(
            at_s=time.monotonic(), state=told["state"], mode=self._arm.mode, pose_6=pose_6, joints_7=joints_7
        )

    def _look(self, report: _Report) -> str:
        """What keeps the arm from moving; empty when nothing does."""
        stopped = report.state not in READY
        if (stopped or self._arm.has_err_warn) and (complaint := self._complaint()):
            return complaint
        if time.monotonic() > self._entered_s + self._patience_s:  # before, it may still tell of our own change of mode
            if stopped:
                return f"{STATES.get(report.state, 'stopped')} by somebody else: state {report.state}"
            if report.mode != self._mode:
                return f"put in mode {report.mode} by somebody else, it was in mode {self._mode}"
        return self._gripper.fault

    def _complaint(self) -> str:
        """Its error, or else its warning, in the vendor's words; empty when there is none."""
        code, codes = self._arm.get_err_warn_code()
        if code != 0:
            raise ArmError(f"the xArm at {self._host} does not answer: {API_CODES.get(code, 'unknown')} ({code})")
        for letter, number, kind in zip("CW", codes, (ControllerError, ControllerWarn), strict=True):
            if number:
                told = kind(number)
                return f"{letter}{number}: {told.title['en']}. {told.description['en']}".rstrip(". ")
        return ""

    def _require(self, code: int, what: str) -> None:
        if code == 0:
            return
        why = self._complaint() if code in (APIState.HAS_ERROR, APIState.STATE_NOT_READY) else ""
        name = API_CODES.get(code, "unknown")
        raise ArmError(f"the xArm at {self._host} did not take {what}: {name} ({code}) {why}".rstrip())

    def _enter(self, mode: int) -> None:
        """Sets out for a mode; the controller drops all motion on the way."""
        self._require(self._arm.set_mode(mode), f"mode {mode}")
        self._require(self._arm.set_state(0), "a start")
        self._mode, self._entered_s = mode, time.monotonic()

    def _settle(self, mode: int) -> None:
        """At rest in a mode, or ArmError: a fault is not for us to clear."""
        if fault := self.read().fault:
            raise ArmError(f"the xArm at {self._host} will not move: {fault}")
        self.stop()
        if self._mode != mode:
            self._enter(mode)
        self._wait(self._in_force, f"mode {mode}")

    def _in_force(self) -> bool:
        """Whether it is ready in the mode that it was last put in; asked for, as a report may be from before."""
        code, state = self._arm.get_state()
        self._require(code, "a question for its state")
        return state in READY and self._report.mode == self._mode

    def _wait(self, done: Callable[[], object], what: str) -> None:
        until_s = time.monotonic() + self._patience_s
        while not done():
            if time.monotonic() > until_s:
                told = f"mode {self._report.mode}, state {self._report.state}"
                raise ArmError(f"the xArm at {self._host}: no {what} within {self._patience_s:g} s, it is in {told}")
            time.sleep(REPORT_S / 2)

    def _agree(self) -> None:
        """Poses come as roll, pitch, yaw and go as axis and angle: an arm that means two things by them is not led."""
        code, pose_6 = self._arm.get_position_aa(is_radian=True)
        self._require(code, "a question for its pose")
        apart_rad = float(np.linalg.norm(rotation_vector(rotation(np.array(pose_6[3:])).T @ self.read().pose.rotation)))
        if apart_rad > SAME_RAD:
            raise ArmError(f"the xArm at {self._host} tells of two rotations {apart_rad:.2f} rad apart for one pose")


def _connect(host: str) -> XArmAPI:
    timeout_s = socket.getdefaulttimeout()  # the SDK changes it for the whole process
    try:
        return XArmAPI(
            host,
            is_radian=True,
            report_type="real",
            check_is_pause=False,
            check_cmdnum_limit=False,
            baud_checkset=False,
            forbid_uds=True,
        )
    except Exception as error:
        raise ArmError(f"no xArm at {host}: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout_s)


def _pose(pose_6: list[float]) -> Pose:
    """From mm and roll, pitch, yaw: about the base's x, then its y, then its z."""
    roll, pitch, yaw = (rotation(angle * axis) for angle, axis in zip(pose_6[3:], np.eye(3), strict=True))
    return Pose(np.array(pose_6[:3]) / 1e3, yaw @ pitch @ roll)


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("xarm", XArmHardware, config)
