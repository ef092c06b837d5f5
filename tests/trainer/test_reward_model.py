"""The process reward model on the policy's architecture: what it learns, how it is kept, what it refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.model import collate
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.tokenizer import build_tokenizer
from protos import codec, episode_pb2
from protos.episode_file import EpisodeWriter
from rl_trainer.augment import Augmentation
from rl_trainer.demonstrations import HDF5_STATE_NAMES
from rl_trainer.milestones import MilestoneConfig
from rl_trainer.progress_model import ProgressModel
from rl_trainer.reward_frames import RewardFrames, balanced_rows, collect_frames
from rl_trainer.reward_model import RECORD, RewardModelConfig, auc, load_reward_model, train_reward_model

SIDE = 32
DARK, BRIGHT = 40, 220


@pytest.fixture
def checkpoint(tiny_vla: Path) -> Checkpoint:
    return load_checkpoint(tiny_vla)


def write_episode(
    folder: Path,
    name: str,
    *,
    outcome: episode_pb2.Outcome = episode_pb2.OUTCOME_SUCCESS,
    purpose: episode_pb2.Purpose = episode_pb2.PURPOSE_DEMONSTRATE,
    state_names: tuple[str, ...] = HDF5_STATE_NAMES,
) -> None:
    """Six decisions of four ticks; by the window rule the last two of a success are milestones, and are bright."""
    folder.mkdir(parents=True, exist_ok=True)
    start = episode_pb2.EpisodeStart(
        episode_id=name, task="t", purpose=purpose, state_names=state_names, tick_rate_hz=20.0
    )
    writer = EpisodeWriter(folder / f"{name}.episode", start)
    rng = np.random.default_rng(list(name.encode()))
    for decision in range(6):
        grey = BRIGHT if decision >= 4 and outcome == episode_pb2.OUTCOME_SUCCESS else DARK
        pixels = np.clip(rng.normal(grey, 15, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        seen = episode_pb2.Observation(
            images={"agentview": codec.encode_image(pixels, "png")},
            state=codec.encode_tensor(rng.uniform(-1, 1, 8).astype(np.float32)),
            instruction="pick up the milk",
        )
        writer.decision(episode_pb2.Decision(decision=decision, observation=seen))
        source = episode_pb2.SOURCE_EXPERT
        writer.executed(
            [episode_pb2.Tick(decision=decision, index=i, action=[0.1] * 6 + [1.0], source=source) for i in range(4)]
        )
    writer.finish(episode_pb2.EpisodeEnd(outcome=outcome, terminal=True))


def toy(folder: Path) -> Path:
    for number in range(12):
        write_episode(folder, f"good{number}")
    for number in range(4):
        write_episode(folder, f"bad{number}", outcome=episode_pb2.OUTCOME_FAILURE)
    return folder


def frames_of(folder: Path, checkpoint: Checkpoint, refused: Counter[str], *, episodes: int = 100) -> RewardFrames:
    return collect_frames(
        [folder],
        Preprocessor(checkpoint.config, checkpoint.tokenizer),
        MilestoneConfig(rule="window"),
        camera="agentview",
        episodes=episodes,
        validation_fraction=0.3,
        seed=0,
        refused=refused,
    )


def toy_config(tmp_path: Path, tiny_vla: Path, **fields: object) -> RewardModelConfig:
    values = {
        "data": (toy(tmp_path / "data"),),
        "out": tmp_path / "out",
        "policy": str(tiny_vla),
        "milestones": MilestoneConfig(rule="window", last_ticks=8),
        "validation_fraction": 0.3,
        "steps": 60,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "log_steps": 20,
        "augmentation": Augmentation(brightness=0.05),
    }
    return RewardModelConfig(**{**values, **fields})


def seen(checkpoint: Checkpoint, grey: int, instruction: str = "pick up the milk") -> Prepared:
    pixels = np.full((SIDE, SIDE, 3), grey, np.uint8)
    return Preprocessor(checkpoint.config, checkpoint.tokenizer).prepare(pixels, instruction, np.zeros(8, np.float32))


def test_it_learns_which_frames_are_milestones_and_is_the_same_when_loaded(
    tmp_path: Path, tiny_vla: Path, checkpoint: Checkpoint
) -> None:
    config = toy_config(tmp_path, tiny_vla)
    train_reward_model(config)
    record = json.loads((config.out / RECORD).read_text())
    assert record["kind"] == "progress" and record["config"]["milestones"]["rule"] == "window"
    assert record["frames"]["positive"] == 12 * 2 and record["measured"]["auc"] > 0.99
    observations = [seen(checkpoint, DARK), seen(checkpoint, BRIGHT), seen(checkpoint, DARK)]
    model = load_reward_model(config.out, checkpoint.config, checkpoint.tokenizer)
    dark, bright, again = model.predict(observations)
    assert dark < 0.2 < 0.8 < bright and dark == again
    twin = load_reward_model(config.out, checkpoint.config, checkpoint.tokenizer)
    assert (twin.predict(observations) == model.predict(observations)).all()
    with pytest.raises(ValueError, match="already holds a reward model"):
        train_reward_model(config)


def test_a_prediction_is_the_share_of_1_against_0_among_the_next_tokens(checkpoint: Checkpoint) -> None:
    """Counted out over the whole vocabulary, at the end of each prompt, whatever is padded after it."""
    model = ProgressModel(checkpoint.model, checkpoint.tokenizer)
    observations = [seen(checkpoint, DARK, "pick"), seen(checkpoint, BRIGHT, "pick up the black bowl and place it")]
    zero, one = (checkpoint.tokenizer.backend.token_to_id(answer) for answer in "01")
    for observation, predicted in zip(observations, model.predict(observations), strict=True):
        with torch.no_grad():
            hidden = checkpoint.model.hidden(collate([observation]), torch.zeros(1, 0, dtype=torch.int64))[0, -1]
            next_token_V = torch.softmax(checkpoint.model.language_model.lm_head(hidden).double(), 0)
        expected = next_token_V[one] / (next_token_V[zero] + next_token_V[one])
        assert predicted == pytest.approx(float(expected), abs=1e-6)


def test_the_loss_is_the_cross_entropy_with_answers_of_which_a_part_is_right(checkpoint: Checkpoint) -> None:
    model, target_B = ProgressModel(checkpoint.model, checkpoint.tokenizer), np.array([1.0, 0.25])
    observations = [seen(checkpoint, DARK), seen(checkpoint, BRIGHT)]
    first, second = model.predict(observations)
    expected = -(np.log(first) + 0.25 * np.log(second) + 0.75 * np.log(1 - second)) / 2
    assert float(model.loss(observations, target_B).detach()) == pytest.approx(expected, rel=1e-5)


def test_frames_come_from_successes_and_failures_and_never_from_evaluation(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    folder, refused = toy(tmp_path), Counter[str]()
    write_episode(folder, "held", purpose=episode_pb2.PURPOSE_EVALUATE)
    write_episode(folder, "broken", outcome=episode_pb2.OUTCOME_ERROR)
    write_episode(folder, "blind", state_names=())
    frames = frames_of(folder, checkpoint, refused)
    assert refused == {"purpose_evaluate": 1, "outcome_error": 1, "damaged": 1}
    assert len(frames) == 16 * 6 and frames.success_n.sum() == 12 * 6
    # the last 10 of 24 ticks, seen at 16 and 20
    assert frames.positive_n.sum() == 12 * 2 and not frames.positive_n[~frames.success_n].any()
    bright_n = np.array([observation.image.mean() > 128 for observation in frames.observations])
    assert (bright_n == frames.positive_n).all()
    assert 0 < frames.validation_n.sum() < len(frames) and (frames.validation_n.reshape(-1, 6).std(1) == 0).all()


def test_no_more_episodes_are_read_than_asked_for(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert len(frames_of(toy(tmp_path), checkpoint, Counter(), episodes=5)) == 5 * 6


def test_half_of_a_batch_is_positive_however_rare_positives_are() -> None:
    positive_n = np.zeros(1000, bool)
    positive_n[7] = True
    rows = balanced_rows(positive_n, 32, seed=0, step=3)
    assert positive_n[rows].sum() == 16 and len(np.unique(rows[16:])) > 10
    assert (rows == balanced_rows(positive_n, 32, seed=0, step=3)).all()
    assert (rows != balanced_rows(positive_n, 32, seed=0, step=4)).any()


def test_frames_of_one_kind_are_refused(tmp_path: Path, tiny_vla: Path) -> None:
    data = tmp_path / "failures"
    write_episode(data, "bad", outcome=episode_pb2.OUTCOME_FAILURE)
    with pytest.raises(ValueError, match="of both kinds, got 0 positive of 6"):
        train_reward_model(toy_config(tmp_path, tiny_vla, data=(data,), validation_fraction=0.0))


def test_a_policy_that_reads_otherwise_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model, config = ProgressModel(checkpoint.model, checkpoint.tokenizer), checkpoint.config
    model.check_reads_like(config, checkpoint.tokenizer)
    with pytest.raises(ValueError, match=r"differs in \['image_path'\]"):
        model.check_reads_like(replace(config, image_path="processor"), checkpoint.tokenizer)
    with pytest.raises(ValueError, match=r"differs in \['tokenizer'\]"):
        model.check_reads_like(config, build_tokenizer(["other words"], size=400))
    other = {"tiny": dict(config.norm_stats["tiny"]) | {"proprio": {"q01": [-2.0] * 8, "q99": [1.0] * 8}}}
    with pytest.raises(ValueError, match=r"norm_stats\[tiny\].proprio"):
        model.check_reads_like(replace(config, norm_stats=other), checkpoint.tokenizer)


def test_a_folder_without_a_reward_model_is_named(tiny_vla: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward\.json is missing"):
        load_reward_model(tiny_vla, checkpoint.config, checkpoint.tokenizer)


def test_auc_counts_pairs_in_order_and_ties_half() -> None:
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert auc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert np.isnan(auc(np.array([0.5]), np.array([True])))


def test_what_a_vlm_needs_is_said_where_it_is_not_installed(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rl_trainer.vlm_reward", None)
    (tmp_path / RECORD).write_text(json.dumps({"kind": "vlm"}))
    with pytest.raises(ValueError, match=r"pip install 'vla-rl\[vlm\]'"):
        load_reward_model(tmp_path, checkpoint.config, checkpoint.tokenizer)
