"""The gamepad through the real SDL, with a pad that SDL itself simulates (its virtual joystick).

SDL makes of it what it makes of a real one: mapping, state, events.  Not shown: what the kernel tells of a real pad.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from robot_client.errors import PilotError
from robot_client.pilot import Gesture, Together
from robot_client.pilots import gamepad
from robot_client.pilots.gamepad import DEAD_ZONE, FULL_COUNTS, Gamepad
from tests.client.fake_arm import spec_of

A_PAD, AXES, BUTTONS = 1, 6, 15
LEFT_X, LEFT_Y, RIGHT_X, RIGHT_Y = range(4)
X, Y, Z, ROLL, PITCH, YAW = np.eye(6)


class Description(ctypes.Structure):
    """SDL_VirtualJoystickDesc, version 1."""

    _fields_ = (
        *((name, ctypes.c_uint16) for name in ("version", "type", "axes", "buttons", "hats")),
        *((name, ctypes.c_uint16) for name in ("vendor", "product", "padding")),
        *((name, ctypes.c_uint32) for name in ("button_mask", "axis_mask")),
        ("name", ctypes.c_char_p),
        *(
            (name, ctypes.c_void_p)
            for name in ("user", "update", "player", "rumble", "rumble_triggers", "led", "effect")
        ),
    )


class VirtualPad:
    """Plugged in from its construction to unplug()."""

    def __init__(self, sdl: ctypes.CDLL):
        self.sdl = sdl
        description = Description(version=1, type=A_PAD, axes=AXES, buttons=BUTTONS, name=b"virtual pad")
        self.index = sdl.SDL_JoystickAttachVirtualEx(ctypes.byref(description))
        assert self.index >= 0
        self.instance = sdl.SDL_JoystickGetDeviceInstanceID(self.index)

    def set(self, *, axes: dict[int, float] | None = None, buttons: dict[int, bool] | None = None) -> None:
        """Axes in [-1, 1]; SDL's x is to the right, its y is down."""
        self.sdl.SDL_JoystickFromInstanceID.restype = ctypes.c_void_p
        joystick = ctypes.c_void_p(self.sdl.SDL_JoystickFromInstanceID(self.instance))
        assert joystick.value, "nobody has opened it"
        for axis, deflection in (axes or {}).items():
            counts = ctypes.c_int16(round(deflection * FULL_COUNTS))
            assert self.sdl.SDL_JoystickSetVirtualAxis(joystick, axis, counts) == 0
        for button, down in (buttons or {}).items():
            assert self.sdl.SDL_JoystickSetVirtualButton(joystick, button, ctypes.c_uint8(down)) == 0

    def unplug(self) -> None:
        assert self.sdl.SDL_JoystickDetachVirtual(self.index) == 0


@pytest.fixture(scope="module")
def sdl() -> Iterator[ctypes.CDLL]:
    """The library that pygame has loaded, with its joysticks on."""
    if sys.platform != "linux":
        pytest.skip("finds SDL by /proc")
    os.environ.update(gamepad.SETTINGS)
    pygame = pytest.importorskip("pygame")
    pygame.joystick.init()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    yield ctypes.CDLL(next(path for path in loaded if Path(path).name.startswith("libSDL2-2")))
    pygame.joystick.quit()


@pytest.fixture
def pads(sdl) -> Iterator[list[VirtualPad]]:
    """Those that are plugged in: the last is out first, so that each keeps its index."""
    pads = [VirtualPad(sdl)]
    yield pads
    for pad in reversed(pads):
        pad.unplug()


@pytest.fixture
def pad(pads) -> VirtualPad:
    return pads[0]


@pytest.fixture
def device(pad) -> Iterator[Gamepad]:
    device = Gamepad()
    device.gesture()
    yield device
    device.close()


def press(pad: VirtualPad, device: Gamepad, button: int) -> Gesture:
    """The gesture that tells of it; let go afterwards."""
    pad.set(buttons={button: True})
    gesture = device.gesture()
    pad.set(buttons={button: False})
    return gesture


def take_over(pad: VirtualPad) -> None:
    pad.set(buttons={gamepad.TAKE_OVER: True})


