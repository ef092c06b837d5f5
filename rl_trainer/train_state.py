"""Where an online run stands, in one safetensors file written whole or not at all."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict, ParseDict

from protos import rollout_pb2
from rl_trainer.run_state import load_state, save_state


@dataclass(kw_only=True)
class TrainState:
    """All that is not in the learner's tensors."""

    run: str
    """name of the run at the server, unique"""
    versions: list[int] = field(default_factory=lambda: [0])
    """what the learner's weights were, as the server numbers them; the last is what they are"""
    released: int = 0
    """the policy that is evaluated and, unasked, served: the learner's weights, or their average"""
    cursor: int = 0
    """the last episode that was taken in"""
    seconds: float = 0.0
    """wall time used"""
    counts: Counter[str] = field(default_factory=Counter)
    """environment_steps, decisions, episodes: what the policy has practised"""
    measured: bool = False
    """the released policy was evaluated, where that was due, and its row is in the curve"""
    asked: list[rollout_pb2.Rollout] = field(default_factory=list)
    """rollouts that were enqueued and not taken in"""
    curriculum: dict[str, Any] = field(default_factory=dict)
    alarm: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fresh(cls, name: str) -> TrainState:
        """Of a run that begins."""
        return cls(run=f"{name}-{secrets.token_hex(4)}")

    @property
    def version(self) -> int:
        """The weights that the learner has."""
        return self.versions[-1]

    def age(self, version: int) -> int:
        """Updates since the learner had those weights."""
        return sum(later > version for later in self.versions)

    def save(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        asked = [MessageToDict(rollout) for rollout in self.asked]
        save_state(path, asdict(self) | {"asked": asked, "counts": dict(self.counts)}, tensors)

    @classmethod
    def load(cls, path: Path) -> tuple[TrainState, dict[str, torch.Tensor]]:
        """The state and the learner's tensors."""
        fields, tensors = load_state(path)
        asked = [ParseDict(rollout, rollout_pb2.Rollout()) for rollout in fields.pop("asked")]
        counts = Counter(fields.pop("counts"))
        return cls(asked=asked, counts=counts, **fields), tensors
