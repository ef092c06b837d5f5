"""Episodes on disk: records appended as they happen, a checksummed footer at the end; a file is whole or absent.

Layout: MAGIC, then per record `u32 length, bytes`, then the footer `u32 END, u32 number of records, u32 CRC-32 of
everything before the footer`.  All integers are little-endian.  While an episode is open its file is called
`<name>.episode.partial`; finish() syncs it and renames it, so that a reader never sees half an episode.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path

from google.protobuf.message import DecodeError

from protos import episode_pb2

MAGIC = b"VLARLEP1"
END = 0xFFFFFFFF
FOOTER = struct.Struct("<III")
READ_BYTES = 2**20
SUFFIX = ".episode"
PARTIAL_SUFFIX = ".episode.partial"
HELPERS = (episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_EXPERT)
"""Sources of ticks: who takes over from the policy."""


class DamagedEpisode(ValueError):
    """A file that is not a whole episode.  The message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A whole episode.  `ticks` are in the order they were executed, over all decisions."""

    start: episode_pb2.EpisodeStart
    decisions: list[episode_pb2.Decision]
    ticks: list[episode_pb2.Tick]
    end: episode_pb2.EpisodeEnd

    @classmethod
    def of(cls, records: list[episode_pb2.EpisodeRecord], name: str) -> Episode:
        """From its records, off disk or off the wire.  Raises DamagedEpisode when they are not one episode."""
        kinds = [record.WhichOneof("record") for record in records]
        if len(kinds) < 2 or kinds[0] != "start" or kinds[-1] != "end" or {"start", "end"} & set(kinds[1:-1]):
            raise DamagedEpisode(
                f"{name}: records must be start, decisions and executed ticks, end; got {kinds[:1]}...{kinds[-1:]}"
            )
        return cls(
            start=records[0].start,
            decisions=[record.decision for record in records if record.HasField("decision")],
            ticks=[tick for record in records if record.HasField("executed") for tick in record.executed.ticks],
            end=records[-1].end,
        )


class EpisodeWriter:
    """Appends the records of one episode.

    path is the final name and ends in `.episode`.  Each append reaches the operating system before it returns; finish()
    returns after sync and rename.  Raises OSError when the disk refuses.
    """

    def __init__(self, path: Path, start: episode_pb2.EpisodeStart):
        if path.suffix != SUFFIX:
            raise ValueError(f"an episode file must end in {SUFFIX!r}, got {path.name!r}")
        self.path = path
        self.start = start
        self._partial = path.with_suffix(PARTIAL_SUFFIX)
        self._file = open(self._partial, "wb", buffering=0)  # noqa: SIM115 (closed by finish or discard)
        self.bytes = 0
        """written so far"""
        self._crc = 0
        self._records = 0
        self._write(MAGIC)
        self._append(episode_pb2.EpisodeRecord(start=start))

    def decision(self, decision: episode_pb2.Decision) -> None:
        self._append(episode_pb2.EpisodeRecord(decision=decision))

    def executed(self, ticks: list[episode_pb2.Tick]) -> None:
        if ticks:
            self._append(episode_pb2.EpisodeRecord(executed=episode_pb2.Executed(ticks=ticks)))

    def finish(self, end: episode_pb2.EpisodeEnd) -> None:
        """Writes the end and the footer, syncs, renames: after this the episode survives a power cut."""
        self._append(episode_pb2.EpisodeRecord(end=end))
        write_whole(self._file, FOOTER.pack(END, self._records, self._crc))
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Drops the episode; nothing of it remains on disk."""
        self._file.close()
        self._partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _append(self, record: episode_pb2.EpisodeRecord) -> None:
        data = record.SerializeToString()
        self._write(struct.pack("<I", len(data)) + data)
        self._records += 1

    def _write(self, data: bytes) -> None:
        write_whole(self._file, data)
        self._crc = zlib.crc32(data, self._crc)
        self.bytes += len(data)


class EpisodeReader:
    """A whole episode of which only the records that are asked for are read; nothing is verified but the layout.

    Raises DamagedEpisode, and OSError where there is no such file any more.
    """

    def __init__(self, path: Path):
        self._path = path
        self._spans = _spans(path)
        if not self._spans["start"] or not self._spans["end"]:
            raise DamagedEpisode(f"{path.name}: has no start or no end")

    def __len__(self) -> int:
        """How many decisions there are."""
        return len(self._spans["decision"])

    @property
    def start(self) -> episode_pb2.EpisodeStart:
        return self._read("start", 0).start

    @property
    def end(self) -> episode_pb2.EpisodeEnd:
        return self._read("end", 0).end

    def decision(self, index: int) -> episode_pb2.Decision:
        """Raises IndexError."""
        return self._read("decision", index).decision

    def _read(self, kind: str, index: int) -> episode_pb2.EpisodeRecord:
        begin, length = self._spans[kind][index]
        with open(self._path, "rb") as file:
            file.seek(begin)
            data = file.read(length)
        try:
            return episode_pb2.EpisodeRecord.FromString(data)
        except DecodeError as error:
            raise DamagedEpisode(f"{self._path.name}: its {kind} {index} is not an EpisodeRecord: {error}") from error


