"""Finished episodes on disk, numbered in the order they were finished.

    FOLDER/00000007-<episode id>.episode    whole; 7 is its sequence number
    FOLDER/open/<episode id>.episode.partial   being written
    FOLDER/set_aside/                          what a crash left unfinished

A number is given when an episode is whole, so that a reader that has seen number n never misses a smaller one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from policy_server.errors import CannotStart, Overloaded
from protos import episode_pb2
from protos.episode_file import PARTIAL_SUFFIX, SUFFIX, EpisodeWriter

log = logging.getLogger(__name__)

FULL_DISK_RETRY_MS = 10_000
DEFAULT_RESERVE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One whole episode."""

    sequence: int
    episode_id: str
    path: Path
    bytes: int


class EpisodeStore:
    """Thread-safe.

    keep_bytes: the oldest episodes beyond this total are deleted; the newest always stays.  None keeps everything.
    reserve_bytes: with less than this free on the disk no new episode is accepted, so that open ones can finish.
    Raises CannotStart when the folder cannot be used.
    """

    def __init__(self, folder: Path, *, keep_bytes: float | None = None, reserve_bytes: int = DEFAULT_RESERVE_BYTES):
        self._folder = folder
        self._open = folder / "open"
        self._keep_bytes = keep_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        try:
            self._open.mkdir(parents=True, exist_ok=True)
            self._claim = os.open(self._open, os.O_RDONLY)  # held until close(), or until this process is gone
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._stored = {stored.episode_id: stored for stored in _scan(folder)}
            self._last = max((stored.sequence for stored in self._stored.values()), default=0)
            self._recover()
        except BlockingIOError as error:
            raise CannotStart(f"the episode folder {str(folder)!r} is in use by another server") from error
        except OSError as error:
            raise CannotStart(f"the episode folder {str(folder)!r} cannot be used: {error.strerror}") from error

    def open(self, start: episode_pb2.EpisodeStart) -> EpisodeWriter:
        """Begins the file of an episode.  Raises Overloaded when the disk is full."""
        free = shutil.disk_usage(self._folder).free
        if free < self._reserve_bytes:
            raise Overloaded(
                f"the episode store is full: {free >> 20} MiB free, at least {self._reserve_bytes >> 20} MiB needed",
                retry_after_ms=FULL_DISK_RETRY_MS,
            )
        try:
            return EpisodeWriter(self._open / f"{start.episode_id}{SUFFIX}", start)
        except OSError as error:
            raise Overloaded(
                f"the episode store takes no new episode: {error.strerror}", retry_after_ms=FULL_DISK_RETRY_MS
            ) from error

    def finish(self, writer: EpisodeWriter, end: episode_pb2.EpisodeEnd) -> int:
        """Makes the episode whole and gives its sequence number; after this it survives a power cut."""
        writer.finish(end)
        with self._lock:
            sequence = self._number(writer.path)
            self._forget_oldest()
        return sequence

    def find(self, episode_id: str) -> int | None:
        """The sequence number of a whole episode."""
        with self._lock:
            stored = self._stored.get(episode_id)
        return stored.sequence if stored is not None else None

    def close(self) -> None:
        """Lets another server use the folder."""
        os.close(self._claim)

    def _number(self, whole: Path) -> int:
        sequence = self._last + 1
        episode_id = whole.name.removesuffix(SUFFIX)
        path = self._folder / f"{sequence:08d}-{episode_id}{SUFFIX}"
        os.replace(whole, path)
        _sync(self._folder)
        size = path.stat().st_size
        self._stored[episode_id] = Stored(sequence=sequence, episode_id=episode_id, path=path, bytes=size)
        self._last = sequence
        return sequence

    def _forget_oldest(self) -> None:
        # The newest stays whatever its size: its name carries the sequence number across a restart.
        total = sum(stored.bytes for stored in self._stored.values())
        while self._keep_bytes is not None and total > self._keep_bytes and len(self._stored) > 1:
            oldest = self._stored.pop(next(iter(self._stored)))
            oldest.path.unlink(missing_ok=True)
            total -= oldest.bytes

    def _recover(self) -> None:
        for whole in sorted(self._open.glob(f"*{SUFFIX}")):  # finished, but not yet numbered
            self._number(whole)
        for partial in sorted(self._open.glob(f"*{PARTIAL_SUFFIX}")):
            aside = self._folder / "set_aside" / partial.name
            aside.parent.mkdir(exist_ok=True)
            os.replace(partial, aside)
            log.warning("episode %s was never finished: set aside in %s", partial.name, aside.parent.name)


def _scan(folder: Path) -> list[Stored]:
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        number, _, episode_id = path.name.removesuffix(SUFFIX).partition("-")
        if number.isdigit():
            size = path.stat().st_size
            found.append(Stored(sequence=int(number), episode_id=episode_id, path=path, bytes=size))
    return sorted(found, key=lambda stored: stored.sequence)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
