"""The servo's own process, and the link to it.

The client's process may stall, be stopped or die: goals then expire in the servo's, and the arm comes to rest.  Should
the servo's process itself stall, the robot's own controller is what is left (Hardware.watchdog_s).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robot_client.cadence import Cadence, CadenceReport
from robot_client.errors import ArmError
from robot_client.hardware import Hardware
from robot_client.servo import MotionLimits, Servo, Status

START_S = 30.0
"""How long a robot may take to answer its constructor."""
REPLY_S = 1.0
"""How long the servo may take to answer one command; far above its period, and the arm is at rest before."""


class ServoLink:
    """The servo of one robot, in a process of its own.  Every method may raise ArmError, in the robot's own words.

    Safe to share between threads: a person's stop need not wait for the loop.
    """

    def __init__(
        self, make: Callable[..., Hardware], settings: Mapping[str, Any], limits: MotionLimits, *, tick_s: float
    ):
        """make: a class or function that can be imported; settings: its keyword arguments."""
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._lock = threading.Lock()
        self._process = context.Process(
            target=_serve, args=(theirs, make, dict(settings), limits, tick_s), name="servo", daemon=True
        )
        self._process.start()
        theirs.close()
        self._asked = 0
        try:
            self._reply(START_S)
        except ArmError:
            self.close()
            raise

    def status(self) -> Status:
        return self._call("status")

    def go(self, change_6: np.ndarray, opening: float, expires_s: float) -> Status:
        """expires_s: on time.monotonic(), which the two processes share."""
        return self._call("go", change_6, opening, expires_s)

    def go_home(self, joints_J: np.ndarray, speed: float, opening: float, expires_s: float) -> Status:
        return self._call("go_home", joints_J, speed, opening, expires_s)

    def hold(self, answered: str = "") -> Status:
        return self._call("hold", answered)

    def release(self) -> Status:
        return self._call("release")

    def recover(self) -> Status:
        """Clears a fault, or an error that has ended the servo's work, where its cause is gone."""
        return self._call("recover", patience_s=START_S)

    def cadence(self) -> CadenceReport:
        """How well the servo kept its rate since the last call."""
        return self._call("cadence")

    def close(self) -> None:
        """Brings the robot to rest and lets go of it.  A second call does nothing."""
        self._link.close()
        self._process.join(START_S)
        if self._process.is_alive():
            self._process.kill()

    def _call(self, name: str, *arguments: Any, patience_s: float = REPLY_S) -> Any:
        with self._lock:
            self._asked += 1
            with contextlib.suppress(OSError):  # the reply will say why
                self._link.send((self._asked, name, arguments))
            return self._reply(patience_s)

    def _reply(self, patience_s: float) -> Any:
        """To the latest call; replies that an earlier one did not wait for are passed over."""
        until_s = time.monotonic() + patience_s
        try:
            while self._link.poll(max(0.0, until_s - time.monotonic())):
                asked, reply = self._link.recv()
                if asked == self._asked:
                    if isinstance(reply, ArmError):
                        raise reply
                    return reply
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise ArmError(f"the servo process is gone (exit code {self._process.exitcode})") from error
        raise ArmError(f"the servo process has not answered for {patience_s:g} s")


def _serve(
    link: Connection, make: Callable[..., Hardware], settings: Mapping[str, Any], limits: MotionLimits, tick_s: float
) -> None:
    """The process."""
    os.setsid()  # a terminal's Ctrl-C, Ctrl-Z or hang-up is the client's alone: its silence, or its end, tells of it
    signal.signal(signal.SIGTERM, lambda *_: link.close())
    with contextlib.ExitStack() as stack:
        try:
            hardware = stack.enter_context(contextlib.closing(make(**settings)))
            attendant = _Attendant(link, hardware, limits, tick_s)
        except (ArmError, TypeError, ValueError) as error:
            link.send((0, ArmError(f"{make.__name__}: {error}")))
            return
        with contextlib.suppress(EOFError, OSError):
            attendant.run()


class _Attendant:
    """A step of the servo each period, and between two of them what the client asks."""

    def __init__(self, link: Connection, hardware: Hardware, limits: MotionLimits, tick_s: float):
        self._link = link
        self._hardware = hardware
        self._servo = Servo(hardware, limits, tick_s=tick_s)
        self._rate_hz = hardware.rate_hz
        self._failure: ArmError | None = None
        self._cadence = Cadence(self._rate_hz, sleep=self._attend)

    def run(self) -> None:
        """Until the link breaks (EOFError, OSError)."""
        self._link.send((0, None))
        while True:
            try:
                if self._failure is None:
                    self._servo.step()
                else:
                    self._hardware.stop()  # again and again, until the robot has heard it
            except ArmError as error:
                self._failure = self._failure or error  # every further call but recover is answered with it
            self._cadence.wait()

    def _attend(self, pause_s: float) -> None:
        until_s = time.monotonic() + pause_s
        while self._link.poll(max(0.0, until_s - time.monotonic())):
            asked, name, arguments = self._link.recv()
            try:
                reply = self._answer(name, arguments)
            except ArmError as error:
                reply = error
            self._link.send((asked, reply))

    def _answer(self, name: str, arguments: tuple) -> Status | CadenceReport:
        if self._failure is not None and name != "recover":
            raise self._failure
        if name == "cadence":
            report, self._cadence = self._cadence.report(), Cadence(self._rate_hz, sleep=self._attend)
            return report
        if name != "status":
            getattr(self._servo, name)(*arguments)
            self._failure = None
        return self._servo.status
