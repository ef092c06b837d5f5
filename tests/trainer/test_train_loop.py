"""What a run asks of its server and says of itself: the real loop, a tiny policy, a worker without a simulator."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file

from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos import admin_pb2, admin_pb2_grpc, episode_pb2, policy_pb2, rollout_pb2
from protos.episode_file import Episode, read_episode
from rl_trainer.learner import Learner
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.optimizer import Optimizer
from rl_trainer.publisher import Publisher
from rl_trainer.report import Reporter
from rl_trainer.train import Run, train
from rl_trainer.train_config import TrainConfig
from rl_trainer.train_state import TrainState
from tests.server.running import RunningServer, serving
from tests.trainer.fake_worker import DECISIONS, TICKS, Succeeds, by_seed, working

ROLLOUTS, HELD_OUT = 3, 2


@contextmanager
def practice(
    model: Path, folder: Path, unnorm_key: str | None = None, succeeds: Succeeds = by_seed
) -> Iterator[RunningServer]:
    policy = VlaModel(Policy.load(model, unnorm_key=unnorm_key), name="tiny", max_batch=8)
    store = VersionStore(None, first=policy.fingerprint(policy.first))
    with (
        serving(policy, max_batch=8, queue=64, versions=store, admin_port=0, episodes=folder) as server,
        working(server, succeeds),
    ):
        yield server


def config_of(folder: Path, model: Path, server: str, admin: str, **changes) -> TrainConfig:
    settings = {
        "suite": "robosuite",
        "tasks": (0,),
        "model": str(model),
        "iterations": 2,
        "rollouts": ROLLOUTS,
        "evaluate_every": 1,
        "evaluate_states": HELD_OUT,
        "learner": LearnerConfig(warm_up=0, learning_rate=1e-3, minibatch=4, target_kl=0.0),
    }
    return TrainConfig(out=folder / "run", server=server, admin=admin, **settings | changes)


def run(folder: Path, model: Path, **changes) -> tuple[list[dict], dict[str, list[Episode]]]:
    """The rows of the curve, and the episodes by the name that their rollouts have in the run."""
    with practice(model, folder / "episodes", changes.get("unnorm_key")) as server:
        train(config_of(folder, model, server.address, server.admin_address, **changes))
    rows = [json.loads(line) for line in (folder / "run" / "curve.jsonl").read_text().splitlines()]
    return rows, episodes_of(folder / "episodes")


def episodes_of(folder: Path) -> dict[str, list[Episode]]:
    """By the name that their rollouts have in the run."""
    found: dict[str, list[Episode]] = {}
    for path in sorted(folder.glob("*.episode")):
        episode = read_episode(path)
        found.setdefault(episode.start.rollout_id.split("/")[1], []).append(episode)
    return found


def versions(episodes: list[Episode]) -> set[int]:
    return {decision.chunk.version for episode in episodes for decision in episode.decisions}


def states(*episodes: list[Episode]) -> set[str]:
    return {episode.start.initial_state for some in episodes for episode in some}


def test_of_several_statistics_the_named_ones_are_trained_with(tiny_vla: Path, tmp_path: Path) -> None:
    """As behind OpenVLA's own checkpoint, and whatever `sft` makes of it."""
    both = shutil.copytree(tiny_vla, tmp_path / "both")
    config = json.loads((both / "config.json").read_text())
    config["norm_stats"]["other"] = config["norm_stats"]["tiny"]
    (both / "config.json").write_text(json.dumps(config))
    rows, found = run(tmp_path, both, iterations=1, evaluate_every=0, unnorm_key="other")
    assert {episode.start.unnorm_key for episode in found["0"]} == {"other"}
    assert rows[0]["optimiser_steps"] > 0
    with pytest.raises(ValueError, match="name one of"):
        run(tmp_path / "unnamed", both, iterations=1)


