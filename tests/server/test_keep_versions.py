"""How many published versions are kept, and which are kept whatever their number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import grpc
import pytest

from policy_server.config import ServeConfig
from policy_server.errors import UnknownVersion
from policy_server.version_store import Kind, VersionStore
from policy_server.versions import RECENT
from protos import admin_pb2, rollout_pb2
from tests.server import messages
from tests.server.fake_admin import FakeWeights, administered
from tests.server.publishing import listed, publication
from tests.server.running import eventually

FIRST = FakeWeights().fingerprint(FakeWeights.first)


def store(folder: Path, keep: int | None) -> VersionStore:
    return VersionStore(folder, first=FIRST, keep=keep)


def commit(versions: VersionStore, *, parent: int = 0) -> int:
    incoming = versions.receive("full", 4)
    incoming.write(b"good")
    incoming.close()
    return versions.commit(incoming, parent=parent, note="", device_fingerprint="f").version


def numbers(versions: VersionStore) -> list[int]:
    return [version.version for version in versions.versions]


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "sessions")


def test_the_newest_are_kept_and_with_them_the_first_the_live_its_parent_and_what_is_needed(tmp_path):
    versions = store(tmp_path, keep=2)
    for _ in range(3):
        commit(versions)
    commit(versions, parent=2)
    versions.set_live(4)
    for _ in range(6):
        commit(versions)
    versions.trim({6})
    assert numbers(versions) == [0, 2, 4, 6, 9, 10]
    assert folders(tmp_path) == ["00000002", "00000004", "00000006", "00000009", "00000010"]


def test_what_is_deleted_stays_so_after_a_restart_and_its_number_is_not_given_again(tmp_path):
    versions = store(tmp_path, keep=1)
    for _ in range(3):
        commit(versions)
    versions.trim(())
    versions.close()
    again = store(tmp_path, keep=1)
    assert numbers(again) == [0, 3] and commit(again) == 4


def test_a_version_that_a_kill_left_half_deleted_is_gone(tmp_path):
    versions = store(tmp_path, keep=None)
    commit(versions), commit(versions)
    versions.close()
    (tmp_path / "00000001").rename(tmp_path / "deleted-00000001")
    (tmp_path / "deleted-00000001" / "version.json").unlink()
    again = store(tmp_path, keep=None)
    assert numbers(again) == [0, 2] and folders(tmp_path) == ["00000002"]


def test_without_a_number_all_are_kept(tmp_path):
    versions = store(tmp_path, keep=None)
    for _ in range(40):
        commit(versions)
    versions.trim(())
    assert numbers(versions) == list(range(41))


def test_a_version_that_was_deleted_cannot_be_made_live(tmp_path):
    versions = store(tmp_path, keep=1)
    commit(versions), commit(versions)
    versions.trim(())
    with pytest.raises(UnknownVersion, match="no version 1"):
        versions.set_live(1)
    assert versions.live == 0


def test_a_server_keeps_what_is_in_use_and_no_more_than_it_was_told(tmp_path):
    model = FakeWeights()
    with administered(model, episodes=tmp_path / "episodes", versions=store(tmp_path / "versions", 3)) as (
        server,
        admin,
    ):
        for number in range(1, 4):
            publish(admin, number)
        server.policy.StartEpisode(messages.start(version=1))
        work = messages.rollout("r/0", version=2)
        server.rollouts.EnqueueRollouts(rollout_pb2.EnqueueRolloutsRequest(rollouts=[work]))
        admin.SetLive(admin_pb2.SetLiveRequest(version=3), timeout=20)
        for number in range(4, 30):
            publish(admin, number)
        kept = [info.version for info in listed(admin).versions]
        assert kept == [0, 1, 2, 3, 27, 28, 29] and RECENT < 3
        with pytest.raises(grpc.RpcError, match="there is no version 4") as error:
            server.policy.StartEpisode(messages.start(version=4))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert folders(tmp_path / "versions") == [f"{number:08d}" for number in kept[1:]]


class CountingWeights(FakeWeights):
    """Remembers what it has built."""

    def __init__(self) -> None:
        super().__init__()
        self.built: Counter[bytes] = Counter()

    def build(self, folder: Path, kind: Kind) -> bytes:
        weights = super().build(folder, kind)
        self.built[weights] += 1
        return weights


def test_a_decision_that_follows_live_and_waits_keeps_its_version_however_many_swaps_come_before_its_pass():
    with administered(CountingWeights(), max_batch=1, max_wait_ms=0) as (server, admin):
        model = server.model
        publish(admin, 1, set_live=True)
        blocker, follower = (
            server.policy.StartEpisode(messages.start(version=0, follow_live=False)).episode_id,
            server.policy.StartEpisode(messages.start(follow_live=True)).episode_id,
        )
        model.gate.clear()
        in_model = server.policy.Act.future(messages.act(blocker, 0))
        eventually(lambda: model.batches)
        waiting = server.policy.Act.future(messages.act(follower, 0))
        eventually(lambda: server.server.waiting == 1)
        for number in range(2, 2 + 3 * RECENT):
            publish(admin, number, set_live=True)
        model.gate.set()
        assert in_model.result(10).chunk.version == 0 and waiting.result(10).chunk.version == 1
        assert model.built[b"weights 1"] == 1


def publish(admin, number: int, **header) -> None:
    admin.PublishWeights(publication("f" * 64, f"weights {number}".encode(), parent=0, **header), timeout=20)


def test_a_number_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keep_versions must be at least 1, got 0"):
        ServeConfig(keep_versions=0)
