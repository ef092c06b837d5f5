"""Numbered weights.  Numbers are never reused; an episode is pinned to one, and one pass of the model uses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from policy_server.errors import UnknownVersion

FIRST_VERSION = 0

Model = TypeVar("Model")


class Versions(Generic[Model]):
    """The models that can be named, by version.  `live` is the one new episodes get."""

    def __init__(self, first: Model):
        self._models = {FIRST_VERSION: first}
        self.live = FIRST_VERSION

    @property
    def known(self) -> Sequence[int]:
        return sorted(self._models)

    def check(self, version: int) -> int:
        """The version itself.  Raises UnknownVersion for one that is not there."""
        if version not in self._models:
            raise UnknownVersion(f"there is no version {version}; there are {self.known}", field="version")
        return version

    def model(self, version: int) -> Model:
        return self._models[self.check(version)]
