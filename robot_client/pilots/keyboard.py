"""The keyboard of the terminal, over ssh as well.  Needs no package."""

from __future__ import annotations

import time

import numpy as np

from robot_client.arm import Outcome
from robot_client.pilot import LINGER_S, Gesture
from robot_client.terminal import Terminal, own_terminal

MOVES = {
    "w": (0, 1),
    "s": (0, -1),
    "a": (1, 1),
    "d": (1, -1),
    "r": (2, 1),
    "f": (2, -1),
    "o": (3, 1),
    "u": (3, -1),
    "i": (4, 1),
    "k": (4, -1),
    "j": (5, 1),
    "l": (5, -1),
}
"""Key -> which number of Gesture.drive_6, and its sign."""
GRIP, STOP, LET_GO = "g", " ", "\n"
OUTCOMES: dict[str, Outcome] = {
    "1": "success",
    "y": "success",
    "0": "failure",
    "n": "failure",
    "x": "error",
}
MOVE_S = 0.15
"""So long a key drives, at full deflection: a terminal tells presses and repeats, never that a key was let go."""
HELP = f"""\
Keys while an episode runs:
  w s   forward, back       i k   tilt forward, back       g      open or close the gripper
  a d   left, right         j l   turn left, right         space  STOP; Enter lets go
  r f   up, down            u o   roll left, right         1 y    success    0 n  failure    x  error
A key drives for {MOVE_S:g} s; {LINGER_S:g} s after the last one the policy goes on."""


class Keyboard:
    """Says its keys once.  Raises PilotError where there is no terminal."""

    def __init__(self, *, terminal: Terminal | None = None):
        """terminal: the process's own by default, which whoever reads keys between episodes shares."""
        self._terminal = terminal or own_terminal()
        self._pressed_s: dict[str, float] = {}
        self._terminal.say(HELP)

    def gesture(self) -> Gesture:
        keys, now_s = self._terminal.keys(), time.monotonic()
        self._pressed_s.update(dict.fromkeys(keys, now_s))
        drive_6 = np.zeros(6)
        for key, (axis, sign) in MOVES.items():
            drive_6[axis] += sign * self._is_fresh(key, now_s - MOVE_S)
        taken_over = any(self._is_fresh(key, now_s - LINGER_S) for key in (*MOVES, GRIP))
        return Gesture(
            drive_6=drive_6 if taken_over else None,
            grips=GRIP in keys,
            outcome=next((OUTCOMES[key] for key in keys if key in OUTCOMES), None),
            stops="space was pressed" if STOP in keys else "",
            lets_go=LET_GO in keys,
        )

    def close(self) -> None:
        self._terminal.close()

    def _is_fresh(self, key: str, since_s: float) -> bool:
        return self._pressed_s.get(key, -np.inf) > since_s
