"""What Rerun shows of an episode is what happened in it; and a viewer never has a say in what the arm does."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from protos import episode_pb2
from protos.channel import free_port
from protos.codec import encode_tensor
from protos.image import decode_jpeg, encode_jpeg
from robot_client import view
from robot_client.answer import Answer
from robot_client.arm import ArmState, Observation
from robot_client.arms.kinematic import KinematicArm
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.observer import Observer
from robot_client.pilot import Wish
from robot_client.rollout import EpisodeResult
from robot_client.view import CannotView, View
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm
from tests.client.scripted_policy import Running, ScriptedPolicy, action_of_tokens, tokens_of
from tests.server.running import eventually

chunk = pytest.importorskip("rerun.chunk", reason="needs the extra `view`: pip install 'vla-rl[view]'")

STALL_S = 3.0
"""A busy machine may stall for so long; who waits for a viewer that does not read waits for good."""
DRIVEN = np.array([0, 0.1, 0, 0, 0, 0, 1], np.float32)


@dataclass
class Witness(Observer):
    """Keeps all that an episode tells."""

    seen: list[Observation] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    states: list[ArmState] = field(default_factory=list)
    ticks: list[episode_pb2.Tick] = field(default_factory=list)
    told_ns: list[int] = field(default_factory=list)
    asked_at: list[int] = field(default_factory=list)
    answered_at: list[int] = field(default_factory=list)

    def on_observation(self, observation):
        self.seen.append(observation)
        self.asked_at.append(len(self.ticks))

    def on_answer(self, answer):
        self.answers.append(answer)
        self.answered_at.append(len(self.ticks))

    def on_tick(self, state, tick):
        self.states.append(state)
        self.ticks.append(tick)
        self.told_ns.append(time.time_ns())

    def on_final_observation(self, observation):
        self.on_observation(observation)


class EveryActionAnother(ScriptedPolicy):
    """The actions of a chunk differ, as those of a real policy do."""

    def _chunk(self, decision: int) -> episode_pb2.Chunk:
        rows = [tokens_of(np.array([1, 0.2 * k, 0, 0, 0, 0.1, decision % 2])) for k in range(self.spec.chunk_length)]
        actions_KA = np.stack([action_of_tokens(ids_A) for ids_A in rows]).astype(np.float32)
        ids_N = np.concatenate(rows).astype(np.int32)
        return episode_pb2.Chunk(
            actions=encode_tensor(actions_KA),
            token_ids=encode_tensor(ids_N),
            token_logprobs=encode_tensor(np.full(len(ids_N), -0.5, np.float32)),
            version=1,
        )


class Takeover:
    """A person who drives at some of the ticks."""

    def __init__(self, arm: KinematicArm):
        self._arm = arm

    def wish(self) -> Wish:
        return Wish(action_A=DRIVEN if 9 <= self._arm.state().tick < 12 else None)


@dataclass(frozen=True)
class Shown:
    """An episode and what Rerun reads of it."""

    witness: Witness
    result: EpisodeResult
    recording: Recording


class Recording:
    """The file of one, read with Rerun's own reader."""

    def __init__(self, path: Path):
        self._reader = chunk.RrdReader(path)
        self._batches = [(each.entity_path, each.to_record_batch()) for each in self._reader.stream()]

    @property
    def name(self) -> str:
        (entry,) = self._reader.recordings()
        return f"{entry.application_id}/{entry.recording_id}"

    @property
    def has_layout(self) -> bool:
        return len(self._reader.blueprints()) == 1

    def rows(self, entity: str, component: str) -> list[tuple[int, list]]:
        """(tick, values), in the order of ticks."""
        found = []
        for batch in self._of(entity, component):
            if "tick" in batch.schema.names:
                found += zip(batch["tick"].to_pylist(), batch[component].to_pylist(), strict=True)
        return sorted(found, key=lambda row: row[0])

    def at_each_tick(self, entity: str, component: str) -> np.ndarray:
        """(T, N), of what was told at each tick from the first one."""
        rows = self.rows(entity, component)
        assert [tick for tick, _ in rows] == list(range(len(rows)))
        return np.array([values for _, values in rows])

    def static(self, entity: str, component: str) -> list:
        """The last one."""
        return [values for batch in self._of(entity, component) for values in batch[component].to_pylist()][-1]

    def times_ns(self, entity: str, component: str) -> dict[int, int]:
        """Tick -> time.time_ns()."""
        ticks_and_times = [(batch["tick"], batch["time"].cast("int64")) for batch in self._of(entity, component)]
        return {
            tick: time_ns
            for ticks, times_ns in ticks_and_times
            for tick, time_ns in zip(ticks.to_pylist(), times_ns.to_pylist(), strict=True)
        }

    def _of(self, entity: str, component: str) -> list:
        return [batch for path, batch in self._batches if path == entity and component in batch.schema.names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def episodes(folder) -> Iterator[dict[str, Shown]]:
    """Three of one run: with holds, clips and a takeover; with blended chunks; with an arm that fails."""
    server, arm = Running(EveryActionAnother()), KinematicArm(size=64, lockstep=True)
    told: dict[str, tuple[Witness, EpisodeResult]] = {}
    with PolicyClient(server.address) as client:
        viewer = View(str(folder), client.spec(), arm.spec)
        for name, moving, config, pilot in (
            ("mixed", arm, EpisodeConfig(ahead_ticks=2, latency_ticks=3), Takeover(arm)),
            ("blended", arm, EpisodeConfig(ahead_ticks=3, overlap="blend"), None),
            ("failing", FakeArm(fail_at=6), EpisodeConfig(), None),
        ):
            witness = Witness()
            [result] = run(
                moving, [rollout_of(20)], client, config, observers=lambda _, seen=witness: [seen, viewer], pilot=pilot
            )
            told[name] = witness, result
        viewer.close()
    server.stop()
    yield {
        name: Shown(witness, result, Recording(folder / f"{result.episode_id}.rrd"))
        for name, (witness, result) in told.items()
    }


@pytest.fixture(params=["mixed", "blended", "failing"])
def shown(episodes, request) -> Shown:
    return episodes[request.param]


def test_each_episode_is_a_recording_of_its_own_in_a_file_of_its_own(episodes, folder):
    assert sorted(path.name for path in folder.iterdir()) == [f"episode-{n}.rrd" for n in range(3)]
    names = [shown.recording.name for shown in episodes.values()]
    assert names == [f"vla-rl kinematic/episode-{n}" for n in range(3)]
    assert all(shown.recording.has_layout for shown in episodes.values())


def test_the_episodes_are_what_the_laws_below_need(episodes):
    sources = [{episode_pb2.Source.Name(tick.source) for tick in shown.witness.ticks} for shown in episodes.values()]
    assert sources[0] == {"SOURCE_POLICY", "SOURCE_HOLD", "SOURCE_HUMAN"}
    assert "SOURCE_BLEND" in sources[1]
    assert episodes["mixed"].result.clips > 0


def test_every_tick_has_the_action_that_was_executed_and_the_state_before_it(shown):
    ticks, states = shown.witness.ticks, shown.witness.states
    assert len(ticks) == shown.result.ticks > 0
    executed_TA = shown.recording.at_each_tick("/action/executed", "Scalars:scalars")
    np.testing.assert_array_equal(executed_TA, [tick.action for tick in ticks])
    state_TS = shown.recording.at_each_tick("/state", "Scalars:scalars")
    np.testing.assert_array_equal(state_TS, [state.state_S for state in states])


def test_the_series_bear_the_names_of_the_arms_actions_and_state_entries(shown):
    spec = KinematicArm().spec
    assert shown.recording.static("/action/executed", "SeriesLines:names") == list(spec.action_names)
    assert shown.recording.static("/state", "SeriesLines:names") == list(spec.state_names)


def test_every_tick_has_its_source(shown):
    changes = dict(shown.recording.rows("/source", "StateChange:state"))
    source, sources = "", []
    for tick in range(shown.result.ticks):
        [source] = changes.get(tick, [source])
        sources.append(f"SOURCE_{source.upper()}")
    assert sources == [episode_pb2.Source.Name(tick.source) for tick in shown.witness.ticks]


def test_every_clip_and_every_hold_is_logged_with_its_reason(shown):
    said = shown.recording.rows("/log", "TextLog:text")
    reasons = [(tick, text) for tick, [text] in said if text.startswith(("hold: ", "clip: "))]
    assert reasons == [
        (n, f"{'hold' if tick.source == episode_pb2.SOURCE_HOLD else 'clip'}: {tick.reason}")
        for n, tick in enumerate(shown.witness.ticks)
        if tick.reason or tick.source == episode_pb2.SOURCE_HOLD
    ]
    assert len(reasons) == shown.result.holds + shown.result.clips


def test_beside_what_was_executed_stands_what_the_policy_had_planned(shown):
    planned_TA = shown.recording.at_each_tick("/action/planned", "Scalars:scalars")
    chunks = {answer.decision: answer.actions_KA for answer in shown.witness.answers}
    for planned_A, tick in zip(planned_TA, shown.witness.ticks, strict=True):
        if tick.source in (episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_BLEND):
            np.testing.assert_array_equal(planned_A, chunks[tick.decision][tick.index])
        else:
            assert np.isnan(planned_A).all()


def test_the_images_are_the_jpeg_of_what_the_policy_saw_at_each_decision_and_at_the_end(shown):
    rows = shown.recording.rows("/camera/agentview", "EncodedImage:blob")
    assert [tick for tick, _ in rows] == shown.witness.asked_at
    for (_, [blob]), observation in zip(rows, shown.witness.seen, strict=True):
        pixels = observation.images["agentview"]
        assert bytes(blob) == encode_jpeg(pixels)
        assert psnr_db(decode_jpeg(bytes(blob)), pixels) > 30
    assert not shown.recording.rows("/camera/wrist", "EncodedImage:blob")  # which the policy does not read


def test_each_answer_has_its_latency_and_the_version_that_gave_it(shown):
    rows = shown.recording.rows("/latency_ms", "Scalars:scalars")
    assert [tick for tick, _ in rows] == shown.witness.answered_at
    waited_ms = [1e3 * answer.arrived_s - answer.capture_time_ns / 1e6 for answer in shown.witness.answers]
    np.testing.assert_allclose([row[0] for _, row in rows], waited_ms)
    assert all(row[0] > 0 for _, row in rows)
    assert [state for _, state in shown.recording.rows("/version", "StateChange:state")] == [["1"]]


def test_the_path_joins_the_positions_of_the_end_effector_inside_the_box(episodes):
    shown, box = episodes["mixed"], KinematicArm().spec.limits.workspace
    positions_m = np.array([state.state_S[:3] for state in shown.witness.states])
    strips = [strip for _, [strip] in shown.recording.rows("/arm/path", "LineStrips3D:strips")]
    np.testing.assert_array_equal(strips, np.stack([positions_m[:-1], positions_m[1:]], axis=1))
    assert box is not None
    [centre_m] = shown.recording.static("/arm/workspace", "Boxes3D:centers")
    [half_m] = shown.recording.static("/arm/workspace", "Boxes3D:half_sizes")
    np.testing.assert_allclose([np.subtract(centre_m, half_m), np.add(centre_m, half_m)], [box.low_m, box.high_m])


def test_it_says_what_was_asked_for_and_how_it_ended(episodes):
    said = [text for _, [text] in episodes["mixed"].recording.rows("/log", "TextLog:text")]
    assert (said[0], said[-1]) == ("pick up the bowl", "failure")
    assert episodes["mixed"].recording.static("/__properties", "RecordingInfo:name") == ["task episode-0: failure"]
    said = [text for _, [text] in episodes["failing"].recording.rows("/log", "TextLog:text")]
    assert said[-1] == "error: ArmError: motor stalled at tick 6"


def test_the_wall_clock_is_a_timeline_too(shown):
    times_ns = shown.recording.times_ns("/action/planned", "Scalars:scalars")
    told_ns = shown.witness.told_ns
    for tick, (earliest_ns, latest_ns) in enumerate(itertools.pairwise(told_ns)):
        assert earliest_ns <= times_ns[tick] <= latest_ns


@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_a_viewer_that_listens_elsewhere_is_shown_the_same(server, policy, tmp_path):
    port, saved = free_port(), tmp_path / "elsewhere.rrd"
    command = ["--serve-grpc", "--bind", "127.0.0.1", "--port", str(port), "--save", str(saved)]
    elsewhere = subprocess.Popen([sys.executable, "-m", "rerun_cli", *command], start_new_session=True)
    eventually(lambda: connects(port), within_s=60)
    with PolicyClient(server.address) as client:
        drive(client, View(f"rerun+http://127.0.0.1:{port}/proxy", client.spec(), KinematicArm().spec))
    os.killpg(elsewhere.pid, signal.SIGINT)
    elsewhere.wait(60)
    executed_TA = Recording(saved).at_each_tick("/action/executed", "Scalars:scalars")
    np.testing.assert_array_equal(executed_TA, [tick.action for tick in policy.only_episode.ticks])


def test_a_viewer_that_is_not_there_neither_ends_nor_delays_the_episode(server, caplog, short_patience):
    with PolicyClient(server.address) as client:
        viewer = Timed(f"rerun+http://127.0.0.1:{free_port()}/proxy", client.spec(), KinematicArm().spec)
        assert drive(client, viewer, ticks=400) == 400
    assert viewer.longest_call_s < STALL_S
    assert "the viewer does not keep up" in caplog.text and "the end is not shown" in caplog.text


def test_a_viewer_that_dies_neither_ends_nor_delays_the_episode(server, tmp_path, caplog, short_patience):
    with PolicyClient(server.address) as client:
        viewer = Timed(str(tmp_path), client.spec(), KinematicArm().spec)
        os.kill(process_of_view().pid, signal.SIGKILL)
        assert drive(client, viewer, ticks=400) == 400
    assert viewer.longest_call_s < STALL_S
    assert "the viewer's process is gone" in caplog.text


def test_a_viewer_that_stalls_loses_the_rest_of_that_episode_and_shows_the_next_one_whole(
    server, tmp_path, caplog, short_patience
):
    with PolicyClient(server.address) as client:
        viewer = Timed(str(tmp_path), client.spec(), KinematicArm().spec)
        os.kill(process_of_view().pid, signal.SIGSTOP)
        assert drive(client, viewer, ticks=400, close=False) == 400
        os.kill(process_of_view().pid, signal.SIGCONT)
        assert viewer.longest_call_s < STALL_S
        assert caplog.text.count("the viewer does not keep up") == 1
        eventually(viewer._waiting.empty, within_s=60)
        assert drive(client, viewer, ticks=8) == 8
    lost, whole = (Recording(tmp_path / f"episode-{n}.rrd") for n in range(2))
    assert 0 < len(lost.at_each_tick("/action/executed", "Scalars:scalars")) < 400
    assert len(whole.at_each_tick("/action/executed", "Scalars:scalars")) == 8


def test_an_episode_that_the_server_never_opened_leaves_no_file(server, tmp_path):
    arm = FakeArm(fail_reset=True)
    with PolicyClient(server.address) as client:
        viewer = View(str(tmp_path), client.spec(), arm.spec)
        [result] = run(arm, [rollout_of()], client, observers=lambda _: [viewer])
        viewer.close()
    assert result.outcome == "error" and not list(tmp_path.iterdir())


def test_what_cannot_be_viewed_is_refused_before_anything_moves(server, tmp_path, monkeypatch):
    (in_the_way := tmp_path / "file").touch()
    with PolicyClient(server.address) as client:
        for target, why in ((str(in_the_way), "File exists"), ("http://localhost:9876", "missing scheme")):
            with pytest.raises(CannotView, match=why):
                View(target, client.spec(), KinematicArm().spec)
        (tmp_path / "rerun.py").write_text("raise ImportError('No module named rerun')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(CannotView, match=r"No module named rerun; .* 'vla-rl\[view\]'"):
            View(str(tmp_path), client.spec(), KinematicArm().spec)


class Timed(View):
    """Measures how long it keeps the thread that drives the arm."""

    longest_call_s = 0.0

    def _show(self, name, *arguments):
        began_s = time.monotonic()
        super()._show(name, *arguments)
        self.longest_call_s = max(self.longest_call_s, time.monotonic() - began_s)


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(view, "WAITING", 20)
    monkeypatch.setattr(view, "LINGER_S", 2.0)


def drive(client: PolicyClient, viewer: View, *, ticks: int = 12, close: bool = True) -> int:
    """Ticks of one episode that is viewed."""
    arm = KinematicArm(size=128, lockstep=True)
    [result] = run(arm, [rollout_of(ticks)], client, observers=lambda _: [viewer])
    if close:
        viewer.close()
        assert process_of_view() is None
    assert arm.state().tick == result.ticks  # each of them moved it
    return result.ticks


def process_of_view():
    return next((process for process in multiprocessing.active_children() if process.name == "view"), None)


def psnr_db(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((got.astype(float) - expected) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def connects(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0
