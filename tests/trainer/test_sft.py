from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.config import VLAConfig
from policy_server.vla.decoding import decode
from policy_server.vla.passes import DecodeInput
from protos import episode_pb2
from rl_trainer.augment import Augmentation
from rl_trainer.cloner import Cloner
from rl_trainer.metrics import Curve
from rl_trainer.ranks import Ranks
from rl_trainer.sample_reader import SampleReader
from rl_trainer.sft import SftConfig, _collect, _objective, sft
from rl_trainer.teacher import relabelled
from tests.trainer import fake_demonstrations as fake
from tests.trainer.fake_ranks import OneOfTwo

STILL = Augmentation(brightness=0, contrast=0, saturation=0, shift_px=0, state_noise=0)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    for i in range(6):
        fake.write_episode(folder, f"e{i}", fake.actions(16, seed=i), instruction=f"pick up the object {i % 2}")
    return folder


def config(data: Path, out: Path, init: Path | str, **options: object) -> SftConfig:
    """A run small enough for a test: 24 samples."""
    settings = {
        "init": str(init),
        "steps": 4,
        "batch_size": 8,
        "warmup_steps": 2,
        "validation_fraction": 0.0,
        "log_seconds": 0.0,
    }
    return SftConfig(data=(data,), out=out, **{**settings, **options})  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in Curve(out, first_step=1000).rows if "loss" in row]


