"""The plan: what it counts, what it refuses, and how it is compared with a run."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from policy_server.vla.checkpoint import load_checkpoint, load_config
from policy_server.vla.config import nano_config
from policy_server.vla.preprocessing import Prepared, Preprocessor
from rl_trainer.__main__ import main
from rl_trainer.calibration import SceneCosts, measure_prices, sampled_trajectories
from rl_trainer.costs import GIB, Shapes
from rl_trainer.learner import Learner
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.loss import LossConfig
from rl_trainer.placement import Place, Placement
from rl_trainer.plan import FREE, Needs, PlanConfig, compared, measured_of, minutes, plan, schedule_of
from rl_trainer.run_state import differences
from tests.trainer.test_costs import HOST, PRICES, SCHEDULE, STATISTICS

LISTED = {
    "tasks": {"suite/0": "lift", "suite/1": "stack"},
    "splits": {"train": ["0", "1", "2"], "tune": ["3", "4"]},
    "max_ticks": 300,
}
SCENES = SceneCosts(
    tick_s=0.001, frame_s=0.05, reset_s=0.02, build_s=2.0, base_gb=0.2, scene_gb=0.3, slowdown=1.5, coarse_frame_s=0.02
)


def config_of(out: Path, model: Path | str = "nano", **changes) -> PlanConfig:
    settings = {"suite": "robosuite", "model": str(model), "rollouts": 10, "iterations": 5, "evaluate_every": 2}
    return PlanConfig(out=out, **settings | changes)


def test_a_run_evaluates_before_it_begins_and_every_so_many_iterations(tiny_vla: Path, tmp_path: Path) -> None:
    model = load_config(tiny_vla)
    half = {"episode_share": 0.5}
    schedule = schedule_of(config_of(tmp_path), model, LISTED, **half)
    assert (schedule.evaluations, schedule.evaluated, schedule.tasks) == (3, 4, 2)
    assert (schedule.ticks, schedule.chunk, schedule.decisions) == (150.0, 2, 750)
    assert schedule.warm_up == LearnerConfig().warm_up > 0
    none = schedule_of(config_of(tmp_path, evaluate_every=0, tasks=(1,)), model, LISTED, **half)
    assert (none.evaluations, none.tasks) == (0, 1)
    relative = LearnerConfig(advantage="grpo")
    assert schedule_of(config_of(tmp_path, group=2, learner=relative), model, LISTED, **half).warm_up == 0


def test_a_run_that_memory_or_disk_do_not_hold_is_refused_in_a_sentence(
    tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["rl_trainer", "plan", "--out", str(tmp_path / "run"), "--suite", "robosuite", "--model", str(tiny_vla)]
    monkeypatch.setattr(sys, "argv", [*line, "--memory-gb", "1.25"])
    assert main() == 2
    assert "error: the run needs" in (said := capsys.readouterr().err) and "which has 1.2: learner" in said
    monkeypatch.setattr("rl_trainer.plan.time_scenes", lambda *_: SCENES)
    with pytest.raises(ValueError, match=r"GiB of disk, and 0\.0 are free"):
        plan(config_of(tmp_path / "run", tiny_vla, free_gb=0.0))
    monkeypatch.setattr("rl_trainer.plan.time_scenes", lambda *_: replace(SCENES, scene_gb=1000.0))
    process_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    memory_gb = max(1.25, 3 * process_gb)  # for learner and server, and half for workers, of a scene or more
    with pytest.raises(ValueError, match=r"of the memory of this machine, .* workers \d+"):
        plan(config_of(tmp_path / "run", tiny_vla, memory_gb=memory_gb))
    assert not (tmp_path / "run").exists()


def test_a_server_that_sleeps_shares_the_room_of_activations_on_the_learners_device_alone(tmp_path: Path) -> None:
    shapes = Shapes(numbers=10**9, frozen=0, trained=10**9, width=4, trained_width=4, saved_bytes=20 * 10**9)

    def server_gb(server: str, **changes) -> float:
        of = {"environment": {}, "memory_gb": 80.0}
        places = {"learner": "GPU 0", "server": server}
        at = {name: Place(process=name, device=device, **of) for name, device in places.items()}
        placement = Placement(**at, workers=(), scenes=1, worker_gb=1.0, notes=())
        config = config_of(tmp_path, learner=LearnerConfig(), **changes)
        needs = Needs(config, nano_config(STATISTICS), shapes, SCHEDULE, placement)
        return next(need.gb for need in needs.computing() if need.process == "server")

    awake = server_gb("GPU 0")
    # While it sleeps 20 GB of activations lie there; while it is awake a state of 12 GB is saved.
    assert server_gb("GPU 0", server_sleeps=True) == pytest.approx(awake - 8 * 10**9 / GIB)
    assert server_gb("GPU 1", server_sleeps=True) == awake


def test_what_an_adapter_is_held_near_to_is_the_base_and_needs_no_room_of_its_own(tmp_path: Path) -> None:
    shapes = Shapes(numbers=10**9, frozen=0, trained=10**9, width=4, trained_width=4, saved_bytes=0)

    def learner_gb(weight: float, lora_rank: int) -> float:
        place = Place(process="any", device="GPU 0", environment={}, memory_gb=80.0)
        placement = Placement(learner=place, server=place, workers=(), scenes=1, worker_gb=1.0, notes=())
        held = LearnerConfig(loss=LossConfig(reference_weight=weight))
        config = config_of(tmp_path, learner=held, lora_rank=lora_rank)
        needs = Needs(config, nano_config(STATISTICS), shapes, SCHEDULE, placement)
        return next(need.gb for need in needs.computing() if need.process == "learner")

    assert learner_gb(0.1, 0) == pytest.approx(learner_gb(0.0, 0) + 4 * 10**9 / GIB)
    assert learner_gb(0.1, 4) == learner_gb(0.0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_share": 0.0}, r"episode_share must be in \(0, 1\], got 0"),
        ({"server": "localhost:1", "admin": "localhost:2"}, "server must not be given"),
        ({"rollouts": 0}, "rollouts must be >= 1, got 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_prices_come_from_updates_passes_and_publishes_that_really_ran(
    tiny_vla: Path, tmp_path: Path, advantage: str
) -> None:
    learner = LearnerConfig(advantage=advantage, minibatch=8, microbatch=4)  # pyright: ignore[reportArgumentType]
    config = config_of(tmp_path, tiny_vla, group=2, learner=learner, coarse_practice=True)
    prices = measure_prices(config, SCENES, ["lift the cube", "stack"])
    assert (prices.practice_frame_s, prices.evaluation_frame_s, prices.slowdown) == (0.02, 0.05, 1.5)
    assert all(value > 0 for name, value in asdict(prices).items() if name not in ("pass_s", "request_s"))
    assert prices.pass_s + prices.request_s > 0


class SlowReward:
    def predict(self, observations: Sequence[Prepared]) -> np.ndarray:
        time.sleep(0.5 * len(observations))
        return np.zeros(len(observations), np.float32)


def test_the_price_of_a_decision_has_the_reward_models_in_it(
    tiny_vla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_trainer.train.load_reward_model", lambda *_, **__: SlowReward())
    learner = LearnerConfig(minibatch=2, microbatch=2)
    prices = measure_prices(config_of(tmp_path, tiny_vla, learner=learner, reward_model=tmp_path), SCENES, ["stack"])
    assert min(prices.warm_decision_s, prices.decision_s) > 0.5


def test_sampled_trajectories_are_what_the_policy_would_do(tiny_vla: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_vla)
    preprocessor = Preprocessor(checkpoint.config, checkpoint.tokenizer)
    image = np.zeros((32, 32, 3), np.uint8)
    observations = [preprocessor.prepare(image, "stack", np.full(8, 0.1 * n, np.float32)) for n in range(6)]
    trajectories = sampled_trajectories(checkpoint.model, observations, temperature=0.5, per_trajectory=4)
    assert [(len(one), one.success, one.rewards_T.sum()) for one in trajectories] == [(4, False, 0), (2, True, 1)]
    learner = Learner(checkpoint.model, LearnerConfig(warm_up=0, minibatch=8, epochs=1))
    assert learner.update(trajectories, version=0)["logprob_gap"] < 1e-4


def test_the_assumptions_are_printed_before_the_prediction(tmp_path: Path) -> None:
    lines = list(minutes(config_of(tmp_path, minutes=0.5), SCHEDULE, PRICES, HOST))
    assert "80 ticks, 0.7 of the limit" in lines[0] and "100 % of a core" in lines[0]
    assert "tick 5.00, frame 60.0 in practice and 160.0 in evaluations" in lines[1]
    assert lines[2] == "an iteration: 10 episodes, 100 decisions"
    assert "5 iterations and 3 evaluations of 10 episodes take" in lines[-2]
    assert lines[-1].startswith("it stops after 0.5 min")


def finished(run: Path) -> Path:
    """A run of two iterations and two evaluations, the first of which waited for processes to start."""
    run.mkdir()
    counts = {"decisions": 200.0, "episodes": 20.0}
    rows = [
        {"step": 0, "seconds/evaluate": 99.0},
        {"step": 1, "seconds/collect": 99.0, "seconds/learn": 2.0, "seconds/publish": 0.4, "wall_clock_s": 200.0},
        {"step": 2, "seconds/collect": 10.0, "seconds/learn": 4.0, "seconds/publish": 0.6, "wall_clock_s": 220.0},
        {"step": 2, "seconds/evaluate": 20.0},
    ]
    rows[2] |= {"environment_steps": 800.0, "stopped_early": 1.0, **counts}
    (run / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_finished_run_is_measured_without_what_its_start_cost(tmp_path: Path) -> None:
    config = config_of(tmp_path, learner=LearnerConfig(warm_up=1))
    run = measured_of(finished(tmp_path / "run"), config)
    expected = {"collect": 10.0, "learn": 4.0, "learn, critic alone": 2.0, "publish": 0.5, "evaluate": 20.0}
    assert run.seconds == expected
    assert (run.ticks, run.iterations, run.evaluations, run.run_s, run.stopped_early) == (40.0, 2, 1, 220.0, 1)
    lines = list(compared(replace(config, measured=tmp_path / "run"), SCHEDULE, PRICES, HOST, run))
    by_phase = {line[:22].strip(): line[22:].split() for line in lines[3:]}
    # 9.9 s at 80 ticks; at 40: 1.12 * 5 and 2 s of simulators, 3 s of server, 0.3 s of reading, over two cores.
    assert by_phase["collect"] == ["10.0", "9.9", "0.99", "5.5", "0.55"]
    assert by_phase["learn"] == ["4.0", "3.0", "0.75", "1.5", "0.38"]
    (tmp_path / "run" / "curve.jsonl").write_text('{"step": 0, "seconds/evaluate": 1.0}\n')
    with pytest.raises(ValueError, match="has no iteration"):
        measured_of(tmp_path / "run", config)


def test_a_run_with_other_options_is_not_compared(tmp_path: Path) -> None:
    config = config_of(tmp_path / "new")
    record = tmp_path / "train.json"
    before = json.loads(json.dumps(asdict(config), default=str)) | {"rollouts": 32, "out": "elsewhere"}
    record.write_text(json.dumps(before))
    assert differences(record, config, but=FREE) == "rollouts was 32, got 10"
