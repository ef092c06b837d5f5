"""Episodes on disk across crashes, restarts and a bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart
from protos import episode_pb2
from protos.episode_file import read_episode


def record(store: EpisodeStore, episode_id: str, *, bytes_: int = 0) -> int:
    writer = store.open(episode_pb2.EpisodeStart(episode_id=episode_id))
    return store.finish(writer, episode_pb2.EpisodeEnd(message="x" * bytes_))


def names(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.glob("*.episode"))]


def test_episodes_are_numbered_in_the_order_they_are_finished(tmp_path):
    store = EpisodeStore(tmp_path)
    early = store.open(episode_pb2.EpisodeStart(episode_id="early"))
    assert record(store, "late") == 1
    assert store.finish(early, episode_pb2.EpisodeEnd()) == 2
    assert names(tmp_path) == ["00000001-late.episode", "00000002-early.episode"]


def test_an_open_episode_is_not_among_the_whole_ones(tmp_path):
    EpisodeStore(tmp_path).open(episode_pb2.EpisodeStart(episode_id="a"))
    assert names(tmp_path) == []


def test_numbers_go_on_after_a_restart(tmp_path):
    store = EpisodeStore(tmp_path)
    record(store, "a"), record(store, "b")
    store.close()
    assert record(EpisodeStore(tmp_path), "c") == 3


def test_what_a_crash_left_is_set_aside_and_named(tmp_path, caplog):
    store = EpisodeStore(tmp_path)
    store.open(episode_pb2.EpisodeStart(episode_id="unlucky"))
    store.close()  # as the system does when the process dies
    EpisodeStore(tmp_path)
    assert "unlucky.episode.partial" in caplog.text
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["unlucky.episode.partial"]
    assert list((tmp_path / "open").iterdir()) == []


def test_an_episode_that_was_whole_but_not_yet_numbered_at_a_crash_is_kept(tmp_path):
    store = EpisodeStore(tmp_path)
    record(store, "a")
    store.open(episode_pb2.EpisodeStart(episode_id="b")).finish(episode_pb2.EpisodeEnd())
    store.close()
    assert EpisodeStore(tmp_path).find("b") == 2
    assert read_episode(tmp_path / "00000002-b.episode").start.episode_id == "b"


def test_the_oldest_go_first_when_the_store_is_bounded(tmp_path):
    store = EpisodeStore(tmp_path, keep_bytes=2500)
    for n in range(5):
        record(store, f"e{n}", bytes_=1000)
    assert names(tmp_path) == ["00000004-e3.episode", "00000005-e4.episode"]


def test_the_newest_stays_even_beyond_the_bound_so_that_numbers_are_never_reused(tmp_path):
    store = EpisodeStore(tmp_path, keep_bytes=1)
    record(store, "a"), record(store, "b")
    store.close()
    assert names(tmp_path) == ["00000002-b.episode"]
    assert record(EpisodeStore(tmp_path, keep_bytes=1), "c") == 3


def test_two_servers_do_not_share_a_folder(tmp_path):
    first = EpisodeStore(tmp_path)
    with pytest.raises(CannotStart, match="in use by another server"):
        EpisodeStore(tmp_path)
    first.close()
    EpisodeStore(tmp_path)


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match="cannot be used: Not a directory"):
        EpisodeStore(tmp_path / "file" / "episodes")
