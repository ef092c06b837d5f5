"""Episodes on disk across crashes, restarts and a bound."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from policy_server import cursors, episode_store
from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart, Overloaded
from protos import episode_pb2
from protos.episode_file import DamagedEpisode, read_episode


def record(store: EpisodeStore, episode_id: str, *, rollout_id: str = "", bytes_: int = 0, error: bool = False) -> int:
    writer = store.open(episode_pb2.EpisodeStart(episode_id=episode_id, rollout_id=rollout_id))
    outcome = episode_pb2.OUTCOME_ERROR if error else episode_pb2.OUTCOME_FAILURE
    return store.finish(writer, episode_pb2.EpisodeEnd(outcome=outcome, message="x" * bytes_))


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


def test_errors_take_no_place_among_the_latest_sound_ones(tmp_path):
    store = EpisodeStore(tmp_path)
    for name in "abcd":
        record(store, name, error=name in "cd")
    assert [stored.episode_id for stored in store.latest(2)] == ["d", "c"]
    assert [stored.episode_id for stored in store.latest(2, sound=True)] == ["b", "a"]


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
    found = EpisodeStore(tmp_path).find("b")
    assert found is not None and found.sequence == 2
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


def test_a_rollout_is_counted_by_its_episode_even_when_a_crash_came_before_the_number(tmp_path):
    store = EpisodeStore(tmp_path)
    record(store, "a", rollout_id="r/0"), record(store, "b", rollout_id="r/1", error=True), record(store, "c")
    for name, outcome in (("d", episode_pb2.OUTCOME_FAILURE), ("e", episode_pb2.OUTCOME_ERROR)):
        writer = store.open(episode_pb2.EpisodeStart(episode_id=name, rollout_id=f"r/{name}"))
        writer.finish(episode_pb2.EpisodeEnd(outcome=outcome))
    assert store.counted_rollouts() == ["r/0"]
    store.close()
    for _ in range(2):
        store = EpisodeStore(tmp_path)
        assert store.counted_rollouts() == ["r/0", "r/d"]
        assert [store.find(stored.episode_id) for stored in store.after(0)] == store.after(0)
        assert [(stored.sequence, stored.episode_id) for stored in store.after(0)] == list(enumerate("abcde", 1))
        store.close()


def test_an_episode_that_was_lost_on_the_way_to_its_number_does_not_come_back(tmp_path, monkeypatch):
    store = EpisodeStore(tmp_path)
    writer = store.open(episode_pb2.EpisodeStart(episode_id="a", rollout_id="r/0"))
    monkeypatch.setattr(store, "_number", lambda *_: os.stat("/nowhere"))
    with pytest.raises(OSError):
        store.finish(writer, episode_pb2.EpisodeEnd())
    writer.discard()
    store.close()
    assert EpisodeStore(tmp_path).counted_rollouts() == []


def test_a_number_is_given_once_though_the_disk_fails_when_the_episode_bears_it_already(tmp_path, monkeypatch):
    store = EpisodeStore(tmp_path)
    writer = store.open(episode_pb2.EpisodeStart(episode_id="a", rollout_id="r/0"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(episode_store, "sync", lambda path: os.stat("/nowhere"))
        store.finish(writer, episode_pb2.EpisodeEnd())
    writer.discard()
    assert record(store, "b", rollout_id="r/1") == 2
    told = store.beyond(2)
    for _ in range(2):
        assert [(one.sequence, one.episode_id) for one in store.after(0)] == [(2, "b")] and not told.done()
        assert store.counted_rollouts() == ["r/1"]
        store.close()
        store = EpisodeStore(tmp_path)


def test_what_crashes_left_unfinished_counts_and_goes_first(tmp_path):
    for name in "ab":
        store = EpisodeStore(tmp_path)
        store.open(episode_pb2.EpisodeStart(episode_id=name)).executed([episode_pb2.Tick(reason="x" * 1000)])
        record(store, f"whole-{name}", bytes_=1000)
        store.close()
    os.utime(tmp_path / "set_aside" / "a.episode.partial", (0, 0))
    EpisodeStore(tmp_path).close()
    assert len(list((tmp_path / "set_aside").iterdir())) == 2
    EpisodeStore(tmp_path, keep_bytes=3500).close()
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["b.episode.partial"]
    EpisodeStore(tmp_path, keep_bytes=2500).close()
    assert list((tmp_path / "set_aside").iterdir()) == [] and len(names(tmp_path)) == 2


def test_a_reader_is_told_when_there_is_something_after_its_cursor(tmp_path):
    store = EpisodeStore(tmp_path)
    first, second, gone = store.beyond(0), store.beyond(1), store.beyond(0)
    gone.cancel()
    assert not first.done()
    record(store, "a")
    assert first.done() and not store.beyond(1).done()
    record(store, "b")
    assert second.done() and store.beyond(1).done()
    assert [stored.episode_id for stored in store.after(1)] == ["b"]


def test_an_episode_that_is_deleted_while_a_reader_is_about_to_read_it_is_not_damaged(tmp_path):
    store = EpisodeStore(tmp_path, keep_bytes=1)
    record(store, "a")
    (about_to_read,) = store.after(0)
    record(store, "b")
    assert list(store.records(about_to_read)) == [] and list((tmp_path / "set_aside").iterdir()) == []


def test_an_episode_that_somebody_deleted_by_hand_is_reported(tmp_path):
    store = EpisodeStore(tmp_path)
    record(store, "a")
    (stored,) = store.after(0)
    stored.path.unlink()
    with pytest.raises(DamagedEpisode, match=r"00000001-a.episode: cannot be read: No such file"):
        store.records(stored)


def test_a_fault_that_may_pass_sets_no_episode_aside(tmp_path, monkeypatch):
    store = EpisodeStore(tmp_path)
    record(store, "a")
    (stored,) = store.after(0)

    def too_many_files(path: Path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many"):
        patch.setattr(episode_store, "read_records", too_many_files)
        store.records(stored)
    assert len(list(store.records(stored))) == 2


@pytest.mark.parametrize("lost", ["00000001-a.episode", "b.episode"])
def test_an_unreadable_sector_stops_no_start_and_its_episode_is_set_aside_by_name(tmp_path, monkeypatch, caplog, lost):
    store = EpisodeStore(tmp_path)
    record(store, "a", rollout_id="r/0")
    store.open(episode_pb2.EpisodeStart(episode_id="b", rollout_id="r/1")).finish(episode_pb2.EpisodeEnd())
    store.close()

    def reading(read):
        def attempt(path: Path):
            if path.name == lost:
                raise OSError(errno.EIO, "Input/output error")
            return read(path)

        return attempt

    for name in ("read_start", "read_episode"):
        monkeypatch.setattr(episode_store, name, reading(getattr(episode_store, name)))
    store = EpisodeStore(tmp_path)
    assert f"{lost}: cannot be read: Input/output error" in caplog.text
    assert store.counted_rollouts() == ["r/1" if "a" in lost else "r/0"]
    assert [path.name.removesuffix(".partial") for path in (tmp_path / "set_aside").iterdir()] == [lost]


@pytest.mark.parametrize("change", [lambda store: record(store, "b"), lambda store: store.commit("r", 1)])
def test_who_looks_at_the_episodes_does_not_wait_for_the_disk(tmp_path, monkeypatch, change):
    store = EpisodeStore(tmp_path)
    record(store, "a")
    disk_is_busy, disk_is_free = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        disk_is_busy.set()
        assert disk_is_free.wait(20)

    def look() -> list:
        assert store.size[0] == store.newest == 1 and store.counted_rollouts() == [] and not store.beyond(1).done()
        return [store.find("a"), *store.latest(2)]

    monkeypatch.setattr(episode_store, "sync", slow)
    monkeypatch.setattr(cursors, "sync", slow)
    with ThreadPoolExecutor(2) as threads:
        changing = threads.submit(change, store)
        assert disk_is_busy.wait(10)
        try:
            assert threads.submit(look).result(10) == store.after(0) * 2
        finally:
            disk_is_free.set()
        changing.result(10)


@pytest.mark.parametrize("keep", [0, 12, 20])
def test_a_file_without_a_beginning_is_set_aside_at_once_and_its_number_is_not_given_again(tmp_path, keep):
    store = EpisodeStore(tmp_path)
    record(store, "a", rollout_id="r/0"), record(store, "b", rollout_id="r/1")
    store.close()
    path = tmp_path / "00000002-b.episode"
    path.write_bytes(path.read_bytes()[:keep])
    for _ in range(2):
        store = EpisodeStore(tmp_path)
        assert store.counted_rollouts() == ["r/0"] and names(tmp_path) == ["00000001-a.episode"]
        (damaged,) = store.after(1)
        assert "00000002-b.episode" in damaged.damaged
        store.close()
    assert record(EpisodeStore(tmp_path), "c") == 3


@pytest.mark.parametrize("text", ["", "[1]", '{"r": "x"}', '{"r": 1'])
def test_cursors_that_cannot_be_read_are_one_sentence(tmp_path, text):
    EpisodeStore(tmp_path).close()
    (tmp_path / "cursors.json").write_text(text)
    with pytest.raises(CannotStart, match=r"cursors.json must say how far each reader has read"):
        EpisodeStore(tmp_path)


def test_a_cursor_that_the_disk_does_not_take_is_not_acknowledged(tmp_path, monkeypatch):
    store = EpisodeStore(tmp_path, keep_bytes=1)
    record(store, "a")
    store.commit("r", 0)
    (tmp_path / "cursors.new").mkdir()
    with pytest.raises(Overloaded, match="the cursor could not be stored: Is a directory"):
        store.commit("r", 1)
    record(store, "b")
    assert len(names(tmp_path)) == 2


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
