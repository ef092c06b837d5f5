"""A Robotiq two-finger gripper (2F-85, 2F-140, Hand-E) on a UR's wrist, through the socket that Robotiq's URCap opens.

A line asks ("GET POS", "SET POS 255 GTO 1"), a few characters answer ("POS 3", "ack").  A thread asks all the time, so
that nobody else waits: what is read here is at most some 30 ms old.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque

from robot_client.errors import ArmError

PERIOD_S = 0.02
"""Between two questions; each answer takes the URCap some milliseconds."""
ANSWER_S = 2.0
ACTIVATION_S = 6.0
ACTIVE = 3
"""STA, once the fingers have found their ends."""
FAULTS = {
    0x05: "the activation must be completed first",
    0x07: "it is not activated",
    0x08: "it is too hot",
    0x09: "no communication for a second",
    0x0A: "its supply voltage is too low",
    0x0B: "automatic release in progress",
    0x0C: "internal fault",
    0x0D: "activation fault: something is in its way",
    0x0E: "overcurrent",
    0x0F: "automatic release completed",
}
"""FLT, after the instruction manual of the 2F-85."""


class RobotiqGripper:
    """Positions are Robotiq's own: 0 to 255, larger is more closed; an opening is 0 closed to 1 open."""

    def __init__(
        self,
        host: str,
        *,
        port: int = 63352,
        speed: int = 255,
        force: int = 50,
        open_position: int = 3,
        closed_position: int = 230,
    ):
        """Moves nothing: a gripper that is not active, or has a fault, is left to a person, who has it recover().

        speed, force: 0 to 255.  open_position, closed_position: where the empty fingers really end.
        Raises ArmError.
        """
        for name, value in {"speed": speed, "force": force}.items():
            if not 0 <= value <= 255:
                raise ValueError(f"{name} must be 0 to 255, got {value}")
        if not 0 <= open_position < closed_position <= 255:
            raise ValueError(f"0 <= open < closed <= 255 is needed, got {open_position} and {closed_position}")
        self._address = (host, port)
        self._speed, self._force = speed, force
        self._open_position, self._closed_position = open_position, closed_position
        self._goals: deque[int] = deque(maxlen=1)
        self._connect(activate=False)

    @property
    def opening(self) -> float:
        """Measured."""
        travel = self._closed_position - self._open_position
        return min(max((self._closed_position - self._position) / travel, 0.0), 1.0)

    @property
    def fault(self) -> str:
        """Why it will not move until recover(); empty when it will."""
        if self._lost:
            return self._lost
        if self._code:
            return f"gripper fault 0x{self._code:02X}: {FAULTS.get(self._code, 'not in the manual')}"
        return "" if self._stage == ACTIVE else "the gripper is not activated; clearing this moves its fingers"

    def move(self, opening: float) -> None:
        """Sets out for an opening."""
        travel = self._closed_position - self._open_position
        self._goals.append(round(self._closed_position - opening * travel))

    def recover(self) -> None:
        """Connects again, clears a fault and activates, which moves the fingers and may take ACTIVATION_S.

        Raises ArmError, and there is a fault as before.
        """
        if self.fault:
            self.close()
            self._connect(activate=True)

    def close(self) -> None:
        """Leaves the fingers where they are."""
        self._closing.set()
        self._thread.join(ANSWER_S)
        self._link.close()

    def _connect(self, *, activate: bool) -> None:
        self._goals.clear()
        try:
            self._link = socket.create_connection(self._address, ANSWER_S)
            if activate:
                self._activate()
            self._look()
        except (OSError, ValueError) as error:
            self._lost = f"no gripper at work at {self._address[0]}:{self._address[1]}: {error}"
            raise ArmError(self._lost) from error
        self._lost = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="gripper", daemon=True)
        self._thread.start()

    def _activate(self) -> None:
        if self._get("FLT"):
            self._set("ACT 0")
        elif self._get("STA") == ACTIVE:
            return
        self._set("ACT 1")
        until_s = time.monotonic() + ACTIVATION_S
        while self._get("STA") != ACTIVE:
            if time.monotonic() > until_s:
                raise TimeoutError(f"it is not active {ACTIVATION_S:g} s after it was told to be")
            time.sleep(PERIOD_S)

    def _look(self) -> None:
        self._position, self._code, self._stage = self._get("POS"), self._get("FLT"), self._get("STA")

    def _attend(self) -> None:
        try:
            while not self._closing.wait(PERIOD_S):
                if self._goals:
                    self._set(f"POS {self._goals.pop()} SPE {self._speed} FOR {self._force} GTO 1")
                self._look()
        except (OSError, ValueError) as error:
            self._lost = f"lost the gripper at {self._address[0]}:{self._address[1]}: {error}"

    def _get(self, name: str) -> int:
        word, value = self._ask(f"GET {name}").split()
        if word != name:
            raise ValueError(f"GET {name} must be answered with {name}, got {word}")
        return int(value)

    def _set(self, what: str) -> None:
        if (answer := self._ask(f"SET {what}")) != "ack":
            raise ValueError(f"SET {what} must be answered with ack, got {answer!r}")

    def _ask(self, line: str) -> str:
        self._link.sendall(line.encode() + b"\n")
        if not (answer := self._link.recv(64)):
            raise OSError("it has closed the connection")
        return answer.decode(errors="replace").strip()
