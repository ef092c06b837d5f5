"""One way to a policy server, whatever it speaks."""

from __future__ import annotations

from protos.channel import Credentials
from protos.codec import ImageFormat
from robot_client.client import Client, PolicyClient
from robot_client.errors import RobotError

OPENPI = "openpi:"
"""What the address of an openpi server begins with."""


def connect(
    server: str,
    *,
    credentials: Credentials | None = None,
    image_format: ImageFormat = "raw",
    resize: bool = False,
    stream: bool = False,
    deadline_s: float = 10.0,
    give_up_after_s: float = 60.0,
) -> Client:
    """A client of HOST:PORT, or of openpi://HOST:PORT (robot_client/openpi.py).  Whoever asked for it closes it.

    Raises RobotError for an address that is none, credentials that are of no use, and a package that is missing.
    """
    try:
        if not server.startswith(OPENPI):
            return PolicyClient(
                server,
                credentials=credentials,
                image_format=image_format,
                resize=resize,
                stream=stream,
                deadline_s=deadline_s,
                give_up_after_s=give_up_after_s,
            )
        if image_format != "raw" or resize:
            raise RobotError("openpi's protocol takes raw frames, and its servers resize them: leave out both flags")
        from robot_client.openpi import OpenpiClient  # needs the extra "openpi"

        return OpenpiClient(server, credentials=credentials, deadline_s=deadline_s, give_up_after_s=give_up_after_s)
    except ValueError as error:
        raise RobotError(str(error)) from error
    except ImportError as error:
        raise RobotError(f"openpi:// needs a package that is missing: {error}; pip install 'vla-rl[openpi]'") from error
