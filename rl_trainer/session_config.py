"""What a session is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from protos import session_pb2
from protos.channel import Credentials
from rl_trainer.curriculum import CurriculumConfig
from rl_trainer.launch import RunServer
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.loss import LossConfig
from rl_trainer.shaping import ShapingConfig


@dataclass(frozen=True, kw_only=True)
class At:
    """Where the server is, and what it is shown."""

    server: str = "localhost:50051"
    """HOST:PORT of the policy server"""
    admin: str = "localhost:50052"
    """HOST:PORT of its admin service"""
    credentials: tyro.conf.OmitArgPrefixes[Credentials] = field(default_factory=Credentials)
    admin_token_file: Path | None = None
    """file with the token for the admin service, which is shown to no other"""

    @property
    def run_server(self) -> RunServer:
        return RunServer.given(self.server, self.admin, self.credentials, self.admin_token_file)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a new version is promoted and when it is rolled back (policy_server/gate.py); what is not given is the
    server's own choice, in brackets"""

    margin: float | None = None
    """how much less often a candidate may succeed and yet be promoted, in success probability (0.1)"""
    promote_error: float | None = None
    """probability that one is promoted which succeeds less often by the margin or more, at most (0.05)"""
    rollback_error: float | None = None
    """probability that one which succeeds as often is rolled back for its failures, at most (0.1)"""
    trouble_error: float | None = None
    """probability that one is rolled back for holds, clips and errors which has no more of them, at most (0.05)"""
    trouble_rise: float | None = None
    """smallest rise that counts, in the share of ticks held or clipped, or of episodes that end as errors (0.1)"""
    share: float | None = None
    """of the session's episodes that a candidate gets (0.5)"""
    max_episodes: int | None = None
    """of a candidate; then it is dropped (60)"""
    envelope: float | None = None
    """largest distance of its actions from the live one's at which robots may see it, in parts of their range (0.25)"""

    @property
    def rule(self) -> session_pb2.GateRule:
        return session_pb2.GateRule(**{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """Improves the policy on the robots that join: `python -m robot_client run --session ID`."""

    at: tyro.conf.OmitArgPrefixes[At] = field(default_factory=At)
    out: Path
    """where its state, curve and adapters go"""
    task: str = ""
    """what the robots do, in words, for people"""
    session: str = ""
    """its id at the server; none given: the name of --out"""
    resume: bool = False
    """go on from --out"""
    model: str = "nano"
    """what the server serves: nano, or a checkpoint's folder or hub id"""
    unnorm_key: str | None = None
    """its entry of norm_stats; needed when it has several"""
    adapter: Path | None = None
    """of --base-version, where that is an adapter"""
    base_version: int = 0
    """the version to begin with"""
    reward: Literal["outcome", "process", "both"] = "outcome"
    """success, progress as the reward model sees it, or success with progress in between"""
    reward_model: Path | None = None
    """what `python -m rl_trainer reward-model` has left; for process and both"""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    budget_episodes: int = 400
    """that did not end as errors; then the trainer ends, and the session and its robots go on"""
    budget_minutes: float | None = None
    """wall time, pauses too; with episodes, whichever comes first"""
    update_every: int = 32
    """new episodes that an update waits for"""
    reuse: int = 1
    """updates that an episode may have part in"""
    offer_every: int = 6
    """updates that a candidate is ahead of the one before: a trial takes many episodes, most where little differs"""
    lesson_capacity: int = 4096
    """decisions of each kind that are remembered, to be imitated"""
    temperature: float = 0.5
    """of the session's episodes"""
    noise_correlation: float = 0.9
    """of their noise, between the ticks of a chunk, in [0, 1): noise of each tick's own averages out along the chunk"""
    gate: GateConfig = field(default_factory=GateConfig)
    suite: str = ""
    """also give workers (`python -m sim worker`) practice of this suite; none given: only robots play"""
    tasks: tuple[int, ...] = ()
    """of the suite; none given: all"""
    split: str = "train"
    """initial states to practise on"""
    ahead: int = 32
    """rollouts that wait for workers, or are with them"""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            learning_rate=7e-4,
            warm_up=3,
            epochs=4,
            target_kl=0.3,
            success_weight=0.1,
            # No intervention_weight: three sessions with an expert's ended below the three without (FIGURES.md).
            # Who played may be some updates behind; a critic that begins at 0 has far to go.
            loss=LossConfig(behaviour_cap=2.0, value_clip=0.0, reference_weight=0.02),
        )
    )
    critic: Path | None = None
    """state.safetensors of a run of `train` on the same model, to begin with its critic: --learner.warm-up 1 will do"""
    lora_rank: int = 16
    """of a fresh adapter"""
    lora_alpha: float = 32.0
    freeze_vision: bool = False
    """no adapter in vision towers and projector"""
    threads: int = 1
    """torch threads"""
    device: str = "cpu"
    """cpu, cuda, or auto (CUDA where there is one)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the base's weights; adapter and masters are float32 always"""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("update_every", "reuse", "offer_every", "lesson_capacity", "ahead", "lora_rank", "threads")
        for name in ("budget_episodes", *sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes must be above 0, or none for no limit, got {self.budget_minutes}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, since greedy choices teach nothing, got {self.temperature}")
        if (self.reward == "outcome") != (self.reward_model is None):
            raise ValueError(f"reward_model is for the rewards process and both, got {self.reward!r}")
        self.shaping.require_model(self.reward_model)
        if self.reward != "outcome" and self.shaping.rule == "none":
            raise ValueError(f"shaping.rule must be potential or paper for the reward {self.reward!r}, got 'none'")
        if (self.adapter is None) != (self.base_version == 0):
            raise ValueError("adapter and base_version are given together: the trainer must hold what the server does")
        fresh = (SessionConfig.lora_rank, SessionConfig.lora_alpha)
        if self.adapter is not None and (self.lora_rank, self.lora_alpha) != fresh:
            raise ValueError("lora_rank and lora_alpha are of a fresh adapter: --adapter has its own")
        if self.learner.anneal:
            raise ValueError(
                f"anneal must be 0 in a session, which goes on as long as it may, got {self.learner.anneal}"
            )
        if self.learner.average:
            raise ValueError(
                f"average must be 0 in a session, whose gate tries the weights, got {self.learner.average}"
            )

    @property
    def session_id(self) -> str:
        return self.session or self.out.name

    @property
    def request(self) -> session_pb2.StartSessionRequest:
        return session_pb2.StartSessionRequest(
            session_id=self.session_id,
            task=self.task,
            base_version=self.base_version,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            rule=self.gate.rule,
        )
