"""Behaviour cloning: `python -m rl_trainer sft --data DIR --out DIR --minutes 55 --ranks 2`.

Leaves in --out: `last/` and `best/` (checkpoints in the published layout, or adapters with --lora-rank), curve.png,
curve.jsonl, tensorboard/, and state.safetensors, from which --resume goes on bit for bit.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from policy_server.vla.checkpoint import STATISTICS, load_checkpoint, load_config, local_folder, save_checkpoint
from policy_server.vla.config import NANO_TEXT_VOCABULARY, VLAConfig, nano_config
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla.model import VLA
from policy_server.vla.preprocessing import Preprocessor
from policy_server.vla.tokenizer import Tokenizer, build_tokenizer
from rl_trainer.augment import Augmentation
from rl_trainer.cloner import Cloner
from rl_trainer.demonstrations import Source
from rl_trainer.devices import compute_device
from rl_trainer.imitation import Objective, learning_rate, soft_targets
from rl_trainer.metrics import Curve
from rl_trainer.optimizer import Optimizer
from rl_trainer.plots import Draw, Row, lines, picture, write_png
from rl_trainer.ranks import Ranks, launched, require_own_devices
from rl_trainer.run_state import RunState, differences, keep_record, replaced
from rl_trainer.samples import Samples, collect_samples
from rl_trainer.teacher import relabelled


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Behaviour cloning from demonstrations."""

    data: tuple[Path, ...]
    """episode files, LIBERO HDF5 files, LeRobot data sets (v3.0), or folders of them"""
    out: Path
    """where checkpoints and curves go"""
    init: str = "nano"
    """nano (fresh weights, a tokenizer built from the instructions), or the folder or hub id of a checkpoint"""
    teacher: str = ""
    """nano, or the folder or hub id of a policy, whose greedy actions are the labels: then failed episodes teach too"""
    minutes: float | None = None
    """wall time of the whole run; the schedule follows it"""
    steps: int | None = None
    """optimiser steps; with minutes, whichever comes first"""
    batch_size: int = 32
    """samples of one optimiser step, over all ranks"""
    accumulate: int = 1
    """parts that a rank's share of a batch is cut into, to save memory"""
    ranks: int = 1
    """data-parallel processes on this machine"""
    threads: int = 1
    """torch threads of each rank"""
    learning_rate: float = 1e-3
    """peak"""
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.999
    """moving average of the weights, which is what is validated and saved; 0 for none"""
    bin_smoothing: float = 0.0
    """standard deviation, in bins, of the targets of continuous dimensions; 0 for hard targets"""
    gripper_weight: float = 1.0
    """weight of a gripper token in the loss, others have 1"""
    augmentation: Augmentation = field(default_factory=Augmentation)
    lora_rank: int = 0
    """train an adapter of this rank and leave the base alone; 0 trains everything"""
    lora_alpha: float = 32.0
    chunk_length: int = 8
    """actions of a chunk of a fresh nano; a checkpoint keeps its own"""
    camera: str = "agentview"
    hdf5_stride: int = 4
    """in HDF5 demonstrations, and in others' LeRobot data sets, every n-th tick becomes a sample"""
    drop_no_ops: bool = False
    """leave out HDF5 ticks without motion, as the published OpenVLA data sets do"""
    unnorm_key: str = "demonstrations"
    """the entry of norm_stats to train with; made from the data where the checkpoint has none of this name"""
    validation_fraction: float = 0.05
    """of the episodes, chosen by a hash of their ids"""
    checkpoint_minutes: float = 3.0
    log_seconds: float = 15.0
    resume: bool = False
    """go on from state.safetensors in --out"""
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in the model; masters are float32 always"""
    autocast: bool = False
    """matrix products of the training pass in bfloat16: 1.4 times faster on a CPU with AVX512-BF16, slow on others"""

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("minutes or steps must be given")
        for name in ("minutes", "steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.lora_rank and self.init == "nano":
            raise ValueError("lora_rank must be 0 for a fresh nano: its base would be kept nowhere")
        for name in ("batch_size", "accumulate", "ranks", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        require_own_devices(self.ranks, self.device)
        if not 0 <= self.ema < 1 or not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"ema and validation_fraction must be in [0, 1), got {self.ema}, {self.validation_fraction}"
            )


STATE = "state.safetensors"
# What may differ between a run and its continuation; the data is known by its fingerprint, not by its place.
BUDGET = ("minutes", "steps", "checkpoint_minutes", "log_seconds")
PLACE = ("data", "out", "resume", "ranks", "threads", "accumulate", "device")


def sft(config: SftConfig) -> None:
    """Trains until the budget is spent or SIGTERM, which both end with a checkpoint."""
    started_s = time.monotonic()
    config = replace(config, device=compute_device(config.device))
    _claim(config)
    frames_file = config.out / "frames.u8"
    try:
        samples = _collect(config, frames_file)
        with launched(config.ranks, _train, config, samples, started_s) as ranks:
            _train(ranks, config, samples, started_s)
    finally:
        frames_file.unlink(missing_ok=True)


def _claim(config: SftConfig) -> None:
    """Makes the folder this run's own, or checks that it is the run to resume."""
    record, state = config.out / "sft.json", config.out / STATE
    if config.resume and state.exists():
        if changed := differences(record, config, but=BUDGET + PLACE):
            raise ValueError(f"{config.out} holds another run: {changed}")
    elif config.resume:
        raise FileNotFoundError(f"{state}: there is no run to resume")
    elif state.exists():
        raise ValueError(f"{config.out} already holds a run: add --resume to go on with it, or choose another --out")
    keep_record(record, config)


