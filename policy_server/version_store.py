"""Published weights on disk, one folder a version:

    FOLDER/state.json          which version is live, the last number given, and what version 0 is
    FOLDER/00000003/           whole; a LoRA version is a folder in PEFT's layout
        version.json           parent, kind, note, when, fingerprint
        model.safetensors      or adapter_model.safetensors and adapter_config.json
    FOLDER/incoming-xxxx/      being received; of no number until it is whole
    FOLDER/deleted-00000002/   on its way out

A number is given when a version is whole and is never given again, whatever becomes of the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal
from weakref import WeakSet

from policy_server.errors import CannotStart, Overloaded, UnknownVersion
from policy_server.refusals import FULL_DISK_RETRY_MS
from protos.episode_file import sync

log = logging.getLogger(__name__)

FIRST_VERSION = 0
Kind = Literal["first", "full", "lora"]
WEIGHTS: dict[Kind, str] = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
ADAPTER_CONFIG = "adapter_config.json"
RECORD, STATE = "version.json", "state.json"
INCOMING, DELETED = "incoming-", "deleted-"
DEFAULT_KEEP_VERSIONS = 16

RESERVE_BYTES = 256 * 2**20
SWAPS = 100
"""So many are remembered."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """What is known of numbered weights."""

    version: int
    parent: int
    kind: Kind
    """`first` is what the server was started with."""
    note: str
    published_unix_ns: int
    device_fingerprint: str
    """SHA-256 over the effective tensors as they lie on the device."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Another version was made live."""

    number: int
    """Of the swaps since the server started, from 1."""
    unix_ns: int
    previous: int
    live: int


