"""The VLA: an image, an instruction and perhaps a state in; logits of the action tokens out.

A row of a batch is BOS, image tokens, state token, the rest of the prompt, padding, action tokens.  The padding is in
the memory only: action tokens take the positions right after their own row's prompt, and nothing may look at a pad.

Shapes: B batch, L prompt tokens (padded), C context tokens (image and state), M = L + C slots of a prompt, N action
tokens, V action bins, D width, S state numbers or image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from policy_server.vla.config import VLAConfig
from policy_server.vla.llama import LanguageModel
from policy_server.vla.preprocessing import Prepared
from policy_server.vla.vision import MLP, Projector, VisionBackbone, merge_patches


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a batch of decisions is conditioned on."""

    images_BHW3: torch.Tensor
    """uint8, at the model's size"""
    input_ids_BL: torch.Tensor
    """int64, BOS first, padded on the right with any id"""
    lengths_B: torch.Tensor
    """int64: ids of each row that are no padding"""
    states_BS: torch.Tensor | None
    """float32, normalised; None for a model without state"""
    shortest: int = 1
    """ids of the shortest row, or fewer: known here, so that nobody has to wait for the device to say"""
    image_tokens_BCD: torch.Tensor | None = None
    """what VLA.image_tokens() gives for the images, where somebody knows it already"""

    def to(self, device: torch.device) -> Prompts:
        known = self.image_tokens_BCD
        return replace(
            self,
            images_BHW3=moved(self.images_BHW3, device),
            input_ids_BL=moved(self.input_ids_BL, device),
            lengths_B=moved(self.lengths_B, device),
            states_BS=None if self.states_BS is None else moved(self.states_BS, device),
            image_tokens_BCD=None if known is None else moved(known, device),
        )


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; from the CPU to a GPU the copy is under way when this returns."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(prepared: Sequence[Prepared], *, prompt_length: int | None = None) -> Prompts:
    """The batch, padded to the longest prompt or to prompt_length."""
    lengths = [len(p.input_ids) for p in prepared]
    input_ids = np.zeros((len(prepared), prompt_length or max(lengths)), np.int64)
    for row, p in zip(input_ids, prepared, strict=True):
        row[: len(p.input_ids)] = p.input_ids
    states = [p.state for p in prepared if p.state is not None]
    return Prompts(
        images_BHW3=torch.from_numpy(np.stack([p.image for p in prepared])),
        input_ids_BL=torch.from_numpy(input_ids),
        lengths_B=torch.tensor(lengths),
        states_BS=torch.from_numpy(np.stack(states)) if states else None,
        shortest=min(lengths),
    )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the model thinks of given action tokens."""

    logits_BNV: torch.Tensor
    """float32, over the action tokens alone: column c is token action_begin + c"""
    hidden_BD: torch.Tensor
    """the last hidden state at the last prompt token, which has seen all but the actions"""


class VLA(nn.Module):
    """One architecture from nano to OpenVLA-7B, with the published parameter names."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: VLAConfig):
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(config.vision_width, width, towers=len(config.towers))
        if config.state_dim:
            self.state_projector = MLP(config.state_dim, width, width)
        self.language_model = LanguageModel(config.llm)
        # Real numbers even when the model is built on the meta device.
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor([getattr(tower, name) for tower in config.towers], device="cpu")
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    @classmethod
    def initialise(cls, config: VLAConfig, seed: int = 0) -> VLA:
        """A fresh model to be trained from scratch; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
            _initialise(model)
        return model

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def action_head(self) -> torch.Tensor:
        """(V, D): the rows of lm_head that belong to action tokens."""
        begin = self.config.action_begin
        return self.language_model.lm_head.weight[begin : begin + self.config.n_action_bins]

    def pixel_values(self, images_BHW3: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3 * towers, S, S) of uint8 images, in the model's dtype."""
        pixels = images_BHW3.permute(0, 3, 1, 2).float() / 255
        pixels = pixels.repeat(1, len(self.config.towers), 1, 1)
        return ((pixels - self.pixel_mean) / self.pixel_std).to(self.language_model.lm_head.weight.dtype)

    @property
    def vision(self) -> tuple[nn.Module, ...]:
        """What makes image tokens of images."""
        return self.vision_backbone, self.projector

    @property
    def vision_is_frozen(self) -> bool:
        """Training leaves image tokens as they are."""
        return not any(parameter.requires_grad for part in self.vision for parameter in part.parameters())

    def freeze_vision(self) -> None:
        for part in self.vision:
            part.requires_grad_(False)

    def recompute_blocks(self, recompute: bool = True) -> None:
        """Gradients cost a second forward pass, and the memory of one block at a time."""
        for module in (*self.vision_backbone.towers, self.language_model.model):
            module.recompute = recompute

    def image_tokens(self, images_BHW3: torch.Tensor) -> torch.Tensor:
        """(B, image tokens, D): the towers' features, projected."""
        features = self.vision_backbone(self.pixel_values(images_BHW3))
        return self.projector(merge_patches(features, self.config.patch_merge))

    def context(self, prompts: Prompts) -> torch.Tensor:
        """(B, C, D): image tokens, then the state token."""
        tokens = prompts.image_tokens_BCD
        if tokens is None:
            tokens = self.image_tokens(prompts.images_BHW3)
        if prompts.states_BS is None:
            return tokens
        state = self.state_projector(prompts.states_BS.to(tokens.dtype)[:, None])
        return torch.cat((tokens, state), 1)

    def embed_prompts(self, input_ids_BL: torch.Tensor, context_BCD: torch.Tensor) -> torch.Tensor:
        """(B, M, D): BOS, context, rest of the prompt, padding."""
        embedded = self.language_model.model.embed_tokens(input_ids_BL)
        return torch.cat((embedded[:, :1], context_BCD, embedded[:, 1:]), 1)

    def hidden(self, prompts: Prompts, action_ids_BN: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Last hidden states (B, M + N - first, D) of prompts followed by any number of action tokens."""
        x = self.embed_prompts(prompts.input_ids_BL, self.context(prompts))
        layout = Layout.of(prompts, self.config.num_context_tokens, action_ids_BN.shape[1])
        x = torch.cat((x, self.language_model.model.embed_tokens(action_ids_BN)), 1)
        rotation = self.language_model.rotation(layout.positions)
        return self.language_model.model(x, rotation, layout.mask(x.dtype), first=first)

    def read(self, prompts: Prompts) -> torch.Tensor:
        """(B, D): Scores.hidden_BD, by a pass over the prompts alone."""
        return self._read(prompts, prompts.input_ids_BL[:, :0])[0]

    def _read(self, prompts: Prompts, action_ids_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states at the last prompt token (B, D), and at the action tokens (B, N, D)."""
        last_B = prompts.lengths_B + self.config.num_context_tokens - 1
        first = prompts.shortest + self.config.num_context_tokens - 1  # nobody reads what comes before
        hidden = self.hidden(prompts, action_ids_BN, first)
        slots = prompts.input_ids_BL.shape[1] + self.config.num_context_tokens
        return hidden[torch.arange(len(last_B), device=last_B.device), last_B - first], hidden[:, slots - first :]

    def forward(self, prompts: Prompts, action_ids_BN: torch.Tensor) -> Scores:
        """Scores every action token given those before it (teacher forcing)."""
        hidden_BD, hidden_BND = self._read(prompts, action_ids_BN[:, :-1])
        before_BND = torch.cat((hidden_BD[:, None], hidden_BND), 1)
        logits = functional.linear(before_BND, self.action_head).float()
        return Scores(logits_BNV=logits, hidden_BD=hidden_BD)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of a batch lie: slots in the memory, positions in their sequences, and what may look at what."""

    lengths_B: torch.Tensor
    """int64: tokens of each row's prompt, context included"""
    prompt_slots: int
    """M"""
    action_slots: int

    @classmethod
    def of(cls, prompts: Prompts, context_tokens: int, action_slots: int) -> Layout:
        slots = prompts.input_ids_BL.shape[1] + context_tokens
        return cls(lengths_B=prompts.lengths_B + context_tokens, prompt_slots=slots, action_slots=action_slots)

    def _slots(self) -> torch.Tensor:
        return torch.arange(self.prompt_slots + self.action_slots, device=self.lengths_B.device)

    @property
    def positions(self) -> torch.Tensor:
        """int64 (B, M + N): a prompt's slot number; from there on, counted from the end of the row's own prompt."""
        slots = self._slots()
        shift_B1 = (self.lengths_B - self.prompt_slots)[:, None]
        return slots + torch.where(slots >= self.prompt_slots, shift_B1, 0)

    def visible(self) -> torch.Tensor:
        """bool (B, M + N): slots that hold a token."""
        slots = self._slots()
        return (slots < self.lengths_B[:, None]) | (slots >= self.prompt_slots)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """(B, 1, M + N, M + N), to be added to attention scores: 0 for tokens at or before the query, else -inf."""
        slots = self._slots()
        allowed = self.visible()[:, None, None] & (slots <= slots[:, None])
        return additive(allowed, dtype)


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where allowed, else -inf."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)


# Last layers of residual branches.
BRANCH_ENDS = ("attn.proj.weight", "mlp.fc2.weight", "o_proj.weight", "down_proj.weight")


def _initialise(model: VLA) -> None:
    """Linear layers keep the variance of their input; residual branches are scaled down by their number."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
        elif name.endswith(("embed_tokens.weight", "pos_embed", "cls_token", "reg_token", "latent")):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("lm_head.weight"):
            nn.init.normal_(parameter, std=0.02)  # every action about equally likely at first
        else:
            in_llm = name.startswith("language_model")
            branches = 2 * (model.config.llm.num_hidden_layers if in_llm else model.config.towers[0].depth)
            fan_in = parameter[0].numel() * (branches if name.endswith(BRANCH_ENDS) else 1)
            nn.init.normal_(parameter, std=fan_in**-0.5)
