"""A robot needs neither a learning library nor a simulator."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["torch", "transformers", "mujoco", "libero", "robosuite", "numba", "cv2", "policy_server", "rl_trainer", "sim"]

DRIVE_WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy}:
            raise ImportError(f"{{name}} is not installed on this robot")

sys.meta_path.insert(0, Blocked())
import pkgutil, importlib
import robot_client
for module in pkgutil.walk_packages(robot_client.__path__, "robot_client."):
    # But for what an extra brings: each make's own SDK, the files of a data set.
    if not module.name.removeprefix("robot_client.").startswith(("arms.", "cameras.", "lerobot.", "kinematics")):
        importlib.import_module(module.name)
from robot_client.__main__ import main
sys.exit(main(["run", "--task", "t", "--max-ticks", "4", "--lockstep", "--server", sys.argv[1]]))
"""


def test_the_client_imports_and_drives_an_arm_with_nothing_heavy_installed(server):
    program = DRIVE_WITHOUT.format(heavy=set(HEAVY))
    ran = subprocess.run([sys.executable, "-c", program, server.address], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "1 failure" in ran.stderr


def test_the_blocker_blocks():
    program = DRIVE_WITHOUT.format(heavy={"numpy"})
    ran = subprocess.run([sys.executable, "-c", program, "nowhere"], capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0 and "numpy is not installed on this robot" in ran.stderr
