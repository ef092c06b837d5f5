"""An episode file is whole or absent, and a damaged one says so by name."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from protos import episode_pb2
from protos.codec import decode_tensor, encode_tensor
from protos.episode_file import MAGIC, DamagedEpisode, EpisodeReader, EpisodeWriter, read_episode

START = episode_pb2.EpisodeStart(episode_id="e-1", task="libero_object/3", initial_state="17", seed=5, tick_rate_hz=20)
END = episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_SUCCESS, terminal=True)


def decision(d: int) -> episode_pb2.Decision:
    actions = encode_tensor(np.full((2, 7), d, np.float32))
    return episode_pb2.Decision(decision=d, chunk=episode_pb2.Chunk(actions=actions, version=1))


def ticks(d: int) -> list[episode_pb2.Tick]:
    source = episode_pb2.SOURCE_POLICY
    return [episode_pb2.Tick(decision=d, index=k, action=[d] * 7, source=source) for k in range(2)]


def write(path, decisions: int = 3):
    writer = EpisodeWriter(path, START)
    for d in range(decisions):
        writer.decision(decision(d))
        writer.executed(ticks(d))
    writer.finish(END)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "000001.episode"


def test_a_finished_episode_is_read_as_it_was_written(path):
    episode = read_episode(write(path))
    assert episode.start == START and episode.end == END
    assert episode.decisions == [decision(d) for d in range(3)]
    assert episode.ticks == [tick for d in range(3) for tick in ticks(d)]
    assert decode_tensor(episode.decisions[2].chunk.actions)[0, 0] == 2


def test_an_episode_of_which_nothing_was_executed_is_whole(path):
    episode = read_episode(write(path, decisions=0))
    assert (episode.decisions, episode.ticks) == ([], [])


def test_while_it_is_open_there_is_no_episode(path):
    writer = EpisodeWriter(path, START)
    writer.decision(decision(0))
    assert not path.exists()
    writer.finish(END)
    assert path.exists() and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_discarded_episode_leaves_nothing(path):
    writer = EpisodeWriter(path, START)
    writer.decision(decision(0))
    writer.discard()
    assert list(path.parent.iterdir()) == []


def test_each_record_survives_the_death_of_its_process_but_makes_no_episode(path):
    program = f"""
import os
from pathlib import Path
from protos import episode_pb2
from protos.episode_file import EpisodeWriter
writer = EpisodeWriter(Path({str(path)!r}), episode_pb2.EpisodeStart(episode_id="e-1"))
writer.decision(episode_pb2.Decision(decision=41))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 9
    (partial,) = path.parent.iterdir()
    assert partial.name == "000001.episode.partial"
    assert episode_pb2.EpisodeRecord(decision=episode_pb2.Decision(decision=41)).SerializeToString() in (
        partial.read_bytes()
    )


def test_a_file_cut_at_any_byte_is_refused_by_name(path):
    data = write(path, decisions=1).read_bytes()
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        with pytest.raises(DamagedEpisode, match=r"^000001\.episode: "):
            read_episode(path)


def test_a_file_with_any_bit_flipped_is_refused_by_name(path):
    data = write(path, decisions=1).read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedEpisode, match=r"^000001\.episode: "):
            read_episode(path)


def test_a_file_with_bytes_appended_is_refused(path):
    data = write(path).read_bytes()
    path.write_bytes(data + b"\0")
    with pytest.raises(DamagedEpisode):
        read_episode(path)


def test_records_are_read_one_by_one_as_they_were_written(path):
    whole, reader = read_episode(write(path)), EpisodeReader(path)
    assert (reader.start, reader.end, len(reader)) == (whole.start, whole.end, 3)
    assert [reader.decision(d) for d in range(len(reader))] == whole.decisions
    with pytest.raises(IndexError):
        reader.decision(3)


def test_a_file_cut_at_any_byte_is_refused_by_who_reads_only_parts(path):
    data = write(path, decisions=1).read_bytes()
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        with pytest.raises(DamagedEpisode, match=r"^000001\.episode: "):
            EpisodeReader(path)


def signed(*records: bytes, count: int | None = None) -> bytes:
    """A file with a right checksum over these records."""
    body = MAGIC + b"".join(struct.pack("<I", len(record)) + record for record in records)
    return body + struct.pack("<III", 0xFFFFFFFF, len(records) if count is None else count, zlib.crc32(body))


FIRST = episode_pb2.EpisodeRecord(start=START).SerializeToString()
LAST = episode_pb2.EpisodeRecord(end=END).SerializeToString()
MIDDLE = episode_pb2.EpisodeRecord(decision=decision(0)).SerializeToString()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (signed(FIRST, LAST, count=3), "holds 2 records, its footer says 3"),
        (signed(FIRST, MIDDLE), "records must be start"),
        (signed(MIDDLE, LAST), "records must be start"),
        (signed(FIRST, FIRST, LAST), "records must be start"),
        (signed(FIRST, LAST, LAST), "records must be start"),
        (signed(FIRST), "records must be start"),
        (signed(), "records must be start"),
        (signed(FIRST, b"\xff\xff\xff", LAST), "record 1 is not an EpisodeRecord"),
        (signed(FIRST, b"", LAST), "record 1 is empty"),
        (signed(FIRST, LAST)[:-12] + b"\x09" + b"", "checksum"),
    ],
)
def test_records_that_make_no_episode_are_refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(DamagedEpisode, match=message):
        read_episode(path)


@pytest.mark.parametrize("tail", [b"\x05", b"\xff\xff\xff\xff", b"\x05\0\0\0ab"])
def test_a_record_longer_than_what_is_left_is_refused(path, tail):
    body = signed(FIRST, LAST)[:-12] + tail
    path.write_bytes(body + struct.pack("<III", 0xFFFFFFFF, 3, zlib.crc32(body)))
    with pytest.raises(DamagedEpisode, match="record 2 is cut"):
        read_episode(path)


@pytest.mark.parametrize("data", [b"", b"VLARL", b"\x89HDF\r\n", MAGIC])
def test_what_is_not_an_episode_file_is_refused_by_name(path, data):
    path.write_bytes(data)
    with pytest.raises(DamagedEpisode, match=r"^000001\.episode: "):
        read_episode(path)


def test_an_episode_needs_its_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.episode', got 'x\.bin'"):
        EpisodeWriter(tmp_path / "x.bin", START)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_reported_to_the_writer(tmp_path):
    with pytest.raises(OSError):
        EpisodeWriter(tmp_path / "missing" / "x.episode", START)
