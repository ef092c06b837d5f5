"""Finished episodes on disk, numbered in the order they were finished.

    FOLDER/00000007-<episode id>.episode         whole; 7 is its sequence number
    FOLDER/00000008-<episode id>.error.episode   whole; it ended as an error
    FOLDER/open/<episode id>.episode.partial     being written
    FOLDER/set_aside/                            what a crash left unfinished, and what can no longer be read
    FOLDER/cursors.json                          how far each reader has safely read

A number is given when an episode is whole, so that a reader that has seen number n never misses a smaller one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from policy_server.cursors import Cursors
from policy_server.errors import CannotStart, OutOfOrder, Overloaded
from policy_server.refusals import FULL_DISK_RETRY_MS
from protos import episode_pb2
from protos.episode_file import (
    PARTIAL_SUFFIX,
    SUFFIX,
    DamagedEpisode,
    EpisodeWriter,
    read_episode,
    read_records,
    read_start,
    sync,
)

log = logging.getLogger(__name__)

DEFAULT_RESERVE_BYTES = 256 * 2**20
ERROR_SUFFIX = f".error{SUFFIX}"
LOST = (errno.ENOENT, errno.EIO)
"""What the system says of a file that will never be read; its other errors pass."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One whole episode."""

    sequence: int
    episode_id: str
    path: Path
    bytes: int
    rollout_id: str = ""
    """empty when it was nobody's work, or cannot be read"""
    session_id: str = ""
    """empty when it was in none, or cannot be read"""
    error: bool
    """whether it ended as one"""
    damaged: str = ""
    """why it cannot be read any more"""

    @property
    def counted(self) -> bool:
        """Whether its rollout is done by it."""
        return bool(self.rollout_id) and not self.error and not self.damaged


