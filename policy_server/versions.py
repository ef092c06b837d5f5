"""Numbered weights.  Numbers are never reused; an episode is pinned to one, and one pass of the model uses one.

The first version, the live one, those of open episodes and a few used lately are held; another is built again from disk
when it is asked for.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from policy_server.errors import BadRequest, CannotStart, InternalFault, UnknownVersion
from policy_server.version_store import FIRST_VERSION, Incoming, Kind, Version, VersionStore

log = logging.getLogger(__name__)

RECENT = 2
"""How many versions are held though neither live nor of an open episode."""

Model = TypeVar("Model")
Build = Callable[[Path, Kind], tuple[Model, str]]
"""A model of the weights in a folder, and the fingerprint of its tensors on the device.  Raises BadRequest."""


class Versions(Generic[Model]):
    """The models that can be named, by version.  `live` is the one new episodes get.

    Thread-safe.  Whatever may build a model blocks for as long as that takes: it has no place on the event loop.
    Without a store and a way to build there is one version, and there will be no other.
    pinned() gives the versions of the open episodes.
    """

    def __init__(
        self,
        first: Model,
        *,
        store: VersionStore | None = None,
        build: Build[Model] | None = None,
        pinned: Callable[[], Collection[int]] = lambda: (),
    ):
        self._store, self._build, self._pinned = store, build, pinned
        self._held: OrderedDict[int, Model] = OrderedDict({FIRST_VERSION: first})
        self._building = threading.RLock()
        self._changing = threading.Lock()

    @property
    def live(self) -> int:
        return self._store.live if self._store is not None else FIRST_VERSION

    @property
    def known(self) -> Sequence[int]:
        return [one.version for one in self._store.versions] if self._store is not None else [FIRST_VERSION]

    def holds(self, version: int) -> bool:
        """Whether model() would not have to build it."""
        return version in self._held

    def check(self, version: int, *, field: str = "version") -> int:
        """The version itself.  Raises UnknownVersion for one that is not there."""
        if version == FIRST_VERSION or (self._store is not None and self._store.find(version) is not None):
            return version
        raise UnknownVersion(f"there is no version {version}; there are {_shortened(self.known)}", field=field)

    def model(self, version: int) -> Model:
        """Built first where it is not held.  Raises UnknownVersion, and InternalFault when its folder is damaged."""
        with self._changing:
            if version in self._held:
                self._held.move_to_end(version)
                return self._held[version]
        self.check(version)
        with self._building:
            if self.holds(version):  # somebody else has built it meanwhile
                return self._held[version]
            model = self._rebuilt(version)
            self._hold(version, model)
        return model

    def open(self) -> None:
        """Builds the live version.  Raises CannotStart."""
        try:
            self.model(self.live)
        except InternalFault as error:
            raise CannotStart(f"the live version cannot be served: {error}") from error

    def publish(self, incoming: Incoming, *, parent: int, note: str, set_live: bool) -> Version:
        """A new version of weights that have arrived.  Raises BadRequest and OSError, and then has changed nothing."""
        assert self._store is not None and self._build is not None
        with self._building:
            model, fingerprint = self._build(incoming.folder, incoming.kind)
            version = self._store.commit(incoming, parent=parent, note=note, device_fingerprint=fingerprint)
            self._hold(version.version, model)
            if set_live:
                self.set_live(version.version)
        return version

    def set_live(self, version: int) -> int:
        """Makes a version live and gives the one before.  Raises UnknownVersion, InternalFault, OSError."""
        with self._building:
            self.model(version)
            previous = self._store.set_live(version) if self._store is not None else FIRST_VERSION
            self._trim()
        return previous

    def _rebuilt(self, version: int) -> Model:
        assert self._store is not None and self._build is not None
        record = self._store.find(version)
        assert record is not None
        try:
            model, fingerprint = self._build(self._store.path(version), record.kind)
        except BadRequest as error:
            raise InternalFault(f"version {version} cannot be built from disk: {error}") from error
        if fingerprint != record.device_fingerprint:
            raise InternalFault(f"version {version} on disk is not what was published: its fingerprint differs")
        return model

    def _hold(self, version: int, model: Model) -> None:
        with self._changing:
            self._held[version] = model
        self._trim()

    def _trim(self) -> None:
        needed = {FIRST_VERSION, self.live, *self._pinned()}
        with self._changing:
            spare = [version for version in self._held if version not in needed]  # longest unused first
            for version in spare[: max(0, len(spare) - RECENT)]:
                del self._held[version]


def _shortened(versions: Sequence[int]) -> str:
    return f"{versions}" if len(versions) <= 8 else f"{len(versions)}, {versions[0]} to {versions[-1]}"
