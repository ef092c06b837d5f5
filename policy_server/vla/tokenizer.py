"""Text to ids, with the tokenizer.json that lies in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

FILE = "tokenizer.json"
EMPTY = "▁"
"""Llama's empty token.  OpenVLA was trained with it at the end of every prompt."""
BOS, PAD = "<s>", "<pad>"


class Tokenizer:
    """A checkpoint's tokenizer, and OpenVLA's rule for the end of a prompt."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.empty_id = backend.token_to_id(EMPTY)
        """None when the vocabulary has no such token: then there is no rule."""

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_file(str(Path(folder) / FILE)))

    def save(self, folder: Path | str) -> None:
        self.backend.save(str(Path(folder) / FILE))

    def encode(self, text: str) -> np.ndarray:
        """int64 ids, BOS first, without the empty token."""
        return np.array(self.backend.encode(text).ids, np.int64)

    def encode_prompt(self, text: str) -> np.ndarray:
        """int64 ids of a prompt that actions follow: the empty token is appended unless it is there already."""
        ids = self.encode(text)
        if self.empty_id is None or ids[-1] == self.empty_id:
            return ids
        return np.append(ids, self.empty_id)


def build_tokenizer(texts: Iterable[str], *, size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` entries, learned from these texts; it encodes any other text too."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<unk>", BOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return Tokenizer(backend)
