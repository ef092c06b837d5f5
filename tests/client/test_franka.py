"""Franka through franky, against franky-sim: the libfranka protocol on loopback with MuJoCo behind it.

Not modelled there: reflexes and collisions, missed packets, the real hand's forces.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

franky = pytest.importorskip("franky", reason="franky-control is not installed (extra franka)")
pytest.importorskip("franky_sim", reason="franky-sim is not installed")

from robot_client.arms.franka import FrankaHardware  # noqa: E402
from robot_client.errors import ArmError  # noqa: E402
from robot_client.servo import MotionLimits  # noqa: E402
from tests.client.hardware_laws import HardwareLaws  # noqa: E402

pytestmark = pytest.mark.arm
START_S = 60.0


@pytest.fixture(scope="module")
def host():
    """A robot in a process of its own, as a real one is."""
    command = [sys.executable, "-u", "-m", "franky_sim.run_server", "--simulator", "mujoco"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as simulator:
        try:
            for line in simulator.stdout:
                if "as the robot IP address" in line:
                    yield line.split("'")[1]
                    break
            else:
                pytest.fail("franky-sim did not start")
        finally:
            simulator.terminate()


class TestFranka(HardwareLaws):
    home_J = np.array([0.0, 0.0, 0.0, -1.57, 0.0, 1.57, 0.785])
    limits = MotionLimits(speed_m_s=0.25)
    tolerance_m = 2e-4
    tolerance_rad = 2e-3  # its joint controllers leave about a milliradian

    @pytest.fixture
    def hardware(self, host):
        hardware = FrankaHardware(host=host, realtime=False)
        yield hardware
        hardware.close()


def test_no_robot_is_an_error_that_names_the_address():
    with pytest.raises(ArmError, match=r"no Franka at 127\.0\.0\.99"):
        FrankaHardware(host="127.0.0.99", realtime=False)


def test_a_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"dynamics must be in \(0, 1\], got 1\.5"):
        FrankaHardware(host="127.0.0.99", dynamics=1.5)
