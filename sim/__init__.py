"""Simulated arms: LIBERO and robosuite tasks behind the Arm protocol, fast and equal to the stock simulator.

Importing this package chooses MuJoCo's off-screen renderer (`MUJOCO_GL`) when the caller has not, since the choice is
only read when mujoco is first imported.
"""

from __future__ import annotations

from sim import assets

assets.choose_renderer()