def _collect(config: SftConfig, frames_file: Path) -> Samples:
    source = Source(
        paths=config.data,
        camera=config.camera,
        hdf5_stride=config.hdf5_stride,
        drop_no_ops=config.drop_no_ops,
        failed=bool(config.teacher),
    )
    images, chunk_length = _image_reader(config)
    refused: Counter[str] = Counter()
    samples = collect_samples(
        source.read(refused),
        frames_file,
        prepare=images.image,
        chunk_length=chunk_length,
        validation_fraction=config.validation_fraction,
    )
    held = int(samples.validation_n.sum())
    print(
        f"{samples.statistics['num_trajectories']} episodes to train on, {len(samples) - held} samples, "
        f"{held} held out, {len(samples.instructions)} instructions; refused: {dict(refused) or 'none'}",
        flush=True,
    )
    return samples


def _image_reader(config: SftConfig) -> tuple[Preprocessor, int]:
    """How the model to be trained reads images, and its chunk length; neither needs the data's statistics."""
    if config.init == "nano":
        unknown = {config.unnorm_key: {"action": {"q01": [0.0], "q99": [0.0]}}}
        vla_config = nano_config(unknown, chunk_length=config.chunk_length, state_dim=0)
        tokenizer = build_tokenizer((), size=NANO_TEXT_VOCABULARY)
    else:
        folder = local_folder(config.init)
        vla_config = replace(load_config(folder), state_dim=0, state_names=())
        if vla_config.camera != config.camera:
            raise ValueError(f"camera must be {vla_config.camera!r}, which {config.init} sees, got {config.camera!r}")
        tokenizer = Tokenizer.load(folder)
    return Preprocessor(vla_config, tokenizer), vla_config.chunk_length


def _starting_model(config: SftConfig, samples: Samples) -> tuple[VLA, Tokenizer]:
    """The same on every rank."""
    if config.init == "nano":
        vla_config = nano_config(
            {config.unnorm_key: samples.statistics},
            chunk_length=config.chunk_length,
            state_dim=samples.state_nS.shape[1],
            state_names=samples.state_names,
            tick_rate_hz=samples.tick_rate_hz,
            camera=config.camera,
        )
        tokenizer = build_tokenizer(samples.instructions, size=NANO_TEXT_VOCABULARY)
        model = VLA.initialise(vla_config, seed=config.seed)
        return model.to(config.device, getattr(torch, config.dtype)), tokenizer
    checkpoint = load_checkpoint(config.init, dtype=config.dtype, device=config.device)
    # Tokens keep their meaning where the checkpoint already has statistics of this name.
    norm_stats = {config.unnorm_key: samples.statistics, **checkpoint.config.norm_stats}
    checkpoint.model.config = replace(checkpoint.config, norm_stats=norm_stats)
    return checkpoint.model, checkpoint.tokenizer


