"""Process reward models: `python -m rl_trainer reward-model --data DIR --out DIR`.

Trained on frames of episodes to tell how much is done, or which show a milestone (milestones.py); frozen while the
policy learns from what it says (shaping.py).  Leaves in --out: the model, reward.json (which rule, what was measured on
held-out episodes) and curve.jsonl.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from policy_server.vla.checkpoint import load_config, local_folder
from policy_server.vla.config import VLAConfig
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.tokenizer import Tokenizer
from rl_trainer.augment import Augmentation, draw
from rl_trainer.devices import compute_device
from rl_trainer.imitation import learning_rate
from rl_trainer.metrics import Curve
from rl_trainer.milestones import MilestoneConfig
from rl_trainer.optimizer import Optimizer
from rl_trainer.progress_model import ProgressModel
from rl_trainer.reward_frames import RewardFrames, augmented, balanced_rows, collect_frames

if TYPE_CHECKING:
    from rl_trainer.vlm_reward import VlmReward

RECORD = "reward.json"


class RewardModel(Protocol):
    """Says how much of the task an observation shows to be done, or how probable it is that it shows a milestone."""

    def predict(self, observations: Sequence[Prepared]) -> np.ndarray:
        """float64 (n,) in [0, 1], of observations as the policy reads them."""
        ...


class TrainableRewardModel(RewardModel, Protocol):
    """One that learns from labelled observations."""

    kind: str
    """what load_reward_model() knows it by"""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        ...

    def loss(self, observations: Sequence[Prepared], target_B: np.ndarray) -> torch.Tensor:
        """Mean over the batch; target_B: in [0, 1], what predict() should give."""
        ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Trains a process reward model on recorded episodes."""

    data: tuple[Path, ...]
    """episode files or folders of them: successful ones, and failing ones of a policy, whose frames are all labelled 0;
    without those it takes any motion for progress (benchmarks/process_reward.py)"""
    out: Path
    """where the model goes"""
    policy: str = "nano"
    """whose trajectories it will judge, and which it begins from: nano, or a checkpoint's folder or hub id"""
    unnorm_key: str | None = None
    """the policy's entry of norm_stats; needed when it has several"""
    vlm: str = ""
    """folder or hub id of a Qwen2-VL that gets an adapter, in place of the policy's own architecture (extra vlm)"""
    milestones: MilestoneConfig = field(default_factory=MilestoneConfig)
    episodes: int = 1000
    """at most so many are read"""
    validation_fraction: float = 0.1
    """of the episodes, chosen by a hash of their ids"""
    steps: int = 600
    batch_size: int = 32
    """frames of one optimiser step, half of them positive"""
    learning_rate: float = 1e-4
    """peak of a cosine"""
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    lora_rank: int = 32
    """of the adapter of a vlm"""
    lora_alpha: int = 16
    log_steps: int = 50
    """optimiser steps between two lines"""
    threads: int = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in the model; masters are float32 always"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "log_steps", "threads", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be >= 2, one of each answer, got {self.batch_size}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")


def train_reward_model(config: RewardModelConfig) -> None:
    """Reads, trains, measures, saves.  Raises ValueError or FileNotFoundError for what the user can put right."""
    if (config.out / RECORD).exists():
        raise ValueError(f"{config.out} already holds a reward model: choose another --out")
    torch.set_num_threads(config.threads)
    config = replace(config, device=compute_device(config.device))
    folder = local_folder(config.policy)
    policy, tokenizer = load_config(folder), Tokenizer.load(folder)
    refused = Counter[str]()
    frames = collect_frames(
        config.data,
        Preprocessor(policy, tokenizer, unnorm_key=config.unnorm_key),
        config.milestones,
        camera=policy.camera,
        episodes=config.episodes,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        refused=refused,
    )
    counts = {name: int(getattr(frames, f"{name}_n").sum()) for name in ("positive", "success", "validation")}
    print(f"{len(frames)} frames, of them {counts}; refused episodes: {dict(refused) or 'none'}", flush=True)
    model = _starting_model(config, folder, policy, tokenizer)
    config.out.mkdir(parents=True, exist_ok=True)
    fit(model, frames, config)
    measured = measure(model, frames)
    model.save(config.out)
    record = {"kind": model.kind, "config": asdict(config), "frames": counts, "measured": measured}
    (config.out / RECORD).write_text(json.dumps(record, indent=1, default=str))
    said = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
    print(f"held out: {said or 'nothing'}", flush=True)


