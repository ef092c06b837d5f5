"""Numbered weights.  Numbers are never reused; an episode is pinned to one, and one pass of the model uses one.

The first version, the live one, those of open episodes and some used lately are held: few that are whole models, more
that are adapters.  Another is built again from disk when it is asked for.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from policy_server.errors import BadRequest, CannotStart, InternalFault, Overloaded, Unavailable, UnknownVersion
from policy_server.refusals import ASLEEP, RETRY_SOON_MS
from policy_server.version_store import FIRST_VERSION, Incoming, Kind, Version, VersionStore

log = logging.getLogger(__name__)

RECENT = 2
"""How many whole models are held though neither live nor of an open episode."""
MOST_MODELS = 8
"""So many whole models, besides the first, may be in use at once before another must wait."""
CROWDED_RETRY_MS = 5_000
DEFAULT_ADAPTER_SLOTS = 16

T = TypeVar("T")
Weights = TypeVar("Weights")
Build = Callable[[Path, Kind], tuple[Weights, str]]
"""The weights in a folder as the model wants them, and the fingerprint of their tensors.  Raises BadRequest."""


class Versions(Generic[Weights]):
    """The weights that can be named, by version.  `live` is the one new episodes get.

    Thread-safe.  Whatever may build weights blocks for as long as that takes: it has no place on the event loop.
    Without a store and a way to build there is one version, and there will be no other.
    pinned() gives the versions of the open episodes.  adapter_slots: how many adapters are held, least recently used
    going first, though neither live nor of an open episode.
    """

    def __init__(
        self,
        first: Weights,
        *,
        store: VersionStore | None = None,
        build: Build[Weights] | None = None,
        pinned: Callable[[], Collection[int]] = lambda: (),
        adapter_slots: int = DEFAULT_ADAPTER_SLOTS,
    ):
        self._store, self._build, self._pinned = store, build, pinned
        self._held: OrderedDict[int, Weights] = OrderedDict({FIRST_VERSION: first})
        self._spare: dict[Kind, int] = {"full": RECENT, "lora": adapter_slots}
        self._building = threading.RLock()
        self._changing = threading.Lock()
        self._asleep = False

    @property
    def live(self) -> int:
        return self._store.live if self._store is not None else FIRST_VERSION

    @property
    def known(self) -> Sequence[int]:
        return [one.version for one in self._store.versions] if self._store is not None else [FIRST_VERSION]

    def holds(self, version: int) -> bool:
        """Whether weights() would not have to build it."""
        return version in self._held

    def held(self, versions: Collection[int]) -> list[Weights] | None:
        """Theirs, as long as none would have to be built."""
        with self._changing:
            if self._asleep or not self._held.keys() >= set(versions):
                return None
            return [self._held[version] for version in versions]

    def check(self, version: int, *, field: str = "version") -> int:
        """The version itself.  Raises UnknownVersion for one that is not there."""
        if version == FIRST_VERSION or (self._store is not None and self._store.find(version) is not None):
            return version
        raise UnknownVersion(f"there is no version {version}; there are {_shortened(self.known)}", field=field)

    def check_awake(self) -> None:
        """Raises Unavailable while the weights sleep."""
        if self._asleep:
            raise Unavailable(ASLEEP, retry_after_ms=RETRY_SOON_MS)

    def sleep(self, lie_down: Callable[[], T]) -> T:
        """Does it while nothing is built; from then on there are no weights."""
        with self._building:
            slept = lie_down()
            self._asleep = True
        return slept

    def wake(self, get_up: Callable[[], object]) -> None:
        """Does it, and there are weights again."""
        with self._building:
            get_up()
            self._asleep = False

    def weights(self, version: int) -> Weights:
        """Built first where it is not held.

        Raises UnknownVersion, InternalFault when its folder is damaged, Unavailable while the weights sleep, and
        Overloaded when the device has no room, or MOST_MODELS whole models are in use.
        """
        self.check_awake()
        with self._changing:
            if version in self._held:
                self._held.move_to_end(version)
                return self._held[version]
        self.check(version)
        with self._building:
            self.check_awake()
            if self.holds(version):  # somebody else has built it meanwhile
                return self._held[version]
            if self._kind(version) == "full" and (used := self._models_in_use()) >= MOST_MODELS:
                raise Overloaded(f"{used} whole models are in use, the most", retry_after_ms=CROWDED_RETRY_MS)
            weights = self._rebuilt(version)
            self._hold(version, weights)
        return weights

    def open(self) -> None:
        """Builds the live version.  Raises CannotStart."""
        try:
            self.weights(self.live)
        except InternalFault as error:
            raise CannotStart(f"the live version cannot be served: {error}") from error

    def publish(self, incoming: Incoming, *, parent: int, note: str, set_live: bool) -> Version:
        """A new version of weights that have arrived.

        Raises BadRequest, Overloaded, Unavailable while the weights sleep, and OSError, and then has changed nothing;
        but where making it live is what failed, it is published.
        """
        assert self._store is not None and self._build is not None
        with self._building:
            self.check_awake()
            weights, fingerprint = self._build(incoming.folder, incoming.kind)
            version = self._store.commit(incoming, parent=parent, note=note, device_fingerprint=fingerprint)
            self._hold(version.version, weights)
            if set_live:
                self.set_live(version.version)
        return version

    def set_live(self, version: int) -> int:
        """Makes a version live and gives the one before.  Raises as weights() does, and OSError."""
        with self._building:
            self.weights(version)
            previous = self._store.set_live(version) if self._store is not None else FIRST_VERSION
            self._trim()
        return previous

    def _rebuilt(self, version: int) -> Weights:
        assert self._store is not None and self._build is not None
        record = self._store.find(version)
        assert record is not None
        try:
            weights, fingerprint = self._build(self._store.path(version), record.kind)
        except BadRequest as error:
            raise InternalFault(f"version {version} cannot be built from disk: {error}") from error
        if fingerprint != record.device_fingerprint:
            raise InternalFault(f"version {version} on disk is not what was published: its fingerprint differs")
        return weights

    def _hold(self, version: int, weights: Weights) -> None:
        with self._changing:
            self._held[version] = weights
        self._trim()

    def _trim(self) -> None:
        needed = {FIRST_VERSION, self.live, *self._pinned()}
        with self._changing:
            for kind, slots in self._spare.items():
                spare = [v for v in self._held if v not in needed and self._kind(v) == kind]  # longest unused first
                for version in spare[: max(0, len(spare) - slots)]:
                    del self._held[version]

    def _models_in_use(self) -> int:
        """Whole models that are live, or of open episodes."""
        needed = {self.live, *self._pinned()}
        with self._changing:
            held = needed & self._held.keys()
        return sum(self._kind(version) == "full" for version in held)

    def _kind(self, version: int) -> Kind | None:
        record = self._store.find(version) if self._store is not None else None
        return record and record.kind


def _shortened(versions: Sequence[int]) -> str:
    return f"{versions}" if len(versions) <= 8 else f"{len(versions)}, {versions[0]} to {versions[-1]}"