def test_a_run_practises_with_what_it_published_and_measures_greedily_on_other_states(
    tiny_vla: Path, tmp_path: Path
) -> None:
    """Defects 1, 9, 10 and 12, seen from outside."""
    rows, found = run(tmp_path, tiny_vla, temperature=1.0, noise_correlation=0.5)
    practised, measured = [found["0"], found["1"]], [found[f"evaluate-{number}"] for number in range(3)]
    assert [versions(some) for some in practised] == [{0}, {1}], "each with the weights of the update before"
    assert [versions(some) for some in measured] == [{0}, {1}, {2}]
    for some, purpose, temperature, correlation in [
        *((some, episode_pb2.PURPOSE_TRAIN, 1.0, 0.5) for some in practised),
        *((some, episode_pb2.PURPOSE_EVALUATE, 0.0, 0.0) for some in measured),
    ]:
        for episode in some:
            assert (episode.start.purpose, episode.start.noise_correlation) == (purpose, correlation)
            assert {decision.chunk.temperature for decision in episode.decisions} == {temperature}
    assert all(len(states(some)) == HELD_OUT for some in measured)
    assert not states(*practised) & states(*measured)

    iterations = [row for row in rows if "success/train" in row]
    assert all(row["logprob_gap"] < 1e-4 for row in iterations), "the server has the learner's weights"
    for number, row in enumerate(iterations, 1):
        assert row["episodes"] == number * ROLLOUTS, "practice only: evaluation counts nowhere"
        assert row["decisions"] == row["episodes"] * DECISIONS
        assert row["environment_steps"] == row["episodes"] * TICKS
        assert row["optimiser_steps"] == number * 4, "2 epochs of 6 decisions in parts of about 4"
    times = [row["wall_clock_s"] for row in iterations]
    assert 0 < times[0] < times[1]


def test_what_is_evaluated_served_unasked_and_saved_is_the_average_of_what_is_practised_with(
    tiny_vla: Path, tmp_path: Path
) -> None:
    learning = LearnerConfig(warm_up=0, learning_rate=1e-2, minibatch=4, target_kl=0.0, average=0.9)
    with practice(tiny_vla, tmp_path / "episodes") as server:
        train(config_of(tmp_path, tiny_vla, server.address, server.admin_address, learner=learning))
        live = server.policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=60).live_version
    found = episodes_of(tmp_path / "episodes")
    assert [versions(found[name]) for name in ("0", "1")] == [{0}, {1}]
    assert [versions(found[f"evaluate-{number}"]) for number in range(3)] == [{0}, {2}, {4}]
    assert live == 4
    tensors = load_file(tmp_path / "run" / "state.safetensors")
    saved = load_checkpoint(tmp_path / "run" / "last").model
    trained = torch.cat([p.detach().reshape(-1) for p in sorted(saved.parameters(), key=lambda p: p.ndim < 2)])
    assert torch.equal(trained, tensors["policy.average"])
    assert not torch.equal(trained, tensors["policy.masters"])


def test_the_policy_that_was_measured_best_is_kept(tiny_vla: Path, tmp_path: Path) -> None:
    """Of several that did as well, the latest."""
    iterations = 4
    rows, _ = run(tmp_path / "whole", tiny_vla, iterations=iterations)
    rates = [row["success/evaluate"] for row in rows if "success/evaluate" in row]
    best = max(number for number, rate in enumerate(rates) if rate == max(rates))
    assert 0 < best < iterations, "the seeds of this run must decide"
    run(tmp_path / "short", tiny_vla, iterations=best)
    kept, short, last = (
        torch.cat([p.detach().reshape(-1) for p in load_checkpoint(tmp_path / name).model.parameters()])
        for name in ("whole/run/best", "short/run/last", "whole/run/last")
    )
    assert torch.allclose(kept, short, atol=1e-5) and not torch.allclose(kept, last, atol=1e-5)


def test_overlapped_episodes_are_one_update_old_and_never_older(tiny_vla: Path, tmp_path: Path) -> None:
    rows, found = run(tmp_path, tiny_vla, overlap=True, iterations=4, evaluate_every=0)
    assert [versions(found[str(number)]) for number in range(4)] == [{0}, {0}, {1}, {2}]
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert set(found) == {"0", "1", "2", "3"}, "nothing is asked for that nobody will learn from"


