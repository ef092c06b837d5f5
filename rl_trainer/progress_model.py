"""A process reward model on the policy's own architecture: is this frame a milestone, "0" or "1"?

The answer is the next token after the policy's prompt.  Of the whole vocabulary only the two answers are compared: the
hidden state at the last prompt token, times their two rows of lm_head.  It reads a frame exactly as the policy does,
so that the frames of a trajectory need not be prepared again.

Shapes: B batch, n observations, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from policy_server.vla.action_tokens import statistics_key
from policy_server.vla.checkpoint import load_checkpoint, save_checkpoint
from policy_server.vla.config import VLAConfig
from policy_server.vla.model import VLA, collate
from policy_server.vla.preprocessing import Prepared
from policy_server.vla.tokenizer import Tokenizer
from rl_trainer.answering_model import ANSWERS, AnsweringModel

READS = ("camera", "image_path", "image_size", "prompt_template", "state_dim", "state_names")
"""What of a model's configuration decides how it reads an observation."""


class ProgressModel(AnsweringModel):
    """The policy's architecture with weights of its own.  Raises ValueError when the tokenizer lacks an answer."""

    kind = "progress"
    model: VLA

    def __init__(self, model: VLA, tokenizer: Tokenizer):
        ids = [tokenizer.backend.token_to_id(answer) for answer in ANSWERS]
        if None in ids:
            raise ValueError(f"the tokenizer must have the tokens {ANSWERS}, got the ids {ids}")
        self.model, self.tokenizer = model, tokenizer
        self._answer_ids = torch.tensor(ids)

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu", dtype: str = "float32") -> ProgressModel:
        """From a folder in the published layout or a hub id: a trained one, or the policy to begin with."""
        checkpoint = load_checkpoint(folder, dtype=dtype, device=device)
        return cls(checkpoint.model, checkpoint.tokenizer)

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.model, self.tokenizer)

    def check_reads_like(self, config: VLAConfig, tokenizer: Tokenizer, unnorm_key: str | None = None) -> None:
        """Raises ValueError when observations prepared for that policy mean something else here."""
        mine = self.model.config
        changed = [name for name in READS if getattr(mine, name) != getattr(config, name)]
        if self.tokenizer.backend.to_str() != tokenizer.backend.to_str():
            changed.append("tokenizer")
        key = statistics_key(config, unnorm_key)
        if config.state_dim and mine.norm_stats.get(key, {}).get("proprio") != config.norm_stats[key]["proprio"]:
            changed.append(f"norm_stats[{key}].proprio")
        if changed:
            raise ValueError(f"the reward model must read observations as the policy does, it differs in {changed}")

    def _logits(self, observations: Sequence[Prepared]) -> torch.Tensor:
        """float32 (B, 2): no, yes."""
        prompts = collate(observations).to(self.model.device)
        first_B1 = torch.full((len(observations), 1), self.model.config.action_begin, device=self.model.device)
        hidden_BD = self.model(prompts, first_B1).hidden_BD
        answers_2D = self.model.language_model.lm_head.weight[self._answer_ids.to(self.model.device)]
        return functional.linear(hidden_BD, answers_2D).float()