@dataclass
class Clock:
    """How much of the budget is spent, in [0, 1]."""

    started_s: float
    """on the monotonic clock, moved back by what earlier parts of a resumed run used"""
    minutes: float | None
    steps: int | None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_s

    def progress(self, step: int) -> float:
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        by_steps = step / self.steps if self.steps else 0.0
        return max(by_time, by_steps)


def _train(ranks: Ranks, config: SftConfig, samples: Samples, started_s: float) -> None:
    """One rank's whole life."""
    run = Run(ranks, config, samples, started_s)
    while run.goes_on():
        run.take_step()
        if run.checkpoint_due:
            run.checkpoint()
    run.checkpoint()


class Run:
    """One rank of a run.  Rank 0 alone reads the clock, hears signals, and writes."""

    def __init__(self, ranks: Ranks, config: SftConfig, samples: Samples, started_s: float):
        torch.set_num_threads(config.threads)
        self.ranks, self.config = ranks, config
        if config.teacher:
            teacher = load_checkpoint(config.teacher, dtype=config.dtype, device=config.device)
            samples = relabelled(samples, teacher, unnorm_key=config.unnorm_key, ranks=ranks)
        self.model, self.tokenizer = _starting_model(config, samples)
        if config.lora_rank:
            torch.manual_seed(config.seed)
            apply_lora(self.model, rank=config.lora_rank, alpha=config.lora_alpha)
        self.optimizer = Optimizer(
            {name: p for name, p in self.model.named_parameters() if p.requires_grad},
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema=config.ema,
        )
        self.state = RunState(data=samples.fingerprint)
        if config.resume:
            self.state, tensors = RunState.load(config.out / STATE)
            if self.state.data != samples.fingerprint:
                raise ValueError(f"{config.out} was trained on other demonstrations than these; they must be the same")
            self.optimizer.load(tensors)
        self.cloner = Cloner(
            self.model,
            self.tokenizer,
            samples,
            unnorm_key=config.unnorm_key,
            objective=_objective(config, self.model.config),
            augmentation=config.augmentation,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            autocast=config.autocast,
            seed=config.seed,
            ranks=ranks,
        )
        self.clock = Clock(started_s - self.state.seconds, config.minutes, config.steps)
        self.progress, self.checkpoint_due, self.stopping = 0.0, False, False
        self._began_s = self._checkpoint_s = self._log_s = self.clock.seconds
        self._began_at = self.clock.progress(self.state.step)
        self._losses: list[float] = []
        self._curve = Curve(config.out, first_step=self.state.step + 1) if ranks.first else None
        if ranks.first:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def goes_on(self) -> bool:
        """Whether another step is due; all ranks agree."""
        due = self.clock.seconds - self._checkpoint_s > 60 * self.config.checkpoint_minutes
        mine = (self.clock.progress(self.state.step), due, self.stopping)
        self.progress, checkpoint_due, stopping = self.ranks.from_first(*mine)
        self.checkpoint_due = bool(checkpoint_due)
        return self.progress < 1 and not stopping

    def take_step(self) -> None:
        config, step = self.config, self.state.step
        rate = learning_rate(
            self.progress,
            step,
            peak=config.learning_rate,
            final=config.final_learning_rate,
            warmup_steps=config.warmup_steps,
        )
        loss = torch.tensor(self.cloner.gradient(step))
        self.ranks.sum(self.optimizer.collect_gradients())
        norm = self.optimizer.step(rate)
        self._losses.append(float(self.ranks.sum(loss)))
        self.state = replace(self.state, step=step + 1, seconds=self.clock.seconds)
        if self._curve and self.clock.seconds - self._log_s > config.log_seconds:
            self._log(self._curve, rate, norm)

    def _log(self, curve: Curve, rate: float, norm: float) -> None:
        now_s, loss = self.clock.seconds, sum(self._losses) / len(self._losses)
        speed = len(self._losses) * self.cloner.order.batch / (now_s - self._log_s)
        curve.add(self.state.step, loss=loss, learning_rate=rate, gradient_norm=norm, samples_per_s=speed)
        done = self.clock.progress(self.state.step)
        left_s = (now_s - self._began_s) * (1 - done) / max(1e-9, done - self._began_at)
        epoch = self.state.step / self.cloner.order.steps_per_epoch
        print(
            f"step {self.state.step}  epoch {epoch:.2f}  loss {loss:.4f}  rate {rate:.1e}  {speed:.0f} samples/s  "
            f"{100 * done:.0f} %  {left_s / 60:.0f} min left",
            flush=True,
        )
        self._losses, self._log_s = [], now_s

    def checkpoint(self) -> None:
        """Measures on held-out episodes, then writes last/ (and best/), the run's state and the picture."""
        began_s = self.clock.seconds
        with self.optimizer.averaged():
            measured = self.cloner.validate()
            if self._curve:
                self._save("last")
                if measured.get("validation/loss", float("inf")) < self.state.best_loss:
                    self.state = replace(self.state, best_loss=measured["validation/loss"])
                    self._save("best")
        if self._curve:
            self.state.save(self.config.out / STATE, self.optimizer.state())
            self._curve.add(self.state.step, **measured)
            panels = _panels(self._curve.rows, self.model.config.action_dim)
            write_png(self.config.out / "curve.png", picture(panels, size_in=(6, 4)))
            print(
                f"checkpoint at step {self.state.step}: "
                + (", ".join(f"{name} {value:.3f}" for name, value in measured.items()) or "nothing held out"),
                flush=True,
            )
        self._log_s += self.clock.seconds - began_s
        self._checkpoint_s = self.clock.seconds

    def _save(self, name: str) -> None:
        with replaced(self.config.out / name) as folder:
            if self.config.lora_rank:
                save_lora(self.model, folder, base=self.config.init)
                # An adapter has no config.json for what its tokens mean.
                statistics = {self.config.unnorm_key: self.model.config.norm_stats[self.config.unnorm_key]}
                (folder / STATISTICS).write_text(json.dumps(statistics, indent=1))
            else:
                save_checkpoint(folder, self.model, self.tokenizer)


