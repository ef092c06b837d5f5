"""Devices with which a person intervenes, by name.  A package offers one by an entry point of the group
`vla_rl.pilots`; ours are in this folder.

    keyboard                    drives, grips, stops, lets go, says the outcome
    gamepad                     all of it, while a button is held
    spacemouse[:HIDRAW]         drives, grips, stops
    serial-stop:PORT            stops: a button on two wires of a serial port

What is stopped is let go by Enter at the keyboard or Start at the gamepad; where there is neither, by starting anew.

A kind of device is a Device (robot_client/pilot.py) whose constructor takes one argument at most, a text that says
which device of its kind.  It knows nothing of the arm: Together gives what it says the arm's units and limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from robot_client.arm import ArmSpec
from robot_client.errors import PilotError
from robot_client.pilot import Device, Together
from robot_client.plugins import Plugins

PILOTS = Plugins(group="vla_rl.pilots", what="pilot", unknown=PilotError)


def available() -> list[str]:
    """Names of the installed kinds."""
    return PILOTS.available()


def load(name: str) -> Callable[..., Device]:
    """The class of that kind.  Raises PilotError, also when what it needs is not installed."""
    return PILOTS.load(name)


def parse(text: str) -> Device:
    """The device of a description, NAME[:DEVICE], opened.  Raises PilotError."""
    name, _, device = text.partition(":")
    make = load(name)
    try:
        with PILOTS.installed(name):
            return make(device) if device else make()
    except TypeError as error:
        raise PilotError(f"pilot {text!r}: {error}") from error


def together(texts: Sequence[str], spec: ArmSpec) -> Together:
    """The devices of these descriptions as one pilot of that arm; none stays open when PilotError is raised."""
    with ExitStack() as opened:
        devices = []
        for text in texts:
            devices.append(parse(text))
            opened.callback(devices[-1].close)
        pilot = Together(spec, devices)
        opened.pop_all()
        return pilot
