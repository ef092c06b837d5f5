"""Models the tests of the VLA share: nano's architecture with random weights, and the reference checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from policy_server.compare import load_reference
from policy_server.vla.checkpoint import Checkpoint, fingerprint
from policy_server.vla.config import nano_config
from policy_server.vla.model import VLA
from policy_server.vla.tokenizer import build_tokenizer

TESTS = Path(__file__).parents[1]
FULL_REFERENCE = TESTS.parent.parent / "shared" / "openvla_golden"

INSTRUCTIONS = (
    "pick up the milk and place it in the basket",
    "open the middle drawer of the cabinet",
    "turn on the stove",
    "push",
)
STATISTICS = {
    "nano": {
        "action": {"q01": [-0.9] * 6 + [0.0], "q99": [0.8] * 6 + [1.0], "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The full reference where it lies beside the checkout, else the committed part of it."""
    return FULL_REFERENCE if FULL_REFERENCE.is_dir() else TESTS / "golden"


@pytest.fixture(scope="session")
def reference(reference_folder: Path) -> Checkpoint:
    """OpenVLA in miniature: two towers, K = 1."""
    return load_reference(reference_folder / "checkpoint_56px_bf16_sharded")


@pytest.fixture(scope="session")
def nano() -> Checkpoint:
    """The embedded default's architecture: one tower, a state token; K = 2 for short tests."""
    model = VLA.initialise(nano_config(STATISTICS, chunk_length=2), seed=3).eval()
    # Spread the logits as training would, so that answers depend on what was asked.
    model.language_model.lm_head.weight.data.mul_(15)
    return Checkpoint(
        path=Path(),
        model=model,
        tokenizer=build_tokenizer(INSTRUCTIONS, size=512),
        fingerprint=fingerprint(model.state_dict()),
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