def test_an_evaluation_that_a_kill_kept_from_the_state_is_done_again_and_is_in_the_curve_once(
    tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise OSError("No space left on device")

    with practice(tiny_vla, tmp_path / "episodes") as server:
        config = config_of(tmp_path, tiny_vla, server.address, server.admin_address, iterations=1)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(Reporter, "on_evaluation", full)
            train(config)
        with (config.out / "curve.jsonl").open("a") as curve:
            curve.write('{"step": 1, "succ')  # and the disk was full here too
        train(replace(config, resume=True))
        newest = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(), timeout=60).done
    rows = [json.loads(line) for line in (config.out / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "success/evaluate" in row] == [0, 1]
    state, _ = TrainState.load(config.out / "state.safetensors")
    assert state.cursor == newest == 2 * HELD_OUT + ROLLOUTS, "all was taken in, and nothing was run twice"


def test_a_run_whose_time_is_up_leaves_no_work_behind_and_asks_again_when_it_goes_on(
    tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Run.iterate

    def slowly(run: Run) -> None:
        iterate(run)
        run._began_s -= 3600

    played, go_on = itertools.count(), threading.Event()

    def hesitating(start: policy_pb2.StartEpisodeReply) -> bool:
        return next(played) < ROLLOUTS or go_on.wait(60)

    monkeypatch.setattr(Run, "iterate", slowly)
    with practice(tiny_vla, tmp_path / "episodes", succeeds=hesitating) as server:
        config = config_of(
            tmp_path, tiny_vla, server.address, server.admin_address, overlap=True, evaluate_every=0, minutes=30.0
        )
        train(config)
        queue = server.rollouts.GetQueue(rollout_pb2.GetQueueRequest(), timeout=60)
        assert queue.waiting + queue.leased == 0 and queue.done == ROLLOUTS
        go_on.set()
        train(replace(config, resume=True, minutes=None))
    found = [
        [episode for episode in episodes if episode.end.outcome != episode_pb2.OUTCOME_ERROR]  # one came too late
        for episodes in episodes_of(tmp_path / "episodes").values()
    ]
    assert [versions(some) for some in found] == [{0}, {0}] and [len(some) for some in found] == [ROLLOUTS, ROLLOUTS]


def test_a_server_sleeps_while_the_run_learns_and_at_no_other_time(tiny_vla: Path, tmp_path: Path, monkeypatch) -> None:
    """The last run was killed while it slept."""
    seen: list[tuple[str, int]] = []
    update, prove = Learner.update, Publisher.prove
    with (
        practice(tiny_vla, tmp_path / "episodes") as server,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        admin = admin_pb2_grpc.AdminStub(channel)

        def watched(name: str, method):
            def call(*args, **kwargs):
                seen.append((name, admin.GetStatus(admin_pb2.GetStatusRequest()).state))
                return method(*args, **kwargs)

            return call

        monkeypatch.setattr(Learner, "update", watched("update", update))
        monkeypatch.setattr(Publisher, "prove", watched("prove", prove))
        admin.Sleep(admin_pb2.SleepRequest(), timeout=60)
        train(config_of(tmp_path, tiny_vla, server.address, server.admin_address, server_sleeps=True))
    asleep, awake = admin_pb2.SERVER_STATE_ASLEEP, admin_pb2.SERVER_STATE_SERVING
    assert seen == [("update", asleep), ("prove", awake)] * 2


def test_a_run_that_would_be_measured_on_what_it_practises_is_refused(tiny_vla: Path, tmp_path: Path) -> None:
    """Defect 9."""
    config = config_of(tmp_path, tiny_vla, "127.0.0.1:1", "127.0.0.1:1", evaluate_split="train")
    with pytest.raises(ValueError, match="must not share states, both have"):
        train(config)


def test_a_run_that_fails_within_an_update_does_not_wait_for_its_other_ranks(
    tiny_vla: Path, tmp_path: Path, monkeypatch
) -> None:
    """They wait for its gradient, for as long as half a day; a collective call of another kind would never meet it."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def go() -> None:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tiny_vla, ranks=2, iterations=1, evaluate_every=0)
        ended.append(True)

    monkeypatch.setattr(Optimizer, "step", fail)
    ended: list[bool] = []
    # In a thread: no signal, and so no time limit, reaches one that waits in a collective call.
    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(250)
    assert ended, "it still waits"
