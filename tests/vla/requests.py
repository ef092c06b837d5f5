"""Random requests for a checkpoint."""

from __future__ import annotations

import numpy as np

from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.passes import DecodeInput
from policy_server.vla.preprocessing import Preprocessor

WORDS = ("pick", "place", "open", "the", "red", "bowl", "plate", "drawer", "stove", "on", "top", "of", "and", "it")


def random_requests(
    checkpoint: Checkpoint, count: int, rng: np.random.Generator, *, greedy: float = 0.5
) -> list[DecodeInput]:
    """Random images, states and instructions of 1 to 12 words; part of them greedy, the others at up to T = 2."""
    config = checkpoint.config
    preprocessor = Preprocessor(config, checkpoint.tokenizer, unnorm_key=next(iter(config.norm_stats)))
    requests = []
    for seed in range(count):
        pixels = rng.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8)
        instruction = " ".join(rng.choice(WORDS, rng.integers(1, 13)))
        state = rng.normal(size=config.state_dim) * 0.7
        temperature = 0.0 if rng.random() < greedy else rng.uniform(0.3, 2)
        prepared = preprocessor.prepare(pixels, instruction, state)
        requests.append(DecodeInput(prepared=prepared, temperature=temperature, seed=seed, decision=seed % 5))
    return requests