def labels_of(folder: Path) -> str:
    """The rule of the labels that the model in a folder was trained on.  Raises FileNotFoundError."""
    return _record(folder)["config"]["milestones"]["rule"]


def load_reward_model(
    folder: Path,
    policy: VLAConfig,
    tokenizer: Tokenizer,
    *,
    unnorm_key: str | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> RewardModel:
    """What train_reward_model() left, to judge that policy's observations.  Raises ValueError when it cannot."""
    if _record(folder)["kind"] == ProgressModel.kind:
        model = ProgressModel.load(folder, device=device, dtype=dtype)
        model.check_reads_like(policy, tokenizer, unnorm_key)
        return model
    return _vlm_reward().load(folder, policy, tokenizer, device=device, dtype=dtype)


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder}: not a reward model, {RECORD} is missing")
    return json.loads((folder / RECORD).read_text())


def _starting_model(
    config: RewardModelConfig, folder: Path, policy: VLAConfig, tokenizer: Tokenizer
) -> TrainableRewardModel:
    if not config.vlm:
        return ProgressModel.load(folder, device=config.device, dtype=config.dtype)
    torch.manual_seed(config.seed)
    return _vlm_reward().adapted(
        config.vlm,
        policy,
        tokenizer,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        device=config.device,
        dtype=config.dtype,
    )


def _vlm_reward() -> type[VlmReward]:
    try:
        from rl_trainer.vlm_reward import VlmReward  # only this kind needs transformers and peft
    except ImportError as error:
        raise ValueError(f"a vlm needs more packages: pip install 'vla-rl[vlm]' ({error})") from error
    return VlmReward


def fit(model: TrainableRewardModel, frames: RewardFrames, config: RewardModelConfig) -> None:
    """Trains on the frames that are not held out.  Raises ValueError when they lack one of the answers."""
    rows_n = np.flatnonzero(~frames.validation_n)
    positive_n, target_n, state_std = frames.positive_n[rows_n], frames.target_n[rows_n], frames.state_std
    if not positive_n.any() or positive_n.all():
        raise ValueError(f"frames must be of both kinds, got {int(positive_n.sum())} positive of {len(positive_n)}")
    optimizer = Optimizer(model.parameters(), weight_decay=config.weight_decay, clip_norm=config.clip_norm, ema=0)
    curve, losses = Curve(config.out), list[float]()
    for step in range(config.steps):
        batch = balanced_rows(positive_n, config.batch_size, seed=config.seed, step=step)
        drawn = draw(config.augmentation, config.batch_size, len(state_std), seed=config.seed, step=step)
        seen = [frames.observations[row] for row in rows_n[batch]]
        loss = model.loss(augmented(seen, state_std, config.augmentation.state_noise, drawn), target_n[batch])
        loss.backward()
        optimizer.collect_gradients()
        rate = learning_rate(
            step / config.steps, step, peak=config.learning_rate, final=0.0, warmup_steps=config.warmup_steps
        )
        norm = optimizer.step(rate)
        losses.append(float(loss.detach()))
        if (step + 1) % config.log_steps == 0:
            mean = float(np.mean(losses))
            curve.add(step + 1, loss=mean, learning_rate=rate, gradient_norm=norm)
            print(f"step {step + 1} of {config.steps}  loss {mean:.4f}  rate {rate:.1e}", flush=True)
            losses = []
    curve.close()


def measure(model: RewardModel, frames: RewardFrames) -> dict[str, float]:
    """On held-out episodes: how well frames are ranked, over all and over the successful; empty without any."""
    held = np.flatnonzero(frames.validation_n).tolist()
    if not held:
        return {}
    predicted_n = model.predict([frames.observations[row] for row in held])
    positive_n, success_n = frames.positive_n[held], frames.success_n[held]
    measured = {
        "auc": auc(predicted_n, positive_n),
        "auc_within_success": auc(predicted_n[success_n], positive_n[success_n]),
        "positive": float(predicted_n[positive_n].mean()) if positive_n.any() else float("nan"),
        "negative": float(predicted_n[~positive_n].mean()) if not positive_n.all() else float("nan"),
    }
    return {name: value for name, value in measured.items() if np.isfinite(value)}


def auc(predicted_n: np.ndarray, positive_n: np.ndarray) -> float:
    """How probably a positive is ranked above a negative, ties counting half (Mann-Whitney); nan without both."""
    positives, negatives = int(positive_n.sum()), int((~positive_n).sum())
    if not positives or not negatives:
        return float("nan")
    ranks: Any = rankdata(predicted_n)
    return float((ranks[positive_n].sum() - positives * (positives + 1) / 2) / (positives * negatives))
