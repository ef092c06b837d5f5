"""How a batch of episodes moves the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rl_trainer.critic import CriticKind
from rl_trainer.loss import LossConfig


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch of episodes moves the weights."""

    advantage: Literal["gae", "grpo", "rloo"] = "gae"
    """gae learns from a critic; the others compare episodes that began alike, and need no critic"""
    gamma: float = 0.998
    """discount of one executed tick"""
    lambda_: float = 0.6
    """of GAE, a decision"""
    learning_rate: float = 5e-5
    anneal: int = 0
    """iterations over which the policy's learning rate falls in a line to 0, the warm-up's among them; 0: it stays"""
    average: float = 0.0
    """what is evaluated and released is an average of the weights that keeps so much of itself a step; 0: no average"""
    critic: CriticKind = "shared"
    """shared reads the policy's hidden state, lora its base through an adapter of the critic's own, separate a copy"""
    critic_rank: int = 16
    """of lora's adapter"""
    critic_learning_rate: float = 1e-3
    critic_epochs: int = 8
    critic_minibatch: int = 64
    """decisions of one optimiser step of the critic's, over all ranks"""
    critic_gradient: bool = False
    """the value loss also shapes the backbone that is shared: once warm, the critic learns in the policy's steps"""
    critic_weight: float = 0.5
    """of that value loss beside the policy's"""
    warm_up: int = 6
    """first iterations, or a session's first updates, in which trajectories teach the critic alone"""
    epochs: int = 2
    minibatch: int = 256
    """decisions of one optimiser step, over all ranks"""
    microbatch: int = 32
    """decisions of one pass with gradients, to save memory; does not change the update"""
    recompute: bool = False
    """drop activations and compute them again for the gradient: a third more time, a fraction of the memory"""
    keep_images: bool = True
    """compute image tokens once an iteration where nothing that makes them is trained; does not change the update"""
    target_kl: float = 0.1
    """no further step in this iteration once a minibatch's divergence from the policy that the iteration found, nats an
    action in the mean, exceeds it; 0: never"""
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    normalise: bool = True
    """gae's advantages to mean 0 and standard deviation 1 over the batch; the others are relative already"""
    success_weight: float = 0.0
    """in sessions, of cloning own successes beside PPO: of the mean negative log-likelihood of a token; 0: not"""
    intervention_weight: float = 0.0
    """likewise of cloning what a person or an expert did instead"""
    lessons: int = 32
    """decisions of each of these kinds in one optimiser step, over all ranks; all there are, where they are fewer"""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.lambda_ <= 1:
            raise ValueError(f"gamma must be in (0, 1] and lambda_ in [0, 1], got {self.gamma} and {self.lambda_}")
        if self.critic != "shared" and (self.critic_gradient or self.advantage != "gae"):
            raise ValueError(
                f"critic must be shared with critic_gradient, and where no critic learns, got {self.critic!r} with"
                f" critic_gradient {self.critic_gradient} and advantage {self.advantage!r}"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")
        sizes = ("minibatch", "microbatch", "critic_minibatch", "lessons")
        for name in ("epochs", *sizes, "critic_epochs", "critic_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        weights = ("critic_weight", "success_weight", "intervention_weight")
        for name in ("learning_rate", "critic_learning_rate", "anneal", "warm_up", "target_kl", *weights):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    @property
    def reward_gamma(self) -> float:
        """The discount with which rewards are shaped: GRPO and RLOO add up a trajectory's without one."""
        return self.gamma if self.advantage == "gae" else 1.0
