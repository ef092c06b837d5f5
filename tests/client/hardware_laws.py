"""What every make of hardware promises, shown with its vendor's own SDK.  Subclassed by each make.

A servo leads the hardware in real time, as in its process, so that units, axes and rate are the ones of production.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from robot_client.cadence import Cadence
from robot_client.hardware import Hardware
from robot_client.pose import Pose
from robot_client.servo import MotionLimits, Servo

TICK_S = 0.05
VOUCHED_S = 3.0
"""How long a command is good for: a busy machine may stall that long, and what happens then is the servo's law."""
STILL_6 = np.zeros(6)
AXES = ("x", "y", "z", "about x", "about y", "about z")


class Ring:
    """A servo that runs in real time in this thread."""

    def __init__(self, hardware: Hardware, limits: MotionLimits):
        self.hardware = hardware
        self.servo = Servo(hardware, limits, tick_s=TICK_S)

    def run(self, seconds: float) -> None:
        cadence, until_s = Cadence(self.hardware.rate_hz), time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.servo.step()
            cadence.wait()

    def follow(self, change_6: np.ndarray, ticks: int, opening: float = 1.0) -> None:
        for _ in range(ticks):
            self.servo.go(change_6, opening, time.monotonic() + VOUCHED_S)
            self.run(TICK_S)

    def wait_until(self, arrived, patience_s: float) -> None:
        until_s = time.monotonic() + patience_s
        while not arrived():
            assert time.monotonic() < until_s, self.servo.status
            self.run(TICK_S)


class HardwareLaws:
    limits = MotionLimits()
    axes: tuple[str, ...] = AXES
    """Those that the robot can move along and turn about at home."""
    home_J: np.ndarray
    tolerance_m = 1e-4
    tolerance_rad = 1e-3

    @pytest.fixture
    def hardware(self) -> Hardware:
        raise NotImplementedError

    @pytest.fixture
    def ail(self, hardware: Hardware) -> Callable[[], None]:
        """Makes something go wrong with the robot that it tells of, and that need not stop it."""
        raise NotImplementedError

    @pytest.fixture
    def ring(self, hardware: Hardware) -> Ring:
        return Ring(hardware, self.limits)

    def require_arrival(self, ring: Ring, before: Pose, change_6: np.ndarray) -> None:
        """Soon, and to stay; "soon" leaves room for a simulator that shares its core and falls behind the clock."""
        tolerance_6 = np.repeat([self.tolerance_m, self.tolerance_rad], 3)

        def is_there() -> bool:
            ring.follow(STILL_6, 1)
            return bool((np.abs(before.change_to(ring.servo.status.reading.pose) - change_6) < tolerance_6).all())

        ring.wait_until(lambda: all(is_there() for _ in range(5)), 20.0)
        assert ring.servo.status.trouble == "" and ring.servo.status.reading.fault == ""

    def test_it_says_how_it_stands(self, hardware):
        reading = hardware.read()
        assert reading.fault == "" and reading.joints_J.shape == self.home_J.shape
        assert np.isfinite(reading.pose.position_m).all() and 0 <= reading.opening <= 1
        np.testing.assert_allclose(reading.pose.rotation @ reading.pose.rotation.T, np.eye(3), atol=1e-6)
        assert 10 <= hardware.rate_hz <= 1000 and hardware.watchdog_s > 0

    def test_a_reading_takes_less_than_a_period(self, hardware):
        took_s = []
        for _ in range(20):
            began_s = time.monotonic()
            hardware.read()
            took_s.append(time.monotonic() - began_s)
        assert np.median(took_s) < 1 / hardware.rate_hz

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("size", ["small", "large"])
    def test_it_moves_as_far_as_it_is_told_along_the_axis_it_is_told(self, ring, axis, size):
        """1 mm or 0.5 degrees, and twenty times that."""
        if axis not in self.axes:
            pytest.skip(f"this robot cannot move {axis} at its home alone")
        change_6, ticks = STILL_6.copy(), 1 if size == "small" else 20
        change_6[AXES.index(axis)] = 0.001 if AXES.index(axis) < 3 else math.radians(0.5)
        before = ring.servo.status.reading.pose
        ring.follow(change_6, ticks)
        self.require_arrival(ring, before, ticks * change_6)

    def test_a_hold_comes_to_rest_and_stays(self, ring):
        ring.follow(np.array([0, 0, 0.002, 0, 0, 0]), 8)
        ring.servo.hold()
        ring.run(4 * TICK_S)
        resting = ring.servo.status.reading.pose
        ring.run(0.3)
        drift_6 = resting.change_to(ring.servo.status.reading.pose)
        assert np.abs(drift_6[:3]).max() < self.tolerance_m and np.abs(drift_6[3:]).max() < self.tolerance_rad

    def test_control_is_given_back_and_taken_again(self, ring):
        for _ in range(2):
            before = ring.servo.status.reading.pose
            ring.follow(np.array([0, 0, 0.002, 0, 0, 0]), 5)
            self.require_arrival(ring, before, np.array([0, 0, 0.01, 0, 0, 0]))
            ring.servo.release()
            ring.run(0.1)

    def test_it_goes_home_by_its_joints(self, ring):
        ring.follow(np.array([0, 0, 0.002, 0, 0, 0]), 5)
        for joints_J in (self.home_J + 0.05, self.home_J):

            def there(goal_J=joints_J):
                ring.servo.go_home(goal_J, 0.5, 1.0, time.monotonic() + 1)
                return not ring.servo.status.moving

            ring.wait_until(there, 15.0)
            np.testing.assert_allclose(ring.servo.status.reading.joints_J, joints_J, atol=0.02)

    def test_a_stop_on_the_way_home_is_at_rest_soon(self, ring):
        ring.servo.go_home(self.home_J + 0.5, 0.2, 1.0, time.monotonic() + 10)
        ring.run(0.2)
        ring.servo.hold()
        ring.run(0.3)
        resting_J = ring.servo.status.reading.joints_J
        ring.run(0.3)
        np.testing.assert_allclose(ring.servo.status.reading.joints_J, resting_J, atol=0.005)

    def test_a_fault_on_the_way_home_is_at_rest_soon_and_stays_until_a_person_clears_it(self, ring, ail):
        ring.servo.go_home(self.home_J + 0.5, 0.1, 1.0, time.monotonic() + 60)
        ring.run(0.2)
        ail()
        ring.wait_until(lambda: ring.servo.status.reading.fault, 5.0)
        ring.run(0.3)
        resting = ring.servo.status.reading
        assert np.abs(resting.joints_J - self.home_J - 0.5).max() > 0.05, "it has come home before it could be stopped"
        ring.run(0.3)
        np.testing.assert_allclose(ring.servo.status.reading.joints_J, resting.joints_J, atol=0.005)
        assert not ring.servo.status.moving and ring.servo.status.reading.fault == resting.fault

    def test_the_gripper_closes_and_opens_while_the_arm_is_led(self, ring):
        for opening in (0.0, 1.0):

            def there(asked=opening):
                ring.follow(STILL_6, 1, opening=asked)
                return abs(ring.servo.status.reading.opening - asked) < 0.1

            ring.wait_until(there, 5.0)

    def test_closing_twice_does_no_harm(self, hardware):
        hardware.close()
        hardware.close()
