"""franky-sim's Panda in a process of its own, which tells what the arm does besides what it tells its client.

The simulator's own server (python -m franky_sim.run_server) sleeps a millisecond between two steps and so falls behind
the clock by what a step takes; here step n is due n milliseconds after the start.  What is late is caught up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

PERIOD_S = 0.001
STALL_S = 0.1
"""When this process gets no CPU, its clock catches up by so much and stands still for the rest."""
HAND = "robot0_hand"


class Panda:
    """`host` to connect to, and state() as the simulator's physics has it.  Owns its process until close()."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_simulate, args=(theirs,), name="panda", daemon=True)
        self._process.start()
        theirs.close()
        self.host: str = self._link.recv()

    def state(self) -> dict[str, Any]:
        """position_m (3,) of the hand, commanded_m (3,) of the tool as a client asks, time_s of the simulation."""
        self._link.send("state")
        return self._link.recv()

    def close(self) -> None:
        self._link.close()
        self._process.join()


def _simulate(link: Connection) -> None:
    """The process, until the link breaks."""
    from franky_sim import SimulationServer
    from franky_sim.mujoco_simulator import MujocoSimulator

    with MujocoSimulator() as simulator:
        robot = simulator.add_robot()
        with SimulationServer(simulator) as server, contextlib.suppress(EOFError, OSError):
            link.send(robot.hostname)
            data, own_server = simulator.data, robot.server
            assert data is not None and own_server is not None, "the simulation has started"
            hand = data.body(HAND)
            next_s = time.monotonic()
            while True:
                server.run_once(realtime=False)
                while link.poll():
                    link.recv()
                    commanded_m = own_server.robot_state.O_T_EE_c[12:15]
                    link.send({"position_m": hand.xpos.copy(), "commanded_m": commanded_m, "time_s": data.time})
                next_s = max(next_s + PERIOD_S, time.monotonic() - STALL_S)
                time.sleep(max(0.0, next_s - time.monotonic()))