def _objective(config: SftConfig, vla_config: VLAConfig) -> Objective:
    statistics = vla_config.norm_stats[config.unnorm_key]["action"]
    moves_A = torch.tensor(statistics["q99"]) > torch.tensor(statistics["q01"])
    # A dimension that never moves has one token: its neighbours, sampled, would be inputs that training never showed.
    masked_A = torch.tensor(statistics["mask"])
    repeats = vla_config.chunk_length
    return Objective(
        weight_N=torch.where(masked_A, 1.0, config.gripper_weight).repeat(repeats).to(config.device),
        smooth_N=(masked_A & moves_A).repeat(repeats).to(config.device),
        target_VV=soft_targets(vla_config.n_action_bins, config.bin_smoothing).to(config.device)
        if config.bin_smoothing
        else None,
    )


def _panels(rows: Sequence[Row], action_dim: int) -> dict[str, Draw]:
    """What curve.png shows."""
    accuracy, distance = ({f"{name}/{i}": str(i) for i in range(action_dim)} for name in ("accuracy", "l1"))
    return {
        "loss": lines(rows, ["loss", "validation/loss"]),
        "token accuracy by action dimension": lines(rows, accuracy),
        "distance of decoded chunks by action dimension": lines(rows, distance),
        "learning rate": lines(rows, ["learning_rate"]),
    }
