"""A stop button on a serial port: a normally closed contact between RTS and CTS (pins 7 and 8 of a DB9), nothing else.

We put RTS on; CTS shows it for as long as the contact is closed.  A button that is pressed, a wire that is cut, a plug
that is out, an adapter that is unplugged and a thread that does not run all look alike: stopped.  The button itself
cannot let go: Enter at the keyboard or Start at the gamepad does, once the contact is closed again; where there is
neither, starting anew.  It is a stop of this client's motion, not an emergency stop in the sense of a norm: the robot's
own is there as well.  Needs the extra `serial-stop`.
"""

from __future__ import annotations

import threading
import time

from robot_client.errors import PilotError
from robot_client.pilot import Gesture

POLL_S = 0.01
STALE_S = 0.5
"""A contact that has not been seen for so long counts as open."""
SETTLE_S = 0.3
"""How long an adapter may take to show a line that was put on or off."""


class SerialStop:
    """Watched by a thread, so that no press is too short.  device: a port, or a URL of pyserial's.

    Raises PilotError when it cannot be opened, or shows CTS without RTS: it could then never stop anything.
    An adapter that was lost stays so: start anew.
    """

    def __init__(self, device: str):
        import serial

        self._name = f"the stop button at {device}"
        try:
            self._port = serial.serial_for_url(device)
            if self._shows(rts=False):
                self._port.close()
                raise PilotError(f"{self._name} is none: CTS is on without RTS")
            self._is_closed = self._shows(rts=True)
        except (OSError, ValueError) as error:
            raise PilotError(f"{self._name} cannot be watched: {error}") from error
        self._was_open = threading.Event()
        self._seen_s = time.monotonic()
        self._lost = "closed"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serial stop", daemon=True)
        self._thread.start()

    def gesture(self) -> Gesture:
        age_s = time.monotonic() - self._seen_s
        if not self._thread.is_alive():
            raise PilotError(f"{self._name} is gone: {self._lost}")
        if age_s > STALE_S:
            raise PilotError(f"{self._name} has not been seen for {age_s:.2f} s (limit {STALE_S:g} s)")
        was_open = self._was_open.is_set()
        if was_open:
            self._was_open.clear()
        return Gesture(stops=f"{self._name} is pressed, or its wire cut" if was_open or not self._is_closed else "")

    def close(self) -> None:
        self._closing.set()
        self._thread.join(STALE_S)
        self._port.close()

    def _run(self) -> None:
        try:
            while not self._closing.wait(POLL_S):
                self._is_closed = self._port.cts
                self._seen_s = time.monotonic()
                if not self._is_closed:
                    self._was_open.set()
        except OSError as error:
            self._lost = str(error)

    def _shows(self, *, rts: bool) -> bool:
        """CTS, SETTLE_S after RTS was put on or off, or as soon as it shows the same."""
        self._port.rts = rts
        until_s = time.monotonic() + SETTLE_S
        while self._port.cts != rts and time.monotonic() < until_s:
            time.sleep(POLL_S)
        return self._port.cts
