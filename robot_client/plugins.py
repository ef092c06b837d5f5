"""What packages offer by name: an entry point of a group, whose module is imported only when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from robot_client.errors import RobotError


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """One group of them."""

    group: str
    what: str
    """What each of them is: "arm"."""
    unknown: type[RobotError]
    """Raised for a name that nobody offers, or whose package is not installed."""

    def available(self) -> list[str]:
        """Names of those that are installed."""
        return sorted(point.name for point in entry_points(group=self.group))

    def load(self, name: str) -> Any:
        """What is offered under that name: a class, or a function that makes one of them."""
        found = list(entry_points(group=self.group, name=name))
        if not found:
            raise self.unknown(f"{self.what} must be one of {self.available()}, got {name!r}")
        with self.installed(name):
            return found[0].load()

    @contextlib.contextmanager
    def installed(self, name: str) -> Iterator[None]:
        """An import that fails inside is a package which that name needs and which is not installed."""
        try:
            yield
        except ImportError as error:
            raise self.unknown(
                f"{self.what} {name!r} needs a package that is not installed: {error}; "
                f"where it is an extra of ours: pip install 'vla-rl[{name}]'"
            ) from error
