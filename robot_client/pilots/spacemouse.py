"""A 3Dconnexion SpaceMouse by its raw HID reports, through hidapi.  Needs the extra `spacemouse`.

    cap         drives, all six ways at once
    button 1    opens or closes the gripper (the left one)
    button 2    STOP (the right one); Enter at the keyboard lets go

The vendor's own driver must not run beside it.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any

import numpy as np

from robot_client.errors import PilotError
from robot_client.pilot import LINGER_S, Gesture, beyond

LOGITECH, CONNEXION = 0x046D, 0x256F
IDS = {
    (LOGITECH, 0xC625): "SpacePilot",
    (LOGITECH, 0xC626): "SpaceNavigator",
    (LOGITECH, 0xC627): "SpaceExplorer",
    (LOGITECH, 0xC628): "SpaceNavigator for Notebooks",
    (LOGITECH, 0xC629): "SpacePilot Pro",
    (LOGITECH, 0xC62B): "SpaceMouse Pro",
    (CONNEXION, 0xC62E): "SpaceMouse Wireless, by its cable",
    (CONNEXION, 0xC62F): "SpaceMouse Wireless",
    (CONNEXION, 0xC631): "SpaceMouse Pro Wireless, by its cable",
    (CONNEXION, 0xC632): "SpaceMouse Pro Wireless",
    (CONNEXION, 0xC633): "SpaceMouse Enterprise",
    (CONNEXION, 0xC635): "SpaceMouse Compact",
    (CONNEXION, 0xC636): "SpaceMouse Module",
    (CONNEXION, 0xC652): "Universal Receiver",
}
RIGHTS = "Linux lets only root read it, unless by a udev rule: " + " or ".join(
    f'SUBSYSTEM=="hidraw", ATTRS{{idVendor}}=="{vendor:04x}", MODE="0666"' for vendor in (CONNEXION, LOGITECH)
)
MULTI_AXIS, UNTOLD = 8, 0
"""HID's name for such a cap: a wireless receiver has other faces too, a mouse's among them."""
MOVED, TURNED, BUTTONS = 1, 2, 3
"""What a report tells: its first byte.  Newer ones tell the turns in MOVED, behind the move."""
GRIP, STOP = 1, 2
"""Bits of BUTTONS."""
FULL_COUNTS = 350
TO_POLICY_33 = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1]])
"""The cap counts to the right, towards the person and down; turns likewise, right-handed about these."""
DEAD_ZONE = 0.1
SILENCE_S = 0.2
"""The cap reports 60 times a second and more while it is off its middle: after such a silence it is not."""
READ_MS = 100


class SpaceMouse:
    """Read by a thread, so that no report waits or is lost.  device: its path ("/dev/hidraw3"); empty: the first found.

    Raises PilotError when there is none, or it may not be read.  One that was lost stays so: start anew.
    """

    def __init__(self, device: str = ""):
        try:
            import hidraw as hid  # there on Linux; unlike hid, it leaves the kernel's own driver alone
        except ImportError:
            import hid

        path = device.encode() or first_of(hid)
        self._device = hid.device()
        try:
            self._device.open_path(path)
        except OSError as error:
            raise PilotError(f"the SpaceMouse at {path.decode()} cannot be opened: {error}; {RIGHTS}") from error
        # Written by the thread alone, each replaced whole: readers need no lock.
        self._counts_6 = np.zeros(6)
        self._reported_s = -np.inf
        self._lost = ""
        self._down = 0
        self._pressed: SimpleQueue[int] = SimpleQueue()
        self._driven_s = -np.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spacemouse", daemon=True)
        self._thread.start()

    def gesture(self) -> Gesture:
        if not self._thread.is_alive():
            raise PilotError(f"the SpaceMouse is gone: {self._lost or 'closed'}")
        now_s, pressed = time.monotonic(), 0
        while not self._pressed.empty():
            pressed |= self._pressed.get()
        drive_6 = np.zeros(6)
        if now_s - self._reported_s < SILENCE_S:
            moved_turned_23 = beyond(self._counts_6 / FULL_COUNTS, DEAD_ZONE).reshape(2, 3)
            drive_6 = (moved_turned_23 @ TO_POLICY_33.T).ravel()
        if drive_6.any() or pressed & GRIP:
            self._driven_s = now_s
        return Gesture(
            drive_6=drive_6 if now_s - self._driven_s < LINGER_S else None,
            grips=bool(pressed & GRIP),
            stops="button 2 of the SpaceMouse was pressed" if pressed & STOP else "",
        )

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._device.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._take(bytes(self._device.read(64, READ_MS)))
        except OSError as error:
            self._lost = str(error)

    def _take(self, report: bytes) -> None:
        """One report, or none, which is empty; those of batteries and lights tell nothing."""
        kind, data = (report[0], report[1:]) if report else (0, report)
        if kind == BUTTONS:
            down = int.from_bytes(data, "little")
            self._pressed.put(down & ~self._down)
            self._down = down
        elif kind in (MOVED, TURNED):
            counts = np.frombuffer(data[: 12 if kind == MOVED else 6], "<i2")
            counts_6, first = self._counts_6.copy(), 0 if kind == MOVED else 3
            counts_6[first : first + len(counts)] = counts
            self._counts_6 = counts_6
            self._reported_s = time.monotonic()


def first_of(hid: Any) -> bytes:
    """The path of the first SpaceMouse.  Raises PilotError when there is none."""
    for found in hid.enumerate():
        if (found["vendor_id"], found["product_id"]) in IDS and found["usage"] in (MULTI_AXIS, UNTOLD):
            return found["path"]
    raise PilotError("there is no SpaceMouse, or not one of ours: " + ", ".join(IDS.values()))
