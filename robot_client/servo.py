"""The servo: leads a robot along goals at the robot's own rate, and brings it to rest when they stop coming.

A goal is a change of the last one and is good until a stated moment.  Between goals the set point moves within limits
on speed, acceleration and jerk (Ruckig): goals that keep coming blend into even motion, the last one is reached
exactly, and a hold is a stop as short as the limits allow.  Runs in a process of its own (servo_process.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from ruckig import ControlInterface, InputParameter, OutputParameter, Ruckig

from robot_client.hardware import Hardware, Reading
from robot_client.pose import Pose, rotation

SMOOTHING_TICKS = 2
"""A goal is reached so many ticks after it is given: with one, an arm at 20 Hz would stop and go."""
ARRIVED_RAD = 0.01
"""A joint this close to where it was sent is there."""


@dataclass(frozen=True, kw_only=True)
class MotionLimits:
    """What the set point never exceeds, along or about any axis of the base, and how far the robot may fall behind."""

    speed_m_s: float = 0.25
    acceleration_m_s2: float = 5.0
    jerk_m_s3: float = 200.0
    speed_rad_s: float = 1.0
    acceleration_rad_s2: float = 20.0
    jerk_rad_s3: float = 800.0
    leash_m: float = 0.05
    """Farther from its set point, the robot is held up by something: it holds."""
    leash_rad: float = 0.3
    """No goal is turned farther than this from the robot: what an arm of five joints cannot turn does not add up."""
    joints_low_rad: tuple[float, ...] = ()
    """Measured joints beyond these hold, one number for each; empty: the controller's own limits alone."""
    joints_high_rad: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, tuple) and not 0 < value < math.inf:
                raise ValueError(f"{limit.name} must be above 0 and finite, got {value}")
        if len(self.joints_low_rad) != len(self.joints_high_rad):
            raise ValueError(
                "joints_low_rad and joints_high_rad must be as many, "
                f"got {len(self.joints_low_rad)} and {len(self.joints_high_rad)}"
            )
        if not np.less(self.joints_low_rad, self.joints_high_rad).all():
            raise ValueError(
                f"joints_low_rad must be below joints_high_rad, got {self.joints_low_rad} and {self.joints_high_rad}"
            )


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the robot stands, after the latest period."""

    reading: Reading
    goal: Pose
    """Where it is being led; where it is, when it is not."""
    trouble: str
    """Why it holds, though nobody told it to; empty when it does not."""
    moving: bool
    """False once the set point is at rest, or the joints have arrived."""


class SetPoint:
    """A pose on its way, one step a period."""

    def __init__(self, pose: Pose, period_s: float, limits: MotionLimits):
        self.pose = pose
        self._otg = Ruckig(6, period_s)
        self._output = OutputParameter(6)
        self._input = motion = InputParameter(6)
        motion.max_velocity = [limits.speed_m_s] * 3 + [limits.speed_rad_s] * 3
        motion.max_acceleration = [limits.acceleration_m_s2] * 3 + [limits.acceleration_rad_s2] * 3
        motion.max_jerk = [limits.jerk_m_s3] * 3 + [limits.jerk_rad_s3] * 3
        motion.current_velocity = motion.current_acceleration = motion.target_velocity = [0.0] * 6

    @property
    def twist_6(self) -> np.ndarray:
        return np.array(self._input.current_velocity)

    @property
    def at_rest(self) -> bool:
        return not any(self._input.current_velocity) and not any(self._input.current_acceleration)

    def towards(self, goal: Pose, within_s: float) -> None:
        """A step to a goal that is to be reached in within_s, or later if the limits demand it."""
        self._input.control_interface = ControlInterface.Position
        self._input.target_position = self.pose.change_to(goal)
        self._input.minimum_duration = max(within_s, self._otg.delta_time)  # Ruckig may fail where there is no time
        self._step()

    def to_rest(self) -> None:
        """A step of the shortest stop."""
        self._input.control_interface = ControlInterface.Velocity
        self._input.minimum_duration = None
        self._step()

    def _step(self) -> None:
        self._input.current_position = [0.0] * 6  # every step starts from a frame at the set point
        self._otg.update(self._input, self._output)
        self.pose = self.pose.moved(np.array(self._output.new_position))
        self._input.current_velocity = self._output.new_velocity
        self._input.current_acceleration = self._output.new_acceleration


class Servo:
    """Calls of one thread: commands as they come, and step() once a period.  Any of them may raise ArmError."""

    def __init__(
        self,
        hardware: Hardware,
        limits: MotionLimits,
        *,
        tick_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self._hardware = hardware
        self._limits = limits
        self._tick_s = tick_s
        self._clock_s = clock_s
        self._reading = hardware.read()
        self._set_point: SetPoint | None = None
        self._goal: Pose | None = None
        self._due_s = self._expires_s = 0.0
        self._joints_J: np.ndarray | None = None
        self._opening: float | None = None
        self._trouble = ""

    @property
    def status(self) -> Status:
        at_rest = self._set_point is None or self._set_point.at_rest
        return Status(
            reading=self._reading,
            goal=self._goal or self._pose,
            trouble=self._trouble,
            moving=not at_rest or self._goal is not None or self._joints_J is not None,
        )

    def go(self, change_6: np.ndarray, opening: float, expires_s: float) -> None:
        """Moves the goal by (m, rad) along the axes of the base, and the gripper to an opening.

        Does nothing in trouble, or where it has expired already, which is one: a hold must answer that first.
        """
        if self._trouble or not self._is_vouched_for(expires_s):
            return
        if self._set_point is None:
            self.release()
            self._hardware.begin()
            self._reading = self._hardware.read()  # a person may have moved it since the last
            self._set_point = SetPoint(self._reading.pose, 1 / self._hardware.rate_hz, self._limits)
        self._goal = self._leashed((self._goal or self._set_point.pose).moved(change_6))
        if change_6.any():  # else the goal before is due when it was
            self._due_s = self._clock_s() + SMOOTHING_TICKS * self._tick_s
        self._grip(opening)

    def go_home(self, joints_J: np.ndarray, speed: float, opening: float, expires_s: float) -> None:
        """Sets out for these joint positions (rad); renewed by the same call, or it stops when it expires."""
        if not self._is_vouched_for(expires_s):
            return
        self._trouble = ""
        self._grip(opening)
        if self._joints_J is not None and np.array_equal(self._joints_J, joints_J):
            return
        self.release()
        if not self._is_at(joints_J):
            self._joints_J = joints_J
            self._hardware.move_joints(joints_J, speed)

    def hold(self, answered: str = "") -> None:
        """Comes to rest, and stays.

        answered: the trouble that the client has been told of: the next goal is followed again, unless it lasts.  One
        that it does not know of yet stays, and tells it why the robot has held.
        """
        self._goal = None
        if self._trouble == answered:
            self._trouble = ""
        if self._joints_J is not None:
            self.release()

    def release(self) -> None:
        """Stops, and gives control back to the robot's own controller."""
        if self._set_point is not None or self._joints_J is not None:
            self._hardware.stop()
        self._set_point = self._goal = self._joints_J = None

    def recover(self) -> None:
        """Clears a fault, at a person's word."""
        self.release()
        self._hardware.recover()
        self._reading, self._trouble = self._hardware.read(), ""
        self._opening = None  # where the gripper is now, nobody knows

    def step(self) -> None:
        """One period: reads the robot, and gives it its next set point."""
        self._reading = self._hardware.read()
        if self._reading.fault:
            self.release()
        elif self._joints_J is not None:
            self._step_home(self._joints_J)
        else:
            self._step_set_point()

    def _step_home(self, joints_J: np.ndarray) -> None:
        self._trouble = self._silence()
        if self._trouble or self._is_at(joints_J):
            self.release()

    def _is_at(self, joints_J: np.ndarray) -> bool:
        return bool(np.abs(self._reading.joints_J - joints_J).max() < ARRIVED_RAD)

    def _step_set_point(self) -> None:
        if trouble := self._silence() or self._hindrance() or self._strain():
            self._trouble, self._goal = trouble, None
        if self._set_point is None:
            return
        if self._goal is None:
            self._set_point.to_rest()
        else:
            self._set_point.towards(self._goal, self._due_s - self._clock_s())
        self._hardware.servo(self._set_point.pose, self._set_point.twist_6)

    def _is_vouched_for(self, expires_s: float) -> bool:
        """Takes a command up, or says what is the trouble with one that has waited too long on its way."""
        self._expires_s = expires_s
        if trouble := self._expiry():
            self._trouble, self._goal = trouble, None
        return not trouble

    def _silence(self) -> str:
        """The dead man: nobody stands behind the goal any more."""
        return "" if self._goal is None and self._joints_J is None else self._expiry()

    def _expiry(self) -> str:
        late_s = self._clock_s() - self._expires_s
        return f"no word from the client: its last command expired {1e3 * late_s:.0f} ms ago" if late_s > 0 else ""

    def _hindrance(self) -> str:
        """Something holds the robot up: the next goal starts from where it is."""
        behind_m = float(np.linalg.norm(self._pose.position_m - self._reading.pose.position_m))
        if behind_m <= self._limits.leash_m:
            return ""
        self.release()
        return f"the robot is {behind_m:.3f} m behind its set point, limit {self._limits.leash_m:g} m"

    def _strain(self) -> str:
        bounds = zip(self._reading.joints_J, self._limits.joints_low_rad, self._limits.joints_high_rad, strict=False)
        for j, (angle, low, high) in enumerate(bounds):
            if not low <= angle <= high:
                return f"joint {j + 1} is at {angle:.3f} rad, limits {low:g} to {high:g}"
        return ""

    def _leashed(self, goal: Pose) -> Pose:
        """The goal, turned no farther from the robot than the leash allows."""
        turn_rad = self._reading.pose.change_to(goal)[3:]
        excess = float(np.linalg.norm(turn_rad)) / self._limits.leash_rad
        return goal if excess <= 1 else Pose(goal.position_m, rotation(turn_rad / excess) @ self._reading.pose.rotation)

    @property
    def _pose(self) -> Pose:
        return self._reading.pose if self._set_point is None else self._set_point.pose

    def _grip(self, opening: float) -> None:
        if opening != self._opening:
            self._hardware.grip(opening)
            self._opening = opening
