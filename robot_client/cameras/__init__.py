"""Cameras by make.  A package offers one by an entry point of the group `vla_rl.cameras`; ours are in this folder.

A make is a FrameSource whose constructor takes keyword arguments of simple types, the first of which says which device:
they become keys in a camera's description.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from robot_client.camera import Camera, FrameSource
from robot_client.errors import CameraError, UnknownCamera
from robot_client.plugins import Plugins

GROUP = "vla_rl.cameras"
CAMERAS = Plugins(group=GROUP, what="camera", unknown=UnknownCamera)
FORM = "NAME=MAKE[:DEVICE][,key=value...]"
READ: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
    Path: Path,
}
"""Type of a setting -> how its text is read; ValueError or KeyError where it cannot be."""


def available() -> list[str]:
    """Names of the installed makes."""
    return CAMERAS.available()


def load(make: str) -> Callable[..., FrameSource]:
    """The class of the source of that make.  Raises UnknownCamera, also when what it needs is not installed."""
    return CAMERAS.load(make)


def parse(text: str) -> Camera:
    """The camera of a description such as "front=realsense:1234,width=640,height=480,fps=30,crop=square", opened.

    A key is a setting of the make or of Camera; neither a device nor a value may hold a comma.  Raises UnknownCamera
    for the make, CameraError for the rest.
    """
    name, _, rest = text.partition("=")
    described, *pairs = rest.split(",")
    make, _, device = described.partition(":")
    if not name or not make or not all("=" in pair for pair in pairs):
        raise CameraError(f"a camera must be {FORM}, got {text!r}")
    source_class = load(make)
    of_source, of_camera = settings(source_class), settings(Camera)
    given = dict(pair.split("=", 1) for pair in pairs)
    if device:
        given = {next(iter(of_source)): device, **given}
    known = {**of_source, **of_camera}
    if unknown := sorted(set(given) - set(known)):
        raise CameraError(f"camera {name}: {make} has the settings {list(known)}, got {unknown}")
    values = {key: value_of(known[key], value, f"camera {name}: {key}") for key, value in given.items()}
    try:
        with CAMERAS.installed(make):
            source = source_class(**{key: value for key, value in values.items() if key in of_source})
        return Camera(name, source, **{key: value for key, value in values.items() if key not in of_source})
    except (TypeError, ValueError) as error:
        raise CameraError(f"camera {name}: {error}") from error


def settings(of: Callable[..., Any]) -> dict[str, Any]:
    """Keyword argument -> its type, of a constructor."""
    parameters = inspect.signature(of, eval_str=True).parameters.values()
    return {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}


def value_of(kind: Any, text: str, what: str) -> Any:
    """The value of that type that the text says.  Raises CameraError, which names `what` and what there is."""
    choices = {str(choice): choice for choice in get_args(kind)} if get_origin(kind) is Literal else {}
    if choices and text not in choices:
        raise CameraError(f"{what} must be one of {list(choices)}, got {text!r}")
    try:
        return choices[text] if choices else READ.get(kind, str)(text)
    except (ValueError, KeyError) as error:
        raise CameraError(f"{what} must be {kind.__name__}, got {text!r}") from error
