"""Franka through franky, against franky-sim: the libfranka protocol on loopback with MuJoCo behind it.

Not modelled there: reflexes, collisions, limits and discontinuities, what a robot makes of missed packets, how a hand
answers a command that another overtakes, its forces.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import numpy as np
import pytest

pytest.importorskip("franky", reason="franky-control is not installed (extra franka)")
pytest.importorskip("franky_sim", reason="franky-sim is not installed")

from robot_client.arms import franka
from robot_client.arms.franka import FrankaHardware
from robot_client.cadence import Cadence
from robot_client.errors import ArmError
from robot_client.pose import Pose
from tests.client.hardware_laws import HardwareLaws

pytestmark = pytest.mark.arm

HOME_J = np.array([0.0, 0.0, 0.0, -1.57, 0.0, 1.57, 0.785])
START_S = 60.0
NUMBERS = itertools.count(2)


@pytest.fixture(autouse=True)
def time_shared() -> Iterator[None]:
    """libfranka gives the thread that moves an arm a real-time priority, and later tests' threads would inherit it."""
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def simulate(host: str, ready: Event) -> None:
    """The process of one robot, at home, its hand half open."""
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    with MujocoSimulator() as simulator:
        simulator.add_robot()
        with SimulationServer(simulator, hostname_candidates=[host]) as server:
            ready.set()
            cadence = Cadence(1000)
            while True:
                server.run_once(realtime=False)
                cadence.wait()