@pytest.mark.parametrize(
    ("axes", "buttons", "drive_6"),
    [
        ({}, {}, 0 * X),
        ({LEFT_Y: -1}, {}, X),
        ({LEFT_Y: 1}, {}, -X),
        ({LEFT_X: -1}, {}, Y),
        ({RIGHT_Y: -1}, {}, Z),
        ({RIGHT_X: -1}, {}, YAW),
        ({LEFT_X: 1, RIGHT_Y: 1}, {}, -Y - Z),
        ({}, {gamepad.UP: True}, PITCH),
        ({}, {gamepad.DOWN: True}, -PITCH),
        ({}, {gamepad.RIGHT: True}, ROLL),
        ({}, {gamepad.LEFT: True}, -ROLL),
        ({LEFT_Y: -0.575}, {}, (0.575 - DEAD_ZONE) / (1 - DEAD_ZONE) * X),
        ({LEFT_X: 0.14, LEFT_Y: -0.14, RIGHT_X: 0.14}, {}, 0 * X),
    ],
)
def test_sticks_drive_while_the_shoulder_is_held(pad, device, axes, buttons, drive_6):
    take_over(pad)
    pad.set(axes=axes, buttons=buttons)
    np.testing.assert_allclose(device.gesture().drive_6, drive_6, atol=1e-4)


def test_without_the_shoulder_nothing_drives(pad, device):
    pad.set(axes={LEFT_Y: -1, RIGHT_X: 1}, buttons={gamepad.UP: True})
    assert device.gesture().drive_6 is None
    take_over(pad)
    assert device.gesture().drive_6.any()
    pad.set(buttons={gamepad.TAKE_OVER: False})
    assert device.gesture().drive_6 is None


@pytest.mark.parametrize(
    ("button", "told"),
    [
        (gamepad.A, {"outcome": "success"}),
        (gamepad.X, {"outcome": "failure"}),
        (gamepad.Y, {"outcome": "error"}),
        (gamepad.B, {"stops": "B was pressed on the gamepad"}),
        (gamepad.START, {"lets_go": True}),
        (gamepad.RIGHT_SHOULDER, {"grips": True}),
        (gamepad.LEFT, {}),
    ],
)
def test_a_button_is_told_once(pad, device, button, told):
    assert press(pad, device, button) == Gesture(**told)
    assert device.gesture() == Gesture()


def test_a_button_that_stays_down_is_told_once(pad, device):
    pad.set(buttons={gamepad.A: True})
    assert device.gesture().outcome == "success"
    assert device.gesture().outcome is None


def test_unplugged_in_the_middle_of_a_takeover_it_stops_the_arm(pads, pad, device):
    pilot = Together(spec_of(), [device])
    take_over(pad)
    pad.set(axes={LEFT_Y: -1})
    assert pilot.wish().action_A is not None
    pads.remove(pad)
    pad.unplug()
    for _ in range(3):
        wish = pilot.wish()
        assert wish.stopped == "the gamepad is gone" and wish.action_A is None


def test_plugged_in_again_it_drives_once_start_was_pressed(sdl, pads, pad, device):
    pilot = Together(spec_of(), [device])
    pads.remove(pad)
    pad.unplug()
    pilot.wish()
    pads.append(VirtualPad(sdl))
    pilot.wish()
    take_over(pads[0])
    assert pilot.wish().stopped == "the gamepad is gone"
    pads[0].set(buttons={gamepad.START: True})
    wish = pilot.wish()
    assert not wish.stopped and wish.action_A is not None


def test_out_and_in_again_between_two_looks_it_has_been_lost_all_the_same(sdl, pads, pad, device):
    pads.remove(pad)
    pad.unplug()
    pads.append(VirtualPad(sdl))
    with pytest.raises(PilotError, match="the gamepad is gone"):
        device.gesture()
    assert press(pads[0], device, gamepad.A).outcome == "success"


def test_a_second_pad_does_nothing(sdl, pads, device):
    pads.append(VirtualPad(sdl))
    assert device.gesture() == Gesture()
    with pytest.raises(AssertionError, match="nobody has opened it"):
        take_over(pads[1])


def test_without_a_pad_it_is_refused(sdl):
    with pytest.raises(PilotError, match="there is no gamepad"):
        Gamepad()


def test_the_signal_that_ends_a_process_still_does(device):
    """SDL would catch it where Python leaves it to the system."""
    [caught] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigCgt")]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1
