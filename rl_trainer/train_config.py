"""What an online run is asked for, and the record of it that its folder holds: a run goes on as it was begun."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from protos.channel import Credentials
from rl_trainer.curriculum import CurriculumConfig
from rl_trainer.launch import RunServer
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.reward_alarm import AlarmConfig
from rl_trainer.run_state import differences, keep_record
from rl_trainer.shaping import ShapingConfig

STATE, RECORD = "state.safetensors", "train.json"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Improves a policy online, by PPO on what workers do with it."""

    out: Path
    """where checkpoints, curves and, for a server of this run's own, episodes go"""
    suite: str = "libero_object"
    """of `python -m sim suites`"""
    tasks: tuple[int, ...] = ()
    """of the suite; none given: all"""
    split: str = "train"
    """initial states to practise on"""
    model: str = "nano"
    """the policy to begin with: nano, or a checkpoint's folder or hub id; a server that is given must serve it"""
    unnorm_key: str | None = None
    """its entry of norm_stats; needed when it has several"""
    server: str = ""
    """HOST:PORT of a running policy server with workers of its own; none given: both are started here"""
    admin: str = ""
    """HOST:PORT of that server's admin service"""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    admin_token_file: Path | None = None
    """file with the token for the admin service, which is shown to no other"""
    iterations: int = 50
    minutes: float | None = None
    """wall time of the whole run; with iterations, whichever comes first"""
    rollouts: int = 64
    """episodes of an iteration"""
    group: int = 1
    """episodes that begin alike, for grpo and rloo; divides rollouts"""
    temperature: float = 0.5
    """of training episodes"""
    noise_correlation: float = 0.9
    """of their noise, between the ticks of a chunk, in [0, 1): exploration that does not average out along the chunk"""
    overlap: bool = False
    """collect the next iteration's episodes, with weights one update old, while this one is learned from"""
    evaluate_every: int = 10
    """iterations between two evaluations, greedy, on states that are never practised on; 0: none"""
    evaluate_split: str = "tune"
    evaluate_states: int = 0
    """of each task, the first so many of the split; 0: all"""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(average=0.995))
    reward_model: Path | None = None
    """what `python -m rl_trainer reward-model` has left; none given: success alone is rewarded"""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    lora_rank: int = 0
    """train an adapter of this rank; 0 trains all weights"""
    lora_alpha: float = 32.0
    freeze_vision: bool = False
    """vision towers and projector stay as they are: image tokens are computed once an iteration"""
    processes: int = 2
    """simulator processes started here"""
    slots: int = 4
    """episodes interleaved in each"""
    render_on_learner: bool = False
    """workers may draw on the learner's GPU too, though there are others"""
    coarse_practice: bool = False
    """training episodes are drawn with simplified meshes, in a third of the time; evaluations never are"""
    deterministic: bool = False
    """the server's answers do not depend on what shares their pass; with no overlap, a run can be repeated"""
    server_sleeps: bool = False
    """the server's weights leave its device while this run learns: for one GPU that both share"""
    ranks: int = 1
    """data-parallel processes of the learner"""
    threads: int = 1
    """torch threads of each"""
    device: str = "cpu"
    """of the learner: cpu, cuda, or auto (CUDA where there is one)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights in the model; masters are float32 always"""
    seed: int = 0
    resume: bool = False
    """go on from --out"""

    def __post_init__(self) -> None:
        for name in ("iterations", "rollouts", "group", "ranks", "threads", "processes", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "evaluate_states", "lora_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.rollouts % self.group:
            raise ValueError(f"rollouts must be whole groups of {self.group}, got {self.rollouts}")
        if self.learner.success_weight or self.learner.intervention_weight:
            raise ValueError("success_weight and intervention_weight must be 0 here: lessons are a session's")
        if self.learner.advantage != "gae" and self.group < 2:
            raise ValueError(f"{self.learner.advantage} compares episodes that begin alike: group must be >= 2, got 1")
        if 0 < self.learner.anneal < self.iterations:
            raise ValueError(
                "learner.anneal must be 0 or >= iterations, since nothing is learned at a rate of 0, got"
                f" {self.learner.anneal} with {self.iterations} iterations"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, or none for no limit, got {self.minutes}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 <= self.noise_correlation < 1:
            raise ValueError(f"noise_correlation must be in [0, 1), got {self.noise_correlation}")
        if self.server_sleeps and self.overlap:
            raise ValueError("a server that sleeps while the run learns can collect nothing then: leave out overlap")
        if bool(self.server) != bool(self.admin):
            raise ValueError(f"server and admin are given together, got {self.server!r} and {self.admin!r}")
        if not self.server and (self.credentials != Credentials() or self.admin_token_file is not None):
            raise ValueError("tokens and certificates are for a server that is given, got none")
        for name in GIVEN_THERE if self.server else ():
            if getattr(self, name) != getattr(TrainConfig, name):
                raise ValueError(f"{name} is for a server and workers started here: say it to those at {self.server}")
        self.shaping.require_model(self.reward_model)
        if not self.server and self.device not in ("cpu", "cuda", "auto"):
            raise ValueError(f"device must be cpu, cuda or auto where the run is placed, got {self.device!r}")

    @property
    def given_server(self) -> RunServer:
        """The running server that was asked for."""
        return RunServer.given(self.server, self.admin, self.credentials, self.admin_token_file)


GIVEN_THERE = ("processes", "slots", "render_on_learner", "coarse_practice", "deterministic")
"""What a run says to a server and workers of its own."""
BUDGET = ("iterations", "minutes", "resume", "out", "evaluate_every", "processes", "slots", "server", "admin")
"""What may differ between a run and its continuation."""
UNSAID = ("credentials", "admin_token_file")
"""What a run's record, and its report, say nothing of."""


def claim(config: TrainConfig) -> TrainConfig:
    """Makes the folder this run's own, or checks that it is the run to resume; gives what to do."""
    record = config.out / RECORD
    begun = (config.out / STATE).exists()  # ended before its first checkpoint, a run has asked for nothing yet
    if config.resume and not record.exists():
        raise FileNotFoundError(f"{record}: there is no run to resume")
    if begun and config.resume and (changed := differences(record, config, but=BUDGET)):
        raise ValueError(f"{config.out} holds another run: {changed}")
    if begun and not config.resume:
        raise ValueError(f"{config.out} already holds a run: add --resume to go on with it, or choose another --out")
    keep_record(record, config, unsaid=UNSAID)
    return replace(config, resume=begun)
