"""A gamepad as SDL knows it, without display or window, through pygame-ce.  Needs the extra `gamepad`.

    held: left shoulder     takes over: without it the sticks do nothing
    left stick              forward, back, left, right
    right stick             up, down, turn left, turn right
    d-pad                   tilt forward, back, roll left, right
    right shoulder          opens or closes the gripper
    A, X, Y                 success, failure, error: the lower, the left and the upper of the four
    B                       STOP: the right one of the four
    Start                   lets go

The names are those of an Xbox pad; on any other the buttons in these places are meant.

A pad that is unplugged or switched off stops the arm.  One that is out of its radio's reach does so only when the
driver gives it up, perhaps seconds later, and until then counts as held as it last was: use one with a wire.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from robot_client.arm import Outcome
from robot_client.errors import PilotError
from robot_client.pilot import Gesture, beyond

STICKS = LEFT_X, LEFT_Y, RIGHT_X, RIGHT_Y = range(4)
A, B, X, Y, START, LEFT_SHOULDER, RIGHT_SHOULDER = 0, 1, 2, 3, 6, 9, 10
UP, DOWN, LEFT, RIGHT = range(11, 15)
"""SDL's numbers, the same for every pad."""
TAKE_OVER, GRIP, STOP, LET_GO = LEFT_SHOULDER, RIGHT_SHOULDER, B, START
OUTCOMES: dict[int, Outcome] = {A: "success", X: "failure", Y: "error"}
SETTINGS = {
    "SDL_VIDEODRIVER": "dummy",  # no display
    "SDL_NO_SIGNAL_HANDLERS": "1",  # or SIGTERM would end nothing
    "SDL_GAMECONTROLLER_USE_BUTTON_LABELS": "0",  # a button is where it is, whatever is printed on it
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
}
FULL_COUNTS = 32767
DEAD_ZONE = 0.15
"""Of full deflection: worn sticks do not come back to their middle."""


class Gamepad:
    """The first pad that SDL knows; when that is lost, the first one that is plugged in after it.

    Raises PilotError when there is none.
    """

    def __init__(self):
        os.environ.update(SETTINGS)
        import pygame
        from pygame._sdl2 import controller

        self._pygame, self._controller = pygame, controller
        pygame.display.init()
        controller.init()
        self._pad = self._first_pad()
        if self._pad is None:
            self.close()
            raise PilotError("there is no gamepad, or none that SDL knows")

    def gesture(self) -> Gesture:
        events = self._pygame.event.get()
        if self._pad is None or not self._pad.attached():
            self._pad = self._first_pad()
            raise PilotError("the gamepad is gone")
        pressed = [event.button for event in events if event.type == self._pygame.CONTROLLERBUTTONDOWN]
        return Gesture(
            drive_6=self._drive_6(self._pad) if self._pad.get_button(TAKE_OVER) else None,
            grips=GRIP in pressed,
            outcome=next((OUTCOMES[button] for button in pressed if button in OUTCOMES), None),
            stops="B was pressed on the gamepad" if STOP in pressed else "",
            lets_go=LET_GO in pressed,
        )

    def close(self) -> None:
        self._controller.quit()
        self._pygame.display.quit()

    def _first_pad(self) -> Any:
        known = filter(self._controller.is_controller, range(self._controller.get_count()))
        return next(map(self._controller.Controller, known), None)

    def _drive_6(self, pad) -> np.ndarray:
        """SDL counts to the right and down, a policy to the left and up."""
        counts = np.array([pad.get_axis(axis) for axis in STICKS])
        left_x, left_y, right_x, right_y = beyond(counts / FULL_COUNTS, DEAD_ZONE)
        up, down, left, right = (pad.get_button(button) for button in (UP, DOWN, LEFT, RIGHT))
        return np.array([-left_y, -left_x, -right_y, right - left, up - down, -right_x])
