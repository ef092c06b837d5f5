"""Numbered weights without a model: what is kept on disk, what is held, and what a failure leaves behind."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from policy_server.errors import BadRequest, CannotStart, InternalFault, Overloaded, UnknownVersion
from policy_server.version_store import WEIGHTS, Kind, Version, VersionStore
from policy_server.versions import MOST_MODELS, RECENT, Versions

FIRST = "f" * 64
SLOTS = 3


class Builder:
    """A version's weights are the text of its file; every build is counted."""

    def __init__(self) -> None:
        self.built: Counter[str] = Counter()

    def __call__(self, folder: Path, kind: Kind) -> tuple[str, str]:
        weights = (folder / WEIGHTS[kind]).read_text()
        if weights == "bad":
            raise BadRequest("tensor x must be finite", field="data")
        self.built[weights] += 1
        return weights, f"hash of {weights}"


class Server:
    """What a policy server does with versions, on one folder."""

    def __init__(self, folder: Path | None):
        self.build, self.pinned = Builder(), set[int]()
        self.store = VersionStore(folder, first=FIRST)
        self.versions = Versions(
            "the base", store=self.store, build=self.build, pinned=lambda: self.pinned, adapter_slots=SLOTS
        )

    def publish(self, weights: str, *, parent: int = 0, set_live: bool = False, kind: Kind = "full") -> Version:
        incoming = self.store.receive(kind, len(weights))
        try:
            incoming.write(weights.encode())
            incoming.close()
            return self.versions.publish(incoming, parent=parent, note=f"note of {weights}", set_live=set_live)
        finally:
            incoming.discard()

    def restarted(self) -> Server:
        self.store.close()
        return Server(self.store.path(0).parent)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_a_server_begins_with_version_0_live(server):
    assert server.versions.live == 0 and server.versions.known == [0] and server.versions.weights(0) == "the base"
    assert server.store.versions == [
        Version(version=0, parent=0, kind="first", note="", published_unix_ns=0, device_fingerprint=FIRST)
    ]


def test_versions_are_numbered_in_order_and_go_live_when_told(server):
    one = server.publish("one")
    assert (one.version, server.versions.live) == (1, 0)
    two = server.publish("two", parent=1, set_live=True)
    assert (two.version, two.parent, two.kind, two.note) == (2, 1, "full", "note of two")
    assert two.device_fingerprint == "hash of two" and two.published_unix_ns > one.published_unix_ns
    assert server.versions.live == 2 and server.versions.known == [0, 1, 2]
    assert [server.versions.weights(version) for version in range(3)] == ["the base", "one", "two"]


def test_live_goes_back_and_forward_and_each_move_tells_the_one_before(server):
    server.publish("one", set_live=True)
    assert server.versions.set_live(0) == 1
    assert server.versions.set_live(1) == 0
    assert server.versions.live == 1


def test_an_unknown_version_is_refused_with_those_there_are(server):
    server.publish("one")
    for refused in (lambda: server.versions.weights(7), lambda: server.versions.set_live(7)):
        with pytest.raises(UnknownVersion, match=r"there is no version 7; there are \[0, 1\]"):
            refused()
    with pytest.raises(UnknownVersion) as error:
        server.versions.check(7, field="header.parent")
    assert error.value.field == "header.parent"
    assert server.versions.live == 0


def test_a_restart_brings_back_every_version_and_the_live_one(server):
    published = [server.publish(name, set_live=name == "two") for name in ("one", "two", "three")]
    again = server.restarted()
    assert again.store.versions[1:] == published and again.versions.live == 2
    again.versions.open()
    assert again.build.built == {"two": 1}
    assert again.versions.weights(3) == "three"
    assert again.publish("four").version == 4


def test_a_number_is_never_given_again_whatever_becomes_of_the_folder(server):
    server.publish("one")
    server.publish("two")
    shutil.rmtree(server.store.path(2))
    again = server.restarted()
    assert again.versions.known == [0, 1]
    assert again.publish("three").version == 3


@pytest.mark.parametrize("step", ["write", "replace", "fsync"])
def test_a_publish_that_the_disk_refuses_leaves_the_old_one_serving(server, monkeypatch, step):
    server.publish("one", set_live=True)

    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"write": (Path, "write_text"), "replace": (os, "replace"), "fsync": (os, "fsync")}[step], refuse
        )
        with pytest.raises(OSError, match="No space"):
            server.publish("two", set_live=True)
    for now in (server, server.restarted()):
        assert now.versions.known == [0, 1] and now.versions.live == 1
    assert not list(server.store.path(0).parent.glob("incoming-*"))


def test_weights_that_cannot_be_built_leave_nothing_behind(server):
    server.publish("one", set_live=True)
    with pytest.raises(BadRequest, match="tensor x must be finite"):
        server.publish("bad", set_live=True)
    assert server.versions.known == [0, 1] and server.versions.live == 1
    assert sorted(path.name for path in server.store.path(0).parent.iterdir()) == ["00000001", "state.json"]
    assert server.publish("two").version == 2


def test_what_was_being_received_when_the_server_was_killed_is_dropped(server):
    server.publish("one")
    incoming = server.store.receive("full", 3)
    incoming.write(b"tw")
    again = server.restarted()
    assert again.versions.known == [0, 1]
    assert sorted(path.name for path in again.store.path(0).parent.iterdir()) == ["00000001", "state.json"]


