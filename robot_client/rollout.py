"""Work and its result: a rollout is what to run, an episode result is what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robot_client.arm import Outcome, Task
from robot_client.cadence import CadenceReport

Purpose = Literal["train", "evaluate", "deploy", "demonstrate"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One episode to run."""

    task: Task
    purpose: Purpose = "deploy"
    temperature: float = 0.0
    """0 is greedy."""
    noise_correlation: float = 0.0
    """How much of the sampling noise the ticks of a chunk share, in [0, 1)."""
    seed: int | None = None
    """The episode's random stream; None lets the server draw one."""
    version: int | None = None
    """Weights to pin the episode to; None is the live version."""
    follow_live: bool = False
    """Change to newer weights during the episode."""
    session_id: str = ""
    """The session that it is practice in; the server then says version, temperature and noise."""
    lease_id: str = ""
    """The lease it runs under (robot_client/leases.py); the server then knows all but the arm."""


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How one episode went."""

    rollout: Rollout
    outcome: Outcome
    """An error is the system's fault: neither a success nor a failure of the policy."""
    terminal: bool
    """True when the task itself ended, False when time ran out."""
    ticks: int
    """Actions and holds."""
    decisions: int
    """Answers received."""
    holds: int
    """Ticks at which the arm held."""
    clips: int
    """Ticks at which the safety gate changed the action."""
    human: int = 0
    """Ticks at which a person drove."""
    episode_id: str
    """Empty when the server never opened it."""
    version: int
    seed: int
    wall_s: float
    answer_s: tuple[float, ...]
    """For each decision, from the first request to its answer."""
    message: str
    """For an error, what went wrong."""
    arm_failed: bool = False
    """For an error, whether it was the arm's: an ArmError."""
    refused: bool = False
    """For an error, whether the server would not open the episode, nor any like it."""
    cadence: CadenceReport | None = None
    """How well the loop kept its rate; None in lockstep."""
