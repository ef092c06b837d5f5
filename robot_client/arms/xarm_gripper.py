"""The grippers of an xArm: the vendor's own, the Lite 6's, or none that we know.

The vendor's own hangs on a field bus behind the arm, slower than a servo period: a thread of its own talks to it, over
a connection of its own (port 503) where the controller offers one.
"""

from __future__ import annotations

import threading
from typing import Any

from xarm.core.config.x_code import GripperError

from robot_client.errors import ArmError

OPEN_PULSES = 850
SPEED_RPM = 5000
POLL_S = 0.05
CLOSE_S = 0.5
"""Where the field bus no longer answers, the thread ends by itself, later."""


class NoGripper:
    """Is where it was sent."""

    opening = 1.0
    fault = ""

    def __init__(self, arm: Any):
        self._arm = arm

    def move(self, opening: float) -> None:
        self.opening = opening

    def recover(self) -> None:
        pass

    def close(self) -> None:
        pass


class Lite6Gripper(NoGripper):
    """Two digital outputs: it opens or closes, and where it is, it cannot tell."""

    def __init__(self, arm: Any):
        super().__init__(arm)
        self._opened: bool | None = None
        arm.config_tgpio_reset_when_stop(False)  # else it lets go whenever the arm stops

    def move(self, opening: float) -> None:
        opened = opening >= 0.5
        if opened == self._opened:
            return
        ask = self._arm.open_lite6_gripper if opened else self._arm.close_lite6_gripper
        if code := ask(sync=False):  # else it waits for the arm to rest
            raise ArmError(f"the Lite 6's gripper did not {'open' if opened else 'close'}: code {code}")
        self._opened, self.opening = opened, float(opened)


class XArmGripper(NoGripper):
    """0 to 850 pulses, measured at 20 Hz."""

    def __init__(self, arm: Any):
        super().__init__(arm)
        arm.set_rs485_use_503_port()
        if code := self._enable():
            raise ArmError(f"the xArm's gripper did not start: code {code} {self._complaint()}".rstrip())
        self._asked: int | None = None
        self._wake = threading.Event()
        self._closed = False
        self._poll()
        self._thread = threading.Thread(target=self._run, name="xarm gripper", daemon=True)
        self._thread.start()

    def move(self, opening: float) -> None:
        self._asked = round(OPEN_PULSES * opening)
        self._wake.set()

    def recover(self) -> None:
        self._arm.clean_gripper_error()
        self._enable()
        self.fault = ""

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _enable(self) -> int:
        arm = self._arm
        return arm.set_gripper_mode(0) or arm.set_gripper_enable(True) or arm.set_gripper_speed(SPEED_RPM)

    def _run(self) -> None:
        sent = None
        while not self._closed:
            asked = self._asked
            if asked != sent:
                self._arm.set_gripper_position(asked, wait=False, wait_motion=False)
                sent = asked
            self._poll()
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _poll(self) -> None:
        answer = self._arm.get_gripper_position()
        code, pulses = answer if isinstance(answer, tuple) else (answer, None)  # a bare code, when it has an error
        if code == 0 and pulses is not None:
            self.opening = min(max(pulses / OPEN_PULSES, 0.0), 1.0)
        elif code != 0 and not self._closed:
            self.fault = self._complaint() or f"the gripper does not answer: code {code}"

    def _complaint(self) -> str:
        """Its error in the vendor's words; empty when it tells of none."""
        code, error = self._arm.get_gripper_err_code()
        if code != 0 or not error:
            return ""
        told = GripperError(error)
        return f"G{error}: {told.title['en']}. {told.description['en']}"


GRIPPERS: dict[str, type[NoGripper]] = {"xarm": XArmGripper, "lite6": Lite6Gripper, "none": NoGripper}