def write_whole(file: FileIO, data: bytes) -> None:
    """All of it, since an unbuffered write may be short.  Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, survive a power cut once this returns.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_episode(path: Path) -> Episode:
    """The whole episode at path.  Raises DamagedEpisode when the file is cut, altered or not an episode."""
    with open(path, "rb") as file:
        return Episode.of(list(_records(file, path.name, *_verified(file, path.name))), path.name)


def read_records(path: Path) -> Iterator[episode_pb2.EpisodeRecord]:
    """The records at path as they were written, in memory one at a time.

    The file is verified before the first.  Raises DamagedEpisode when it is cut or altered, and OSError.
    """
    file = open(path, "rb")  # noqa: SIM115 (closed with the last record)
    try:
        verified = _verified(file, path.name)
        deque(_records(file, path.name, *verified), maxlen=0)
    except BaseException:
        file.close()
        raise
    return _read_to_the_end(file, _records(file, path.name, *verified))


def read_start(path: Path) -> episode_pb2.EpisodeStart:
    """The first record at path; the rest is not read.  Raises DamagedEpisode when there is no such record."""
    with open(path, "rb") as file:
        magic, length = file.read(len(MAGIC)), int.from_bytes(file.read(4), "little")
        if magic != MAGIC:
            raise DamagedEpisode(f"{path.name}: not an episode file (starts with {magic!r}, expected {MAGIC!r})")
        data = file.read(min(length, path.stat().st_size))
    try:
        record = episode_pb2.EpisodeRecord.FromString(data)
    except DecodeError as error:
        raise DamagedEpisode(f"{path.name}: record 0 is not an EpisodeRecord: {error}") from error
    if not record.HasField("start"):
        raise DamagedEpisode(f"{path.name}: record 0 must be a start, got {record.WhichOneof('record')}")
    return record.start


def _spans(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Where the records of each kind begin, and their lengths: nothing else of them is read."""
    kinds = {field.number: field.name for field in episode_pb2.EpisodeRecord.DESCRIPTOR.fields}
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in kinds.values()}
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DamagedEpisode(f"{path.name}: not an episode file")
        position, footer = len(MAGIC), path.stat().st_size - FOOTER.size
        while position < footer:
            file.seek(position)
            head = file.read(5)  # the length, and the tag of the one field that is set
            begin, length = position + 4, int.from_bytes(head[:4], "little")
            kind = kinds.get(head[4] >> 3)
            position = begin + length
            if position > footer or kind is None:
                raise DamagedEpisode(f"{path.name}: the record at {begin} is cut, or of an unknown kind")
            spans[kind].append((begin, length))
    return spans


def _verified(file: BufferedReader, name: str) -> tuple[int, int]:
    """Where the footer of a whole file begins, and how many records it says there are.  Raises DamagedEpisode."""
    file.seek(0)
    magic, size = file.read(len(MAGIC)), os.fstat(file.fileno()).st_size
    if magic != MAGIC:
        raise DamagedEpisode(f"{name}: not an episode file (starts with {magic!r}, expected {MAGIC!r})")
    footer = size - FOOTER.size
    if footer < len(MAGIC):
        raise DamagedEpisode(f"{name}: cut after {size} bytes, there is no footer")
    found = zlib.crc32(magic)
    while data := file.read(min(READ_BYTES, footer - file.tell())):
        found = zlib.crc32(data, found)
    end, count, crc = FOOTER.unpack(file.read(FOOTER.size))
    if end != END or crc != found:
        raise DamagedEpisode(f"{name}: checksum does not match its {size} bytes: cut or altered")
    return footer, count


def _records(file: BufferedReader, name: str, footer: int, count: int) -> Iterator[episode_pb2.EpisodeRecord]:
    seen = 0
    file.seek(len(MAGIC))
    while (left := footer - file.tell()) > 0:
        length = int.from_bytes(file.read(4), "little")
        if length > left - 4:
            raise DamagedEpisode(f"{name}: record {seen} is cut: it runs past the footer")
        try:
            record = episode_pb2.EpisodeRecord.FromString(file.read(length))
        except DecodeError as error:
            raise DamagedEpisode(f"{name}: record {seen} is not an EpisodeRecord: {error}") from error
        if record.WhichOneof("record") is None:
            raise DamagedEpisode(f"{name}: record {seen} is empty, or of a kind that this version does not know")
        yield record
        seen += 1
    if seen != count:
        raise DamagedEpisode(f"{name}: holds {seen} records, its footer says {count}")


def _read_to_the_end(
    file: BufferedReader, records: Iterator[episode_pb2.EpisodeRecord]
) -> Iterator[episode_pb2.EpisodeRecord]:
    with file:
        yield from records