def test_only_the_first_the_live_the_pinned_and_a_few_recent_ones_are_held(server):
    server.publish("one")
    server.pinned = {1}
    server.publish("two", set_live=True)
    for name in "abcd":
        server.publish(name)
    assert RECENT == 2
    assert [version for version in server.versions.known if server.versions.holds(version)] == [0, 1, 2, 5, 6]
    server.pinned = set()
    server.versions.set_live(6)
    assert [version for version in server.versions.known if server.versions.holds(version)] == [0, 2, 5, 6]


def test_adapters_have_slots_of_their_own_and_the_least_recently_used_leaves_first(server):
    server.publish("whole")
    for name in "abc":
        server.publish(name, kind="lora")
    server.versions.weights(2)
    server.publish("d", kind="lora")
    assert [version for version in server.versions.known if server.versions.holds(version)] == [0, 1, 2, 4, 5]


def test_a_version_that_is_not_held_is_built_again_when_it_is_asked_for(server):
    for name in "abcd":
        server.publish(name)
    assert not server.versions.holds(1)
    assert server.versions.weights(1) == "a" and server.build.built["a"] == 2
    assert server.versions.weights(1) == "a" and server.build.built["a"] == 2
    assert not server.versions.holds(3) and server.versions.holds(4)  # the longest unused made room


def test_a_version_that_changed_on_disk_is_not_served(server):
    for name in "abcd":
        server.publish(name)
    for damage, why in ((b"another", "its fingerprint differs"), (b"bad", "tensor x must be finite")):
        (server.store.path(1) / "model.safetensors").write_bytes(damage)
        with pytest.raises(InternalFault, match=why):
            server.versions.weights(1)
    server.versions.set_live(2)
    (server.store.path(2) / "model.safetensors").write_text("bad")
    with pytest.raises(CannotStart, match="the live version cannot be served"):
        server.restarted().versions.open()


def test_a_folder_is_of_one_model_and_one_server(server, tmp_path):
    with pytest.raises(CannotStart, match="in use by another server"):
        VersionStore(tmp_path, first=FIRST)
    server.publish("one")
    server.store.close()
    with pytest.raises(CannotStart, match="another version 0"):
        VersionStore(tmp_path, first="e" * 64)


def test_a_damaged_record_stops_the_start_by_name(server, tmp_path):
    server.publish("one")
    server.store.close()
    (tmp_path / "00000001" / "version.json").write_text('{"version": 1}')
    with pytest.raises(CannotStart, match=r"version 00000001 has no readable version\.json"):
        VersionStore(tmp_path, first=FIRST)


def test_weights_for_which_the_disk_has_no_room_are_refused_before_they_are_sent(tmp_path):
    store = VersionStore(tmp_path, first=FIRST)
    with pytest.raises(Overloaded, match="the version store is full") as error:
        store.receive("full", 2**60)
    assert error.value.retry_after_ms > 0 and not list(tmp_path.iterdir())


def test_what_is_still_to_come_of_other_uploads_is_no_room(tmp_path, monkeypatch):
    store = VersionStore(tmp_path, first=FIRST, reserve_bytes=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    first = store.receive("full", 60)
    with pytest.raises(Overloaded, match="the version store is full"):
        store.receive("full", 60)
    first.write(b"x" * 50)
    store.receive("full", 60).discard()  # the other 50 are on the disk, which says so itself
    with pytest.raises(Overloaded):
        store.receive("full", 81)
    first.discard()
    store.receive("full", 90).discard()


def test_more_whole_models_than_may_be_in_use_have_to_wait(server):
    for number in range(MOST_MODELS + 2):
        server.publish(str(number))
    server.publish("an adapter", kind="lora")
    server.pinned = set(range(1, MOST_MODELS + 1))
    for version in server.pinned:
        server.versions.weights(version)
    server.pinned = {*server.pinned, MOST_MODELS + 1, MOST_MODELS + 3}
    server.versions._held.pop(MOST_MODELS + 1)
    with pytest.raises(Overloaded, match=f"{MOST_MODELS} whole models are in use") as refused:
        server.versions.weights(MOST_MODELS + 1)
    assert refused.value.retry_after_ms > 0
    server.versions.weights(MOST_MODELS + 3)  # an adapter takes little
    server.pinned = set(range(2, MOST_MODELS + 2))
    server.versions.weights(MOST_MODELS + 1)


def test_without_a_folder_versions_last_as_long_as_the_server():
    server = Server(None)
    server.publish("one", set_live=True)
    folder = server.store.path(1)
    assert folder.is_dir()
    server.store.close()
    assert not folder.parent.exists()


def test_what_is_held_is_given_together_without_building_and_never_asleep(server):
    for name in "abcd":
        server.publish(name)
    builds = server.build.built.total()
    assert server.versions.held({0, 4}) is not None and server.versions.held({0, 1}) is None
    server.versions.sleep(lambda: None)
    assert server.versions.held({0, 4}) is None
    server.versions.wake(lambda: None)
    assert sorted(server.versions.held({0, 4})) == ["d", "the base"] and server.build.built.total() == builds