class Robot:
    """At an address of its own: libfranka's ports are fixed, but loopback has many addresses."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["franky_sim.mujoco_simulator", __name__])

    def __init__(self) -> None:
        pid = os.getpid()
        self.host = f"127.{pid >> 8 & 255}.{pid & 255}.{next(NUMBERS)}"
        ready = self.context.Event()
        self.process: BaseProcess = self.context.Process(target=simulate, args=(self.host, ready), daemon=True)
        self.process.start()
        assert ready.wait(START_S), "franky-sim did not start"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def robot() -> Iterator[Robot]:
    robot = Robot()
    yield robot
    robot.kill()


@pytest.fixture
def connect(robot) -> Iterator[Callable[..., FrankaHardware]]:
    made: list[FrankaHardware] = []

    def make(**options) -> FrankaHardware:
        made.append(FrankaHardware(host=robot.host, realtime=False, **options))
        return made[-1]

    yield make
    for hardware in made:
        hardware.close()


@pytest.fixture
def hardware(connect) -> FrankaHardware:
    return connect()


class TestFranka(HardwareLaws):
    home_J = HOME_J
    tolerance_m = 2e-4  # the simulator is content within a tenth of a millimetre, before and after
    tolerance_rad = 5e-4

    @pytest.fixture
    def hardware(self, hardware):
        return hardware

    @pytest.fixture
    def ail(self, hardware: FrankaHardware):
        return lambda: setattr(hardware._hand, "fault", "hand: stuck")


def until(done: Callable[[], object], patience_s: float = 10.0) -> None:
    until_s = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < until_s, "did not come true in time"
        time.sleep(0.02)


def lead(hardware: FrankaHardware, speed_m_s: float = 0.1, seconds: float = 0.3) -> Pose:
    """Upwards; returns the last set point, at which it is still in motion."""
    hardware.begin()
    start, twist_6, began_s = hardware.read().pose, np.array([0, 0, speed_m_s, 0, 0, 0]), time.monotonic()
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        set_point = start.moved(twist_6 * elapsed_s)
        hardware.servo(set_point, twist_6)
        hardware.read()
        time.sleep(1 / hardware.rate_hz)
    return set_point


def test_it_rests_at_the_last_set_point_when_no_other_comes(hardware):
    last = lead(hardware)
    until(lambda: np.abs(last.change_to(hardware.read().pose)).max() < 5e-4)
    time.sleep(0.2)
    assert np.abs(last.change_to(hardware.read().pose)).max() < 5e-4 and hardware.read().fault == ""


def test_the_way_home_may_begin_and_end_in_motion(hardware):
    for _ in range(3):
        lead(hardware)
        hardware.stop()
        hardware.move_joints(HOME_J + 0.1, 1.0)
        time.sleep(0.1)
        hardware.stop()
    assert hardware.read().fault == ""
    hardware.move_joints(HOME_J, 1.0)
    until(lambda: np.abs(hardware.read().joints_J - HOME_J).max() < 0.005)


def test_the_hand_does_what_it_was_told_last_though_it_is_still_busy(hardware):
    for opening in (1.0, 0.0, 0.5, 0.2):
        hardware.grip(opening)
        time.sleep(0.2)
    until(lambda: abs(hardware.read().opening - 0.2) < 0.01)
    hardware.grip(0.0)
    until(lambda: hardware.read().opening < 0.01)
    assert hardware.read().fault == ""


def test_a_fault_of_the_hand_stops_the_arm_until_a_person_clears_it(hardware):
    hardware.move_joints(HOME_J + 0.5, 0.5)
    time.sleep(0.2)
    hardware._hand.fault = "hand: stuck"
    assert hardware.read().fault == "hand: stuck"
    time.sleep(0.5)
    resting_J = hardware.read().joints_J
    hardware.move_joints(HOME_J, 0.5)
    time.sleep(0.3)
    np.testing.assert_allclose(hardware.read().joints_J, resting_J, atol=0.005)
    hardware.recover()
    hardware.move_joints(HOME_J, 0.5)
    until(lambda: np.abs(hardware.read().joints_J - HOME_J).max() < 0.005)
    assert hardware.read().fault == ""


def test_closed_in_motion_it_comes_to_rest_and_lets_the_next_client_in(connect):
    first = connect()
    first.grip(0.0)
    lead(first)
    first.close()
    second = connect()  # though there is still somebody who knows the first
    time.sleep(0.5)
    resting = second.read().pose
    time.sleep(0.2)
    assert np.abs(resting.change_to(second.read().pose)).max() < 5e-4
    lead(second)
    second.grip(1.0)
    until(lambda: second.read().opening > 0.9)
    assert second.read().fault == ""


def test_a_robot_that_has_a_client_is_refused_in_bounded_time(connect, monkeypatch):
    monkeypatch.setattr(franka, "CONNECT_S", 2.0)
    first = connect()
    with pytest.raises(ArmError, match=r"no Franka at 127.*: no answer in 2 s, as when it has another client"):
        connect()
    first.close()
    assert connect().read().fault == ""


def test_a_hand_that_has_a_client_costs_nobody_the_arm(robot, connect, monkeypatch):
    monkeypatch.setattr(franka, "CONNECT_S", 2.0)
    hand = franka.franky.Gripper(robot.host)
    with pytest.raises(ArmError, match=r"no hand at 127.*: no answer in 2 s") as refusal:
        connect()
    handless = connect(hand=False)
    handless.grip(0.0)
    assert refusal.traceback and handless.read().opening == 1 and hand.width > 0.03


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "stalled"])
@pytest.mark.parametrize("led", [False, True], ids=["at rest", "led"])
def test_a_robot_that_falls_silent_is_lost_and_let_go(robot, connect, end, led):
    hardware = connect()
    if led:
        lead(hardware)
    os.kill(robot.process.pid, end)
    began_s = time.monotonic()
    with pytest.raises(ArmError, match="lost the Franka: "):
        until(lambda: hardware.read() is None)
    hardware.close()
    assert time.monotonic() - began_s < 5


def test_no_robot_is_an_error_that_names_the_address():
    with pytest.raises(ArmError, match=r"no Franka at 127\.0\.0\.99: libfranka: Connection"):
        FrankaHardware(host="127.0.0.99", realtime=False)


def test_a_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"dynamics must be in \(0, 1\], got 1\.5"):
        FrankaHardware(host="127.0.0.99", dynamics=1.5)