def test_token_noise_disturbs_what_the_model_reads_and_not_what_it_should_say(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    read, said = dict[float, torch.Tensor](), dict[float, torch.Tensor]()
    for noise in (0.0, 3.0):
        checkpoint = load_checkpoint(tiny_vla, dtype="float32", device="cpu")
        samples = _collect(config(demonstrations, tmp_path, tiny_vla), tmp_path / "frames.u8")
        norm_stats = {"demonstrations": samples.statistics}
        checkpoint.model.config = replace(checkpoint.config, norm_stats=norm_stats)

        def objective(logits_BNV: torch.Tensor, labels_BN: torch.Tensor, noise: float = noise) -> torch.Tensor:
            said[noise] = labels_BN
            return logits_BNV.sum()

        checkpoint.model.register_forward_pre_hook(lambda _, inputs, noise=noise: read.update({noise: inputs[1]}))
        cloner = Cloner(
            checkpoint.model,
            checkpoint.tokenizer,
            samples,
            unnorm_key="demonstrations",
            objective=objective,  # type: ignore[arg-type]
            augmentation=replace(STILL, token_noise=noise),
            batch_size=8,
            accumulate=1,
            autocast=False,
            seed=0,
            ranks=Ranks(),
        )
        cloner.gradient(0)
    begin = load_checkpoint(tiny_vla, dtype="float32", device="cpu").config.action_begin
    assert torch.equal(said[0.0], said[3.0])
    assert torch.equal(read[0.0] - begin, said[0.0])
    assert 0 < (read[3.0] - read[0.0]).abs().max() < 40


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    sft(config(demonstrations, tmp_path / "whole", tiny_vla, steps=7, final_learning_rate=1e-3))
    sft(config(demonstrations, tmp_path / "parts", tiny_vla, steps=4, final_learning_rate=1e-3))
    sft(config(demonstrations, tmp_path / "parts", tiny_vla, steps=7, final_learning_rate=1e-3, resume=True))
    assert_same(load_file(tmp_path / "whole/state.safetensors"), load_file(tmp_path / "parts/state.safetensors"))
    assert_same(weights(tmp_path / "whole/last"), weights(tmp_path / "parts/last"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_folder_with_a_run_is_neither_overwritten_nor_resumed_as_another(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    sft(config(demonstrations, tmp_path, tiny_vla, steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        sft(config(demonstrations, tmp_path, tiny_vla, steps=1))
    with pytest.raises(ValueError, match="seed was 0, got 1"):
        sft(config(demonstrations, tmp_path, tiny_vla, steps=2, seed=1, resume=True))


def test_a_tiny_set_is_learned_by_heart(tiny_vla: Path, tmp_path: Path) -> None:
    labels = fake.actions(8)
    fake.write_episode(tmp_path / "data", "e", labels)
    out = tmp_path / "run"
    sft(
        config(
            tmp_path / "data", out, tiny_vla, steps=200, batch_size=2, augmentation=STILL, ema=0.0, learning_rate=5e-3
        )
    )
    assert losses(out)[0] > 4
    assert np.mean(losses(out)[-5:]) < 0.05


def test_a_checkpoint_carries_the_statistics_that_its_tokens_were_made_with(
    demonstrations: Path, tmp_path: Path
) -> None:
    sft(config(demonstrations, tmp_path, "nano", steps=1, unnorm_key="ours", chunk_length=2))
    checkpoint = load_checkpoint(tmp_path / "last")
    actions = np.concatenate([fake.actions(16, seed=i) for i in range(6)]).astype(np.float64)
    statistics = checkpoint.config.norm_stats["ours"]["action"]
    np.testing.assert_allclose(statistics["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(statistics["q99"], np.quantile(actions, 0.99, axis=0))
    assert statistics["mask"] == [True] * 6 + [False]
    tokens = ActionTokens(checkpoint.config, "ours")
    inside_KA = np.clip(actions[:2], tokens.low_A, tokens.high_A)
    half_bin_A = np.where(tokens.mask_A, (tokens.high_A - tokens.low_A) / 255 / 2, 1 / 255)
    assert (np.abs(tokens.decode(tokens.encode(inside_KA)) - inside_KA) <= half_bin_A + 1e-12).all()


def test_a_lora_run_leaves_the_base_as_it_was(demonstrations: Path, tiny_vla: Path, tmp_path: Path) -> None:
    sft(config(demonstrations, tmp_path / "base", tiny_vla, steps=1))
    base = weights(tmp_path / "base/last")
    sft(config(demonstrations, tmp_path / "lora", tmp_path / "base/last", steps=3, lora_rank=4))
    assert_same(base, weights(tmp_path / "base/last"))
    adapter = load_file(tmp_path / "lora/last/adapter_model.safetensors")
    assert adapter and all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if ".lora_B." in name)


def test_two_ranks_learn_what_one_learns(demonstrations: Path, tiny_vla: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        sft(config(demonstrations, tmp_path / str(ranks), tiny_vla, steps=3, ranks=ranks, ema=0.0))
    one, two = weights(tmp_path / "1/last"), weights(tmp_path / "2/last")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-3)


def test_parts_of_a_batch_add_up_to_the_batch(demonstrations: Path, tiny_vla: Path, tmp_path: Path) -> None:
    for accumulate in (1, 3):
        sft(config(demonstrations, tmp_path / str(accumulate), tiny_vla, steps=2, accumulate=accumulate, ema=0.0))
    one, three = weights(tmp_path / "1/last"), weights(tmp_path / "3/last")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, three[name], rtol=1e-3, atol=1e-3)


def test_published_hdf5_demonstrations_are_learned_like_our_own(tiny_vla: Path, tmp_path: Path) -> None:
    raw = fake.actions(12)
    raw[:, -1] = 1 - 2 * raw[:, -1]  # LIBERO's gripper: -1 opens, +1 closes
    ours, theirs = fake.actions(12), fake.write_hdf5(tmp_path / "drawer.hdf5", raw)
    sft(config(theirs, tmp_path / "run", tiny_vla, steps=1))
    statistics = load_checkpoint(tmp_path / "run/last").config.norm_stats["demonstrations"]["action"]
    np.testing.assert_allclose(statistics["mean"], ours.astype(np.float64).mean(0), atol=1e-7)


def test_only_evaluation_episodes_are_nothing_to_train_on(tiny_vla: Path, tmp_path: Path) -> None:
    fake.write_episode(tmp_path / "data", "exam", fake.actions(8), purpose=episode_pb2.PURPOSE_EVALUATE)
    with pytest.raises(ValueError, match="no demonstration is left to train on"):
        sft(config(tmp_path / "data", tmp_path / "run", tiny_vla))


def test_held_out_episodes_are_measured_by_action_dimension(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    sft(config(demonstrations, tmp_path, tiny_vla, steps=2, validation_fraction=0.5))
    row = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])
    assert {f"accuracy/{i}" for i in range(7)} | {f"l1/{i}" for i in range(7)} < set(row)
    assert all(0 <= row[f"accuracy/{i}"] <= 1 for i in range(7))
    assert row["l1/3"] == pytest.approx(0, abs=1e-6)  # no demonstration rotates
    assert (tmp_path / "best/config.json").exists() and (tmp_path / "curve.png").stat().st_size > 1000


def test_sigterm_ends_a_run_with_a_checkpoint_and_exit_code_0(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rl_trainer", "sft", "--data", str(demonstrations), "--out", str(tmp_path / "run")]
    options = ["--init", str(tiny_vla), "--minutes", "5", "--batch-size", "4", "--log-seconds", "0", "--ranks", "2"]
    process = subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2 "):
            break
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 60
    assert load_checkpoint(tmp_path / "run/last").config.chunk_length == 2
    assert (tmp_path / "run/state.safetensors").exists()


def test_a_dimension_that_never_moves_keeps_hard_targets(tmp_path: Path, tiny_vla: Path) -> None:
    config = VLAConfig.from_json(tiny_vla / "config.json")
    statistics = {
        "action": {"q01": [-1.0, 0.0, -1.0], "q99": [1.0, 0.0, 1.0], "mask": [True, True, False]},
        "proprio": {"q01": [], "q99": []},
    }
    config = replace(config, norm_stats={"tiny": statistics}, chunk_length=2)
    objective = _objective(SftConfig(data=(), out=tmp_path, steps=1, unnorm_key="tiny", gripper_weight=3.0), config)
    assert objective.smooth_N.tolist() == [True, False, False] * 2
    assert objective.weight_N.tolist() == [1.0, 1.0, 3.0] * 2


def test_a_teachers_greedy_actions_take_the_place_of_the_labels(tiny_vla: Path, tmp_path: Path) -> None:
    """Ranks decode a part each; what was executed, and whether it succeeded, does not matter."""
    folder, teacher = tmp_path / "data", load_checkpoint(tiny_vla, dtype="float32", device="cpu")
    train, failure = episode_pb2.PURPOSE_TRAIN, episode_pb2.OUTCOME_FAILURE
    fake.write_episode(folder, "won", fake.actions(12), purpose=train, with_expert=False)
    fake.write_episode(folder, "lost", fake.actions(20), purpose=train, outcome=failure, with_expert=False)
    fake.write_episode(folder, "measured", fake.actions(12), purpose=episode_pb2.PURPOSE_EVALUATE)
    samples = _collect(config(folder, tmp_path, tiny_vla, teacher=str(tiny_vla)), tmp_path / "frames.u8")
    assert len(samples) == (12 + 20) // 4
    whole = relabelled(samples, teacher, unnorm_key="tiny", ranks=Ranks())
    one, other = (
        relabelled(samples, teacher, unnorm_key="tiny", ranks=OneOfTwo(rank=rank, size=2)) for rank in range(2)
    )
    np.testing.assert_allclose(one.actions_nKA + other.actions_nKA, whole.actions_nKA, atol=1e-6)
    reader = SampleReader(samples, teacher.config, teacher.tokenizer, unnorm_key="tiny")
    for row in range(len(samples)):
        decoded = decode(teacher.model, [DecodeInput(prepared=reader.prepared(row))])
        expected_KA = ActionTokens(teacher.config, "tiny").decode(decoded.token_ids_BN[0])
        np.testing.assert_allclose(whole.actions_nKA[row], expected_KA, atol=1e-6)
        assert np.abs(whole.actions_nKA[row] - samples.actions_nKA[row]).max() > 0.1


def test_a_run_with_a_teacher_learns_from_failures_and_a_teacher_of_other_chunks_is_refused(
    tiny_vla: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "data"
    fake.write_episode(lost, "lost", fake.actions(40), outcome=episode_pb2.OUTCOME_FAILURE, with_expert=False)
    with pytest.raises(ValueError, match="no demonstration is left"):
        sft(config(lost, tmp_path / "alone", tiny_vla))
    sft(config(lost, tmp_path / "taught", tiny_vla, teacher=str(tiny_vla), unnorm_key="tiny"))
    assert len(losses(tmp_path / "taught")) == 4
    with pytest.raises(ValueError, match=r"the teacher's chunks have 2 actions of 7 numbers, .* trained has 8 of 7"):
        sft(config(lost, tmp_path / "other", "nano", teacher=str(tiny_vla), unnorm_key="tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0.0}, "minutes must be above 0, got 0"),
        ({"steps": -1}, "steps must be above 0, got -1"),
        ({"steps": 1, "lora_rank": 4}, "lora_rank must be 0 for a fresh nano"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SftConfig(data=(tmp_path,), out=tmp_path, **changes)


def test_a_checkpoint_is_taught_from_the_camera_that_it_sees(
    demonstrations: Path, tiny_vla: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"camera must be 'agentview', which .* sees, got 'wrist'"):
        sft(config(demonstrations, tmp_path, tiny_vla, steps=1, camera="wrist"))


def test_ranks_that_would_share_a_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ranks must be 1 on cuda, which all would share, got 2"):
        SftConfig(data=(), out=tmp_path, steps=1, device="cuda", ranks=2)
