"""The critic: a small head on the hidden state of the last prompt token, which has seen all but the actions.

Whose hidden state:
  shared    the policy's: one pass serves both
  lora      the policy's base, read through an adapter of the critic's own; the policy's adapter is not in it
  separate  a copy of the policy as it began, which trains what the policy trains: the paper's homogeneous value model

Shapes: B batch, D width of the backbone.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from policy_server.vla.lora import apply_lora
from policy_server.vla.model import VLA, Prompts

CriticKind = Literal["shared", "lora", "separate"]


class Critic(nn.Module):
    """D -> hidden -> 1 in float32.  A fresh critic values every state at 0; the same for the same seed.

    backbone: the critic's own; None reads the policy's.
    """

    def __init__(self, width: int, *, hidden: int = 256, seed: int = 0, backbone: VLA | None = None):
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden, self.value = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """float32 (B,) of Scores.hidden_BD."""
        return self.value(nn.functional.silu(self.hidden(hidden_BD.float())))[:, 0]

    def read(self, prompts: Prompts) -> torch.Tensor:
        """float32 (B,), by a pass of the critic's own backbone."""
        assert self.backbone is not None, "a critic that shares the policy's backbone reads its hidden states"
        known = prompts.image_tokens_BCD
        if known is not None:  # they are the policy's, and a constant for the critic
            prompts = replace(prompts, image_tokens_BCD=known.detach() if self.backbone.vision_is_frozen else None)
        return self(self.backbone.read(prompts))

    def trained(self) -> dict[str, nn.Parameter]:
        """What its optimiser moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def critic_of(model: VLA, kind: CriticKind, *, rank: int, seed: int = 0) -> Critic:
    """A fresh critic of a policy, on its device.

    rank: of the adapter through which `lora` reads.  It reads the policy's tensors where they lie now: what moves them
    must do so in place.
    """
    backbone = None
    if kind == "lora":
        backbone = _over_the_same_tensors(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            apply_lora(backbone, rank=rank, alpha=rank, vision=False)
    elif kind == "separate":
        backbone = copy.deepcopy(model)
    return Critic(model.config.llm.hidden_size, seed=seed, backbone=backbone).to(model.device)


def _over_the_same_tensors(model: VLA) -> VLA:
    """The model again, in no further memory; it cannot train what it shares."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)
