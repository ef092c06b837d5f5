"""A Universal Robots arm (e-Series, CB3) through ur_rtde (the extra `ur`), with or without Robotiq's gripper.

The arm must be in remote control, under power and with its brakes released.  A gripper that is not active is a fault.

ur_rtde uploads a script and hands it commands through registers: a handshake takes some 10 ms, a stop until the arm is
at rest, a missing script 3 s.  So a thread of our own gives the commands, in the order in which they came; of set
points only the latest counts.

The controller's watchdog guards every motion.  Only servo() feeds it while the arm is led, so a silent caller stops the
arm; at rest, and in move_joints() as long as read() is called, the thread does.

A lost connection ends this object and should end its process: ur_rtde 1.6.5 reconnects in a thread that never stops
doing so, and may crash.  It is told not to upload scripts by itself, so that it cannot set the arm going again.
"""

from __future__ import annotations

import contextlib
import platform
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from robot_client.arms.robotiq import RobotiqGripper
from robot_client.errors import ArmError
from robot_client.hardware import Reading
from robot_client.pose import Pose
from robot_client.real_arm import RealArm, RealArmConfig

try:
    from dashboard_client import DashboardClient
    from rtde_control import RTDEControlInterface
    from rtde_receive import RTDEReceiveInterface
except ImportError as error:
    raise ImportError(f"{error}; ur_rtde is for Python 3.12 or older, this is {platform.python_version()}") from error

VARIABLES = ["timestamp", "actual_q", "actual_TCP_pose", "robot_mode", "safety_mode", "runtime_state"]
SAFETY_MODES = (
    "NORMAL REDUCED PROTECTIVE_STOP RECOVERY SAFEGUARD_STOP SYSTEM_EMERGENCY_STOP ROBOT_EMERGENCY_STOP VIOLATION FAULT "
    "VALIDATE_JOINT_ID UNDEFINED_SAFETY_MODE AUTOMATIC_MODE_SAFEGUARD_STOP SYSTEM_THREE_POSITION_ENABLING_STOP"
)
"""From 1 on; these words are the RTDE guide's."""
ROBOT_MODES = "DISCONNECTED CONFIRM_SAFETY BOOTING POWER_OFF POWER_ON IDLE BACKDRIVE RUNNING UPDATING_FIRMWARE"
RUNTIME_STATES = "STOPPING STOPPED PLAYING PAUSING PAUSED RESUMING"
SILENCE_S = 0.5
"""A controller sends 125 or 500 times a second; silent for longer, and longer than its watchdog waits, it is gone."""
START_S = 2.0
"""How long an uploaded script may take to run, and a released arm to be ready."""
STOP_M_S2 = 10.0
"""How hard the tool is stopped, and its turning in rad/s^2: from 0.25 m/s in 25 ms."""
JOINT_ACCELERATION_RAD_S2 = 1.4