class Incoming:
    """Weights that are being received, in a folder of their own.  Raises OSError when the disk refuses."""

    def __init__(self, folder: Path, kind: Kind, size: int, adapter_config: str):
        self.folder, self.size = folder, size
        self.kind: Kind = kind
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        folder.mkdir()
        if kind == "lora":
            (folder / ADAPTER_CONFIG).write_text(adapter_config, encoding="utf-8")
        self._file = (folder / WEIGHTS[kind]).open("wb")

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        """Everything has arrived."""
        self._file.close()

    def discard(self) -> None:
        """Drops what is there; does nothing after a commit."""
        self.size = self.bytes  # no more is to come
        with contextlib.suppress(OSError):  # what could not be written
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class VersionStore:
    """Thread-safe.  `first` is the device fingerprint of version 0; a folder is of one version 0 only.

    folder None keeps the versions in a scratch folder that goes with the store.  keep: how many of the newest trim()
    leaves whatever happens; None leaves all.
    Raises CannotStart when the folder cannot be used, or is of another model.
    """

    def __init__(self, folder: Path | None, *, first: str, keep: int | None = None, reserve_bytes: int = RESERVE_BYTES):
        self._keep = keep
        self._scratch = folder is None
        self.folder = folder or Path(mkdtemp(prefix="versions-"))
        self._reserve_bytes = reserve_bytes
        self._coming = WeakSet[Incoming]()
        self._writing = threading.Lock()
        self.live = self._last = FIRST_VERSION
        self.swaps: Sequence[Swap] = ()
        """The last ones, newest last."""
        self._versions = {FIRST_VERSION: _first(first)}  # replaced, never changed: readers wait for no disk
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim = os.open(self.folder, os.O_RDONLY)  # held until close(), or until this process is gone
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover(first)
        except BlockingIOError as error:
            raise CannotStart(f"the versions folder {str(self.folder)!r} is in use by another server") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CannotStart(f"the versions folder {str(self.folder)!r} cannot be used: {error}") from error

    @property
    def versions(self) -> Sequence[Version]:
        """All there are, by number."""
        return sorted(self._versions.values(), key=lambda version: version.version)

    def find(self, version: int) -> Version | None:
        return self._versions.get(version)

    def path(self, version: int) -> Path:
        """The folder of a published version."""
        return self.folder / f"{version:08d}"

    def receive(self, kind: Kind, size: int, adapter_config: str = "") -> Incoming:
        """A place for `size` bytes of weights.  Raises Overloaded when the disk has none."""
        free, to_come = shutil.disk_usage(self.folder).free, size + sum(one.size - one.bytes for one in self._coming)
        if free - to_come < self._reserve_bytes:
            raise Overloaded(
                f"the version store is full: {free >> 20} MiB free, {to_come >> 20} MiB to come and"
                f" {self._reserve_bytes >> 20} MiB in reserve",
                retry_after_ms=FULL_DISK_RETRY_MS,
            )
        incoming = Incoming(self.folder / f"{INCOMING}{secrets.token_hex(4)}", kind, size, adapter_config)
        self._coming.add(incoming)
        return incoming

    def commit(self, incoming: Incoming, *, parent: int, note: str, device_fingerprint: str) -> Version:
        """Gives received weights their number; after this they survive a power cut.  Raises OSError."""
        with self._writing:
            version = Version(
                version=self._last + 1,
                parent=parent,
                kind=incoming.kind,
                note=note,
                published_unix_ns=time.time_ns(),
                device_fingerprint=device_fingerprint,
            )
            (incoming.folder / RECORD).write_text(json.dumps(asdict(version), indent=2) + "\n", encoding="utf-8")
            for path in incoming.folder.iterdir():
                sync(path)
            sync(incoming.folder)
            # The number is taken first: a version that is acknowledged has one that no other can get.
            self._write_state(live=self.live, last=version.version)
            os.replace(incoming.folder, self.path(version.version))
            sync(self.folder)
            self._versions = {**self._versions, version.version: version}
        log.info("version %d is published", version.version, extra={"version": version.version, "note": note})
        return version

    def set_live(self, version: int) -> int:
        """Makes a version live, also after a power cut; gives the one before.  Raises UnknownVersion, OSError."""
        with self._writing:
            if version not in self._versions:
                raise UnknownVersion(f"there is no version {version} any more", field="version")
            previous = self.live
            self._write_state(live=version, last=self._last)
            if version != previous:
                number = self.swaps[-1].number + 1 if self.swaps else 1
                swap = Swap(number=number, unix_ns=time.time_ns(), previous=previous, live=version)
                self.swaps = (*self.swaps[-SWAPS + 1 :], swap)
        log.info("version %d is live, %d was before", version, previous, extra={"version": version})
        return previous

    def trim(self, needed: Collection[int]) -> None:
        """Deletes what is not among the newest, nor needed, nor live, nor what the live one was trained from.

        Version 0 is in no folder, and stays.
        """
        if self._keep is None:
            return
        with self._writing:
            kept = {*sorted(self._versions)[-self._keep :], *needed, self.live, self._versions[self.live].parent}
            deleted = sorted(self._versions.keys() - kept - {FIRST_VERSION})
            self._versions = {number: one for number, one in self._versions.items() if number not in deleted}
            for version in deleted:
                with contextlib.suppress(OSError):  # then it is there again after a restart
                    gone = self.folder / f"{DELETED}{version:08d}"
                    os.replace(self.path(version), gone)  # at once: a kill leaves no half of a version
                    shutil.rmtree(gone, ignore_errors=True)
                log.info("version %d is deleted", version, extra={"version": version})

    def close(self) -> None:
        """Lets another server use the folder."""
        os.close(self._claim)
        if self._scratch:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write_state(self, *, live: int, last: int) -> None:
        partial = self.folder / f"{STATE}.partial"
        first = self._versions[FIRST_VERSION].device_fingerprint
        partial.write_text(json.dumps({"first": first, "live": live, "last": last}) + "\n", encoding="utf-8")
        sync(partial)
        os.replace(partial, self.folder / STATE)
        sync(self.folder)
        self.live, self._last = live, last

    def _recover(self, first: str) -> None:
        for gone in self.folder.glob(f"{DELETED}*"):
            shutil.rmtree(gone)
        for unfinished in self.folder.glob(f"{INCOMING}*"):
            log.warning("weights in %s were never published: dropped", unfinished.name)
            shutil.rmtree(unfinished)
        for folder in sorted(path for path in self.folder.iterdir() if path.name.isdigit()):
            version = _read_record(folder)
            self._versions[version.version] = version
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            if state["first"] != first:
                raise ValueError(
                    "its versions were made of another version 0: another checkpoint, adapter or arithmetic"
                    f" (it has {state['first'][:12]}, this server {first[:12]})"
                )
            self.live, self._last = state["live"], max(state["last"], *self._versions)
        if self.live not in self._versions:
            raise ValueError(f"version {self.live} is live, but it is not there")


def _first(fingerprint: str) -> Version:
    """What the server was started with."""
    return Version(
        version=FIRST_VERSION,
        parent=FIRST_VERSION,
        kind="first",
        note="",
        published_unix_ns=0,
        device_fingerprint=fingerprint,
    )


def _read_record(folder: Path) -> Version:
    try:
        return Version(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"version {folder.name} has no readable {RECORD}: {error}") from error
