"""What several packages test against: a tiny VLA checkpoint and a live policy server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread an operation, here and in every process a test starts: as servers run, and before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from sim import assets
from tests.certificates import Authority
from tests.server.running import RunningServer, serving

# Started in the background, or by nohup: every child would ignore them too.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked libero is skipped without LIBERO; in CI, with the assets at hand, that is a failure."""
    if item.get_closest_marker("libero") is None or assets.has_libero():
        return
    if os.environ.get("CI") and assets.assets_path() is not None:
        pytest.fail("LIBERO's assets are here, but its package is not installed", pytrace=False)
    pytest.skip("LIBERO or its assets are not installed")


@pytest.fixture(scope="session")
def tiny_vla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: the embedded default's architecture, smaller, with random weights; K = 2, A = 7, S = 8."""
    from policy_server.vla.checkpoint import save_checkpoint
    from policy_server.vla.config import LlamaConfig, TowerConfig, nano_config
    from policy_server.vla.model import VLA
    from policy_server.vla.tokenizer import build_tokenizer

    tower = TowerConfig(
        image_size=32, patch_size=16, width=16, depth=1, heads=2, mlp_width=32, output_block=0, final_norm=False
    )
    llm = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=512 + 256,
        max_position_embeddings=64,
    )
    statistics = {
        "tiny": {
            "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
            "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
        }
    }
    names = ("eef_x", "eef_y", "eef_z", "eef_ax", "eef_ay", "eef_az", "finger_left", "finger_right")
    config = nano_config(statistics, towers=(tower,), llm=llm, chunk_length=2, state_names=names)
    folder = tmp_path_factory.mktemp("tiny_vla")
    tokenizer = build_tokenizer(["pick up the black bowl and place it on the plate"], size=512)
    save_checkpoint(folder, VLA.initialise(config, seed=0), tokenizer)
    return folder


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the certificates of this lab."""
    return Authority(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def other_lab(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs those of another."""
    return Authority(tmp_path_factory.mktemp("other_lab"))


@pytest.fixture(scope="session")
def live_server(tiny_vla: Path) -> Iterator[RunningServer]:
    """A policy server on the tiny VLA, on a free port; keeps no episodes."""
    from policy_server.vla.policy import Policy
    from policy_server.vla_model import VlaModel

    model = VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=8)
    with serving(model, max_batch=8, queue=64) as server:
        yield server
