"""Online runs: a server and workers of their own, robosuite's Lift, a tiny policy."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl_trainer.__main__ import COMMANDS, FAILED, main
from rl_trainer.films import HOLD, read_webp
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.loss import LossConfig
from rl_trainer.ranks import Ranks
from rl_trainer.shaping import ShapingConfig
from rl_trainer.suite import cells_of
from rl_trainer.tally import total
from rl_trainer.train import make_learner, seed_of, train
from rl_trainer.train_config import STATE, TrainConfig, claim
from rl_trainer.train_state import TrainState

LISTED = {
    "tasks": {"suite/0": "lift", "suite/1": "stack"},
    "splits": {"train": ["0", "1", "2"], "tune": ["3", "4"]},
}


def config_of(out: Path, model: Path, **changes) -> TrainConfig:
    settings = {
        "suite": "robosuite",
        "tasks": (0,),
        "model": str(model),
        "iterations": 2,
        "rollouts": 2,
        "evaluate_every": 2,
        "evaluate_states": 1,
        "processes": 1,
        "slots": 2,
        "deterministic": True,
        "learner": LearnerConfig(warm_up=1, learning_rate=1e-3),
    }
    return TrainConfig(out=out, **settings | changes)


def curve(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def test_a_resumed_run_continues_bit_for_bit(
    tiny_vla: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = config_of(tmp_path / "whole", tiny_vla), config_of(tmp_path / "parts", tiny_vla)
    train(whole)
    shown = capsys.readouterr().out
    assert shown.startswith("learner") and shown.index("each worker: up to") < shown.index("iteration 0")
    train(replace(parts, iterations=1))
    train(replace(parts, resume=True))
    (first, expected), (second, got) = (TrainState.load(config.out / STATE) for config in (whole, parts))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert first.counts == second.counts and first.counts["episodes"] == 4
    assert first.curriculum == second.curriculum
    rows = [[row for row in curve(config.out) if "success/train" in row] for config in (whole, parts)]
    for a, b in zip(*rows, strict=True):
        compared = ("step", "policy_loss", "value_loss", "environment_steps")
        assert [a.get(name) for name in compared] == [b.get(name) for name in compared]
        assert a["logprob_gap"] < 1e-4
    evaluated = [row["step"] for row in curve(whole.out) if "success/evaluate" in row]
    assert evaluated == [0, 2]
    assert all(row["seconds/evaluate"] > 0 for row in curve(whole.out) if "success/evaluate" in row)
    assert total(curve(whole.out), "train").episodes == 4 and total(curve(whole.out), "evaluate").episodes == 2
    probabilities = [[row["probability/robosuite/0"] for row in of_run] for of_run in rows]
    assert probabilities[0] == probabilities[1] == pytest.approx([1.0, 1.0])
    assert (whole.out / "last" / "config.json").exists()
    for config in (whole, parts):
        assert (config.out / "report" / "index.html").exists()
        assert len(read_webp(config.out / "report" / "robosuite-0.webp")) > HOLD
    with pytest.raises(ValueError, match="rollouts was 2, got 4"):
        train(replace(parts, resume=True, rollouts=4))
    with pytest.raises(ValueError, match="already holds a run"):
        train(parts)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run = config_of(tmp_path / "run", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        claim(replace(run, resume=True))
    assert claim(run) == run
    assert claim(replace(run, resume=True)) == run
    mended = replace(run, temperature=0.5)  # of a start that was refused, say
    assert claim(mended) == claim(replace(mended, resume=True)) == mended
    claim(run)
    (run.out / STATE).touch()
    assert claim(replace(run, resume=True)).resume


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_frozen_vision_leaves_the_rest_to_be_trained(tiny_vla: Path, tmp_path: Path, lora_rank: int) -> None:
    config = config_of(tmp_path, tiny_vla, freeze_vision=True, lora_rank=lora_rank)
    learner, _ = make_learner(config, Ranks())
    trained = {name.split(".")[0] for name, p in learner.model.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "state_projector"} and learner.model.vision_is_frozen


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_an_adapter_is_held_near_to_takes_no_memory_of_its_own(
    tiny_vla: Path, tmp_path: Path, lora_rank: int
) -> None:
    held = LearnerConfig(loss=LossConfig(reference_weight=0.1))
    learner, checkpoint = make_learner(config_of(tmp_path, tiny_vla, lora_rank=lora_rank, learner=held), Ranks())
    assert learner.reference is not None
    weights = [model.language_model.lm_head.weight.data_ptr() for model in (checkpoint.model, learner.reference)]
    assert (weights[0] == weights[1]) == (lora_rank > 0)


def test_cells_are_all_states_of_the_split_or_the_first_of_each_task() -> None:
    assert cells_of(LISTED, (), "tune") == [(f"suite/{task}", state) for task in (0, 1) for state in ("3", "4")]
    assert cells_of(LISTED, (1,), "train", first=2) == [("suite/1", "0"), ("suite/1", "1")]
    with pytest.raises(ValueError, match=r"0\.\.1, got \[2\]"):
        cells_of(LISTED, (2,), "train")
    with pytest.raises(ValueError, match=r"\['train', 'tune'\], got 'test'"):
        cells_of(LISTED, (), "test")


def test_a_rollouts_seed_is_a_function_of_its_place() -> None:
    seeds = {seed_of(run, name, number) for run in (0, 1) for name in ("0", "1") for number in range(5)}
    assert len(seeds) == 20 and seed_of(0, "1", 3) == seed_of(0, "1", 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"noise_correlation": 1.0}, r"noise_correlation must be in \[0, 1\), got 1"),
        ({"minutes": 0.0}, "minutes must be above 0, or none for no limit, got 0"),
        ({"rollouts": 5, "group": 2}, "whole groups of 2, got 5"),
        ({"learner": LearnerConfig(advantage="grpo")}, "group must be >= 2, got 1"),
        ({"server": "localhost:1"}, "server and admin are given together"),
        (
            {"iterations": 5, "learner": LearnerConfig(anneal=4)},
            "anneal must be 0 or >= iterations, .* got 4 with 5 iterations",
        ),
        (
            {"server": "localhost:1", "admin": "localhost:2", "processes": 7},
            "processes is for a server and workers started here: say it to those at localhost:1",
        ),
        ({"shaping": ShapingConfig(rule="paper")}, "there is no reward_model"),
        ({"evaluate_every": -1}, "evaluate_every must be >= 0, got -1"),
        ({"evaluate_states": -1}, "evaluate_states must be >= 0, got -1"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"device": "cuda:1"}, "device must be cpu, cuda or auto where the run is placed, got 'cuda:1'"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, tmp_path, **changes)


def test_an_interrupted_run_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["rl_trainer", "train", "--suite", "robosuite", "--out", str(tmp_path)])
    monkeypatch.setitem(COMMANDS, TrainConfig, interrupted)
    assert main() == FAILED and "--resume goes on" in capsys.readouterr().err
