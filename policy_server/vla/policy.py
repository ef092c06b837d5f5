"""A checkpoint ready to act: model, tokenizer, preprocessing and statistics under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.checkpoint import Checkpoint, load_checkpoint, with_statistics
from policy_server.vla.config import ImagePath, VLAConfig
from policy_server.vla.decoding import Decoded, decode
from policy_server.vla.graphs import PassGraphs
from policy_server.vla.lora import load_lora, merge_lora
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput, PassShape
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.quantized import Bits, quantize

DETERMINISTIC_PROMPT_TOKENS = 64
"""Prompts are padded to this many tokens when nothing else is asked for."""


class Policy:
    """`prepare` belongs to the thread of a request, `decode` to the engine's; neither changes the policy.

    The checkpoint's model becomes the policy's own: its weights are laid out for decoding.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        unnorm_key: str | None = None,
        deterministic_batch: int | None = None,
        max_prompt_tokens: int | None = None,
    ):
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.action_tokens = ActionTokens(self.config, unnorm_key)
        self.shape: PassShape | None = None
        """Of every pass, when deterministic."""
        if deterministic_batch is not None:
            max_prompt_tokens = min(max_prompt_tokens or DETERMINISTIC_PROMPT_TOKENS, self.config.max_prompt_tokens)
            self.shape = PassShape(batch=deterministic_batch, prompt_length=max_prompt_tokens)
        self.preprocessor = Preprocessor(
            self.config,
            self.tokenizer,
            unnorm_key=unnorm_key,
            max_prompt_tokens=max_prompt_tokens,
        )
        self.fingerprint = checkpoint.fingerprint
        """Of the base: an adapter does not change it."""
        self.model.language_model.fuse()
        if self.shape is not None and self.model.device.type == "cpu":
            # Shared between threads, a matrix product rounds a row by where it stands in the batch.
            torch.set_num_threads(1)

    @classmethod
    def load(
        cls,
        source: Path | str,
        *,
        adapter: Path | str | None = None,
        merged: bool = True,
        unnorm_key: str | None = None,
        image_path: ImagePath | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        bits: Bits | None = None,
        deterministic_batch: int | None = None,
        max_prompt_tokens: int | None = None,
    ) -> Policy:
        """Of a folder or hub id, with an adapter merged in, then quantised to `bits`.

        merged: False takes nothing of the adapter but its statistics; who asks for it puts the rest beside the base.

        deterministic_batch pads every pass to that many requests and to max_prompt_tokens: an answer is then the same,
        bit for bit, whoever its neighbours are.  Raises CheckpointError, UnknownStatistics and CannotQuantize.
        """
        checkpoint = load_checkpoint(source, dtype=dtype, device="cpu" if bits else device)
        if adapter is not None:
            checkpoint.model.config = with_statistics(checkpoint.config, Path(adapter))
            if merged:
                load_lora(checkpoint.model, adapter)
                merge_lora(checkpoint.model)
        if bits is not None:
            quantize(checkpoint.model, bits, torch.device(device))
        if image_path is not None:
            checkpoint.model.config = replace(checkpoint.config, image_path=image_path)
        return cls(
            checkpoint,
            unnorm_key=unnorm_key,
            deterministic_batch=deterministic_batch,
            max_prompt_tokens=max_prompt_tokens,
        )

    @property
    def config(self) -> VLAConfig:
        return self.model.config

    @property
    def unnorm_key(self) -> str:
        return self.action_tokens.key

    @property
    def max_prompt_tokens(self) -> int:
        return self.preprocessor.max_prompt_tokens

    def prepare(self, image_HW3: np.ndarray, instruction: str, state_S: np.ndarray | None = None) -> Prepared:
        """Raises BadInput."""
        return self.preprocessor.prepare(image_HW3, instruction, state_S)

    def decode(
        self, inputs: Sequence[DecodeInput], *, model: VLA | None = None, graphs: PassGraphs | None = None
    ) -> Decoded:
        """By the policy's own model, or by another one of the same architecture that is laid out for decoding."""
        return decode(model or self.model, inputs, self.shape, graphs=graphs)

    def actions(self, token_ids_BN: np.ndarray) -> np.ndarray:
        """float32 (B, K, A), in the units of the statistics."""
        return self.action_tokens.decode(token_ids_BN).astype(np.float32)