class URHardware:
    """Its tool centre point and payload are those of the installation on the controller."""

    def __init__(
        self,
        *,
        host: str,
        rate_hz: float = 125.0,
        lookahead_time_s: float = 0.1,
        gain: float = 300.0,
        watchdog_hz: float = 10.0,
        joint_speed_rad_s: float = 3.14,
        gripper: Literal["robotiq", "none"] = "robotiq",
        gripper_port: int = 63352,
        gripper_force: int = 50,
    ):
        """lookahead_time_s, gain: of servoj.  watchdog_hz: fewer set points a second, and the controller stops the arm.
        joint_speed_rad_s: what move_joints() calls full.  Raises ArmError.
        """
        for name, value, low, high in [
            ("rate_hz", rate_hz, 50, 500),
            ("lookahead_time_s", lookahead_time_s, 0.03, 0.2),
            ("gain", gain, 100, 2000),
            ("watchdog_hz", watchdog_hz, 0.2, rate_hz / 2),
            ("joint_speed_rad_s", joint_speed_rad_s, 0.01, 3.14),
        ]:
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low:g} to {high:g}, got {value:g}")
        if gripper not in ("robotiq", "none"):
            raise ValueError(f"gripper must be 'robotiq' or 'none', got {gripper!r}")
        self.rate_hz, self.watchdog_s = rate_hz, 1 / watchdog_hz
        self._host, self._joint_speed_rad_s = host, joint_speed_rad_s
        self._servo_settings = (0.0, 0.0, 1 / rate_hz, lookahead_time_s, gain)  # the first two are unused
        self._set_points: deque[list[float]] = deque(maxlen=1)
        self._stamp_s = self._fresh_s = 0.0
        self._lost = self._closed = False
        self._gripper: RobotiqGripper | None = None
        self._receive = self._ask("connect", lambda: RTDEReceiveInterface(host, -1.0, VARIABLES))
        if trouble := self._look(program=False):
            raise ArmError(f"the UR at {host} is not ready: {trouble}")
        no_upload = int(RTDEControlInterface.FLAG_NO_WAIT)
        self._control = self._ask("connect", lambda: RTDEControlInterface(host, -1.0, no_upload))
        self._start()
        if gripper == "robotiq":
            try:
                self._gripper = RobotiqGripper(host, port=gripper_port, force=gripper_force)
            except ArmError:
                self.close()
                raise

    def read(self) -> Reading:
        self._read_s = time.monotonic()
        self._lost = self._lost or not (self._receive.isConnected() and self._control.isConnected())
        if self._lost:
            raise ArmError(f"lost the connection to the UR at {self._host}: connect anew, in a new process")
        if self._fault in ("", self._refusal):  # a refusal gives way to its cause, once the robot tells it
            self._fault = self._look() or self._refusal
        return Reading(
            pose=_pose(self._receive.getActualTCPPose()),
            joints_J=np.array(self._receive.getActualQ()),
            opening=1.0 if self._gripper is None else self._gripper.opening,
            fault=self._fault,
        )

    def begin(self) -> None:
        self._mode = "servo"

    def servo(self, pose: Pose, twist_6: np.ndarray) -> None:
        self._set_points.append([*pose.position_m.tolist(), *pose.rotation_vector_rad.tolist()])
        self._errands.put(self._send_set_point)

    def stop(self) -> None:
        self._set_points.clear()
        mode, self._mode = self._mode, "rest"
        if mode == "servo":
            self._errands.put(partial(self._order, "servoStop", STOP_M_S2))
        elif mode == "move":
            self._errands.put(self._stop_move)

    def move_joints(self, joints_J: np.ndarray, speed: float) -> None:
        if len(joints_J) != 6 or not 0 < speed <= 1:
            raise ArmError(f"a UR moves 6 joints at a speed in (0, 1], got {len(joints_J)} at {speed:g}")
        self.stop()
        self._mode = "move"
        pace = (speed * self._joint_speed_rad_s, JOINT_ACCELERATION_RAD_S2)
        self._errands.put(partial(self._order, "moveJ", joints_J.tolist(), *pace, True))

    def grip(self, opening: float) -> None:
        if self._gripper is not None:
            self._gripper.move(opening)

    def recover(self) -> None:
        """Blocks until the arm would move again, or raises ArmError: why it would not.

        Releases a protective stop (the controller refuses in its first 5 s) and uploads the script anew.  Power, brakes
        and the emergency button are left to the person at the robot.
        """
        if not self.read().fault:
            return
        look = partial(self._look, program=False)
        if trouble := _patiently(look) if self._unlock() else look():
            raise ArmError(f"the UR at {self._host} needs a person: {trouble}")
        if self._gripper is not None:
            self._gripper.recover()
        if not self._end_work():
            raise ArmError(f"ur_rtde is still waiting for the UR at {self._host}")
        self._start()

    def close(self) -> None:
        """Blocks for the second that ur_rtde takes to disconnect; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        if self._gripper is not None:
            self._gripper.close()
        self._receive.disconnect()
        if not self._lost and self._end_work():  # else the thread keeps ur_rtde's object: to free it is what crashes
            self._ask("stop the script", self._control.stopScript)
            self._control.disconnect()

    def _unlock(self) -> bool:
        """Releases a protective stop; False when there is none."""
        dashboard = DashboardClient(self._host)
        self._ask("reach the dashboard", dashboard.connect)
        try:
            if "PROTECTIVE_STOP" not in self._ask("ask for the safety mode", dashboard.safetymode):
                return False
            self._ask("close the pop-up", dashboard.closeSafetyPopup)
            self._ask("unlock the protective stop", dashboard.unlockProtectiveStop)
            return True
        finally:
            dashboard.disconnect()

    def _look(self, program: bool = True) -> str:
        """What keeps the arm from moving; empty when nothing does.  program: whether the script should run."""
        now_s, stamp_s = time.monotonic(), self._receive.getTimestamp()
        if stamp_s != self._stamp_s:
            self._stamp_s, self._fresh_s = stamp_s, now_s
        elif now_s - self._fresh_s > max(SILENCE_S, self.watchdog_s):
            return f"nothing from {self._host} for {now_s - self._fresh_s:.1f} s"
        # From effect to cause: between two of them a newer packet may come, and the cause is then not missed.
        state = _word(RUNTIME_STATES, self._receive.getRuntimeState())
        mode = _word(ROBOT_MODES, self._receive.getRobotMode())
        safety = _word(SAFETY_MODES, self._receive.getSafetyMode() - 1)
        if safety not in ("NORMAL", "REDUCED"):
            return f"safety mode {safety}"
        if mode != "RUNNING":
            return f"robot mode {mode}"
        if not program:
            return ""
        if state != "PLAYING":
            return f"the program on the controller is {state}"
        return "" if self._gripper is None else self._gripper.fault

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            raise ArmError(f"cannot {what}, UR at {self._host}: {error}") from error

    def _start(self) -> None:
        """Uploads the script, sets its watchdog and starts the thread that gives it commands."""
        self._ask("clear the last command", self._control.kickWatchdog)  # else the new script takes it up
        self._ask("upload the script", self._control.reuploadScript)
        if trouble := _patiently(lambda: self._look() or self._set_watchdog()):
            raise ArmError(f"the script does not run on the UR at {self._host}: {trouble}; is it in remote control?")
        self._set_points.clear()
        self._mode, self._fault, self._refusal, self._read_s = "rest", "", "", time.monotonic()
        self._errands: queue.SimpleQueue = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, args=(self._errands,), name="ur", daemon=True)
        self._worker.start()

    def _set_watchdog(self) -> str:
        is_set = self._ask("set the watchdog", lambda: self._control.setWatchdog(1 / self.watchdog_s))
        return "" if is_set else "it refuses its watchdog"

    def _end_work(self) -> bool:
        """False when the thread waits for ur_rtde."""
        self._errands.put(None)
        self._worker.join(START_S)
        return not self._worker.is_alive()

    # What the thread does.

    def _work(self, errands: queue.SimpleQueue) -> None:
        while True:
            try:
                errand = errands.get(timeout=self.watchdog_s / 4)
            except queue.Empty:
                errand = self._feed_watchdog
            if errand is None:
                return
            try:
                if not (self._fault or self._lost) and self._control.isConnected():
                    errand()  # else the arm is told nothing more, and its watchdog stops it
            except (ArmError, RuntimeError, ValueError) as error:
                self._refusal = self._refusal or str(error)

    def _feed_watchdog(self) -> None:
        read_lately = time.monotonic() - self._read_s < self.watchdog_s
        if self._mode == "rest" or (self._mode == "move" and read_lately):
            self._control.kickWatchdog()

    def _order(self, name: str, *arguments: Any) -> None:
        if getattr(self._control, name)(*arguments) is False:
            raise ArmError(f"the controller has refused {name}")

    def _send_set_point(self) -> None:
        with contextlib.suppress(IndexError):  # a later one has taken its place, or a stop
            self._order("servoL", self._set_points.popleft(), *self._servo_settings)

    def _stop_move(self) -> None:
        self._order("stopJ", STOP_M_S2, True)
        while self._control.getAsyncOperationProgressEx().isAsyncOperationRunning():
            self._order("kickWatchdog")  # refused once the program has stopped
            time.sleep(0.01)


def _pose(pose_6: list[float]) -> Pose:
    return Pose.of(pose_6[:3], pose_6[3:])


def _word(words: str, index: int) -> str:
    return dict(enumerate(words.split())).get(index, f"number {index}")


def _patiently(look: Callable[[], str]) -> str:
    """What it still sees after START_S; empty as soon as it sees nothing."""
    until_s = time.monotonic() + START_S
    while (trouble := look()) and time.monotonic() < until_s:
        time.sleep(0.01)
    return trouble


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("ur", URHardware, config)