class EpisodeStore:
    """Thread-safe.  What only looks at what lies here waits for no disk.

    keep_bytes: the oldest episodes beyond this total are deleted, but none that a reader has yet to read; the newest
    always stays.  Of what crashes left unfinished, the next start deletes what is beyond it.  None keeps everything.
    reserve_bytes: with less than this free on the disk no new episode is accepted, so that open ones can finish.
    Raises CannotStart when the folder cannot be used.
    """

    def __init__(self, folder: Path, *, keep_bytes: float | None = None, reserve_bytes: int = DEFAULT_RESERVE_BYTES):
        self._folder = folder
        self._open = folder / "open"
        self._aside = folder / "set_aside"
        self._keep_bytes = keep_bytes
        self._reserve_bytes = reserve_bytes
        self._writing = threading.Lock()  # whoever changes anything has it
        self._lock = threading.Lock()  # and this one just for the change, as whoever looks does
        self._stored: dict[int, Stored] = {}
        self._sequences: dict[str, int] = {}
        self._bytes = 0
        self._last = self._given = 0
        self._watchers: list[Future[None]] = []
        self._laggard = ""
        try:
            self._open.mkdir(parents=True, exist_ok=True)
            self._aside.mkdir(exist_ok=True)
            self._claim = os.open(self._open, os.O_RDONLY)  # held until close(), or until this process is gone
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cursors = Cursors(folder / "cursors.json")
            self._recover()
        except BlockingIOError as error:
            raise CannotStart(f"the episode folder {str(folder)!r} is in use by another server") from error
        except OSError as error:
            raise CannotStart(f"the episode folder {str(folder)!r} cannot be used: {error.strerror}") from error

    @property
    def newest(self) -> int:
        """The sequence number of the newest episode; 0 before the first."""
        return self._last

    @property
    def size(self) -> tuple[int, int]:
        """How many whole episodes lie here, and how many bytes they are."""
        with self._lock:
            return sum(not stored.damaged for stored in self._stored.values()), self._bytes

    def check_room(self) -> None:
        """Raises Overloaded when the disk is full."""
        free = shutil.disk_usage(self._folder).free
        if free < self._reserve_bytes:
            raise Overloaded(
                f"the episode store is full: {free >> 20} MiB free, at least {self._reserve_bytes >> 20} MiB needed",
                retry_after_ms=FULL_DISK_RETRY_MS,
            )

    def open(self, start: episode_pb2.EpisodeStart) -> EpisodeWriter:
        """Begins the file of an episode.  Raises Overloaded when the disk is full."""
        self.check_room()
        try:
            return EpisodeWriter(self._open / f"{start.episode_id}{SUFFIX}", start)
        except OSError as error:
            raise Overloaded(
                f"the episode store takes no new episode: {error.strerror}", retry_after_ms=FULL_DISK_RETRY_MS
            ) from error

    def finish(self, writer: EpisodeWriter, end: episode_pb2.EpisodeEnd) -> int:
        """Makes the episode whole and gives its sequence number; after this it survives a power cut."""
        writer.finish(end)
        with self._writing:
            sequence = self._number(writer.path, writer.start, end)
            self._forget_oldest()
        return sequence

    def find(self, episode_id: str) -> Stored | None:
        """The whole episode of this id, while it lies here."""
        with self._lock:
            return self._stored.get(self._sequences.get(episode_id, 0))

    def counted_rollouts(self) -> list[str]:
        """The rollouts that are done by an episode that lies here."""
        with self._lock:
            return [stored.rollout_id for stored in self._stored.values() if stored.counted]

    def after(self, cursor: int) -> list[Stored]:
        """What was finished after the episode numbered cursor, in order.  Raises OutOfOrder for a number not given."""
        with self._lock:
            self._check(cursor)
            return [self._stored[n] for n in range(cursor + 1, self._last + 1) if n in self._stored]

    def latest(self, count: int, session_id: str = "", *, sound: bool = False) -> list[Stored]:
        """What was finished last, newest first; a session's alone where one is named.

        sound: neither what ended as an error nor what cannot be read.
        """
        with self._lock:
            wanted = (s for s in reversed(self._stored.values()) if not session_id or s.session_id == session_id)
            if sound:
                wanted = (stored for stored in wanted if not stored.error and not stored.damaged)
            return list(itertools.islice(wanted, count))

    def beyond(self, cursor: int) -> Future[None]:
        """Done when an episode after the cursor is whole."""
        future: Future[None] = Future()
        with self._lock:
            if self._last > cursor:
                future.set_result(None)
            else:
                self._watchers = [*(watcher for watcher in self._watchers if not watcher.done()), future]
        return future

    def records(self, stored: Stored) -> Iterator[episode_pb2.EpisodeRecord]:
        """An episode's records, in memory one at a time; none when it has been deleted meanwhile.

        Raises DamagedEpisode, naming the file, when it cannot be read: it is set aside then.
        """
        if stored.damaged:
            raise DamagedEpisode(stored.damaged)
        try:
            return _read(read_records, stored.path)
        except DamagedEpisode as error:
            why = str(error)
        with self._writing:
            now = self._stored.get(stored.sequence)
            if now is None:
                return iter(())
            raise DamagedEpisode(now.damaged or self._set_aside(now, why).damaged)

    def commit(self, reader: str, cursor: int) -> None:
        """The reader has safely read everything up to the cursor; nothing beyond it is deleted until the next commit.

        Survives a power cut.  Raises OutOfOrder for a number that was never given, Overloaded when the disk refuses.
        """
        with self._writing:
            self._check(cursor)
            self._keep({**self._cursors.by_reader, reader: cursor})

    def leave(self, reader: str) -> None:
        """Nothing is kept for the reader any more.  Raises Overloaded when the disk refuses."""
        with self._writing:
            self._keep({name: cursor for name, cursor in self._cursors.by_reader.items() if name != reader})

    def close(self) -> None:
        """Lets another server use the folder."""
        os.close(self._claim)

    def _check(self, cursor: int) -> None:
        if cursor > self._last:
            raise OutOfOrder(f"must be at most {self._last}, the newest episode here, got {cursor}", field="cursor")

    def _keep(self, cursors: Mapping[str, int]) -> None:
        try:
            self._cursors.write(cursors)
        except OSError as error:
            raise Overloaded(
                f"the cursor could not be stored: {error.strerror}", retry_after_ms=FULL_DISK_RETRY_MS
            ) from error
        self._forget_oldest()

    def _number(self, whole: Path, start: episode_pb2.EpisodeStart, end: episode_pb2.EpisodeEnd) -> int:
        sequence = self._given = self._given + 1  # no other gets it, whatever becomes of this one
        error = end.outcome == episode_pb2.OUTCOME_ERROR
        path = self._folder / f"{sequence:08d}-{start.episode_id}{ERROR_SUFFIX if error else SUFFIX}"
        size = whole.stat().st_size
        try:
            os.replace(whole, path)
            sync(self._folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.replace(path, whole)  # whoever gives up on it knows it by that name
            raise
        stored = Stored(
            sequence=sequence,
            episode_id=start.episode_id,
            path=path,
            bytes=size,
            rollout_id=start.rollout_id,
            session_id=start.session_id,
            error=error,
        )
        with self._lock:
            self._add(stored)
            self._wake()
        return sequence

    def _add(self, stored: Stored) -> None:
        self._stored[stored.sequence] = stored
        self._sequences[stored.episode_id] = stored.sequence
        self._bytes += stored.bytes
        self._last = self._given = stored.sequence

    def _wake(self) -> None:
        watchers, self._watchers = self._watchers, []
        for future in watchers:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _forget_oldest(self) -> None:
        # The newest stays whatever its size: its name carries the sequence number across a restart.
        while self._keep_bytes is not None and self._bytes > self._keep_bytes and len(self._stored) > 1:
            oldest = next(iter(self._stored.values()))
            laggard = self._cursors.laggard(oldest.sequence)
            if laggard is not None:
                if laggard != self._laggard:
                    log.warning("the episode store is over its bound: it keeps what reader %r has not read", laggard)
                self._laggard = laggard
                return
            with self._lock:
                del self._stored[oldest.sequence], self._sequences[oldest.episode_id]
                self._bytes -= oldest.bytes
            with contextlib.suppress(OSError):  # then it is there again after a restart
                oldest.path.unlink()

    def _set_aside(self, stored: Stored, why: str) -> Stored:
        aside = self._aside / stored.path.name
        with contextlib.suppress(OSError):  # whatever ails the disk, it is not read again
            os.replace(stored.path, aside)
        log.error("episode %d is damaged, and set aside in %s: %s", stored.sequence, self._aside.name, why)
        damaged = replace(stored, path=aside, bytes=0, damaged=why)
        with self._lock:
            self._bytes -= stored.bytes
            self._stored[stored.sequence] = damaged
        return damaged

    def _recover(self) -> None:
        """Takes stock of what the last server left."""
        found = [*_numbered(self._folder), *_numbered(self._aside)]
        for stored in sorted(found, key=lambda stored: stored.sequence):
            self._take_stock(stored)
        for whole in sorted(self._open.glob(f"*{SUFFIX}")):  # finished, but not yet numbered
            try:
                episode = _read(read_episode, whole)
            except DamagedEpisode as error:
                log.error("%s", error)
                whole.rename(whole.with_suffix(PARTIAL_SUFFIX))
            else:
                self._number(whole, episode.start, episode.end)
        for partial in sorted(self._open.glob(f"*{PARTIAL_SUFFIX}")):
            os.replace(partial, self._aside / partial.name)
            log.warning("episode %s was never finished: set aside in %s", partial.name, self._aside.name)
        self._forget_partials()

    def _forget_partials(self) -> None:
        """What crashes left unfinished goes first, the oldest before others, where all together is beyond the bound."""
        partials = sorted(self._aside.glob(f"*{PARTIAL_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        total = self._bytes + sum(path.stat().st_size for path in partials)
        for partial in partials:
            if self._keep_bytes is not None and total > self._keep_bytes:
                total -= partial.stat().st_size
                partial.unlink()

    def _take_stock(self, stored: Stored) -> None:
        if stored.path.parent == self._aside:
            self._add(replace(stored, bytes=0, damaged=f"{stored.path.name}: was found damaged, and set aside"))
            return
        self._add(stored)
        try:
            start = _read(read_start, stored.path)
            self._stored[stored.sequence] = replace(stored, rollout_id=start.rollout_id, session_id=start.session_id)
        except DamagedEpisode as error:
            self._set_aside(stored, str(error))


def _read(read: Callable[[Path], T], path: Path) -> T:
    """What read(path) gives.  Raises DamagedEpisode, naming the file, also where the system says that it is lost."""
    try:
        return read(path)
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise DamagedEpisode(f"{path.name}: cannot be read: {error.strerror}") from error


def _numbered(folder: Path) -> Iterator[Stored]:
    for path in folder.glob(f"*{SUFFIX}"):
        error = path.name.endswith(ERROR_SUFFIX)
        name = path.name.removesuffix(ERROR_SUFFIX if error else SUFFIX)
        number, _, episode_id = name.partition("-")
        if number.isdigit():
            size = path.stat().st_size
            yield Stored(sequence=int(number), episode_id=episode_id, path=path, bytes=size, error=error)
