"""Captured passes over fixed memory: every repetition answers for what it was given, not for what was there before.

Where there is CUDA the same laws hold of real graphs.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from policy_server.vla.adapters import Adapter, Adapters
from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.decoding import decode
from policy_server.vla.derived import with_tensors
from policy_server.vla.graphs import PassGraphs
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput, Laps, Pass, PassShape
from tests.vla.requests import random_requests
from tests.vla.test_adapters import learner
from tests.vla.test_derived import HEAD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [PassShape(batch=size, prompt_length=48) for size in (1, 2, 4)]


@pytest.fixture
def base(nano: Checkpoint) -> VLA:
    model = copy.deepcopy(nano.model).to(DEVICE)
    model.language_model.fuse()
    return model


@pytest.fixture
def adapters(base: VLA, tmp_path: Path) -> list[Adapter]:
    home = Adapters(base)
    for seed in range(3):
        learner(base, tmp_path / str(seed), seed=seed)
    return [home.load(tmp_path / str(seed)) for seed in range(3)]


def graphs_of(base: VLA, nano: Checkpoint, adapter: Adapter | None = None, **options) -> PassGraphs:
    (example,) = random_requests(nano, 1, np.random.default_rng(9), greedy=0.0)
    graphs = PassGraphs(base, SHAPES, example, **options)
    if adapter is not None:
        graphs.admit(adapter)
    return graphs


def check(base: VLA, graphs: PassGraphs, requests: list[DecodeInput]) -> None:
    """The captured pass answers as an eager one."""
    assert graphs.run(requests, Laps(base.device)) is not None
    captured, eager = decode(base, requests, graphs=graphs), decode(base, requests)
    assert np.array_equal(captured.token_ids_BN, eager.token_ids_BN)
    np.testing.assert_allclose(captured.token_logprobs_BN, eager.token_logprobs_BN, atol=5e-5)
    assert captured.token_ids_BN.shape == (len(requests), base.config.action_tokens)


def test_each_repetition_answers_its_own_batch_of_any_size(base, nano, rng):
    graphs = graphs_of(base, nano)
    for size in (4, 1, 3, 2, 4):
        check(base, graphs, random_requests(nano, size, rng))


def test_adapters_change_from_pass_to_pass(base, nano, adapters, rng):
    graphs = graphs_of(base, nano, adapters[0])
    for row in ([0, 1, 2, None], [2, 2, 2], [1, 1, 1], [None, 0], [1], [None, None], [2, 1]):
        owners = [None if index is None else adapters[index] for index in row]
        requests = random_requests(nano, len(row), rng)
        check(base, graphs, [replace(one, adapter=owner) for one, owner in zip(requests, owners, strict=True)])


def test_what_fits_no_captured_pass_is_decoded_all_the_same(base, nano, adapters, tmp_path, rng):
    learner(base, tmp_path / "rank", rank=5)
    of_another_rank = adapters[0].home.load(tmp_path / "rank")
    graphs = graphs_of(base, nano, adapters[0])
    few = [PassShape(batch=4, prompt_length=8)]
    (example,) = random_requests(nano, 1, rng, greedy=0.0)
    short = replace(example, prepared=replace(example.prepared, input_ids=example.prepared.input_ids[:4]))
    unfit = {
        "too many": (graphs, random_requests(nano, 5, rng)),
        "too long": (PassGraphs(base, few, short), random_requests(nano, 2, rng)),
        "of no layout that was admitted": (
            graphs,
            [replace(one, adapter=of_another_rank) for one in random_requests(nano, 2, rng)],
        ),
    }
    for graphs, requests in unfit.values():
        assert graphs.run(requests, Laps(base.device)) is None
        captured, eager = decode(base, requests, graphs=graphs), decode(base, requests)
        assert np.array_equal(captured.token_ids_BN, eager.token_ids_BN)


def test_what_is_dropped_is_gone_at_once(base, nano, adapters, tmp_path, rng, monkeypatch):
    """Without waiting for a collector of cycles: a pass with its caches, a model, what a layout's last adapter used."""
    passes: list[ref[Pass]] = []
    begin = Pass.__init__
    monkeypatch.setattr(Pass, "__init__", lambda self, *args: (passes.append(ref(self)), begin(self, *args))[1])
    gc.collect()
    gc.disable()
    try:
        (tmp_path / "whole").mkdir()
        save_file({HEAD: base.state_dict()[HEAD].cpu() + 0.25}, tmp_path / "whole" / "model.safetensors")
        derived = with_tensors(base, tmp_path / "whole")
        decode(derived, random_requests(nano, 2, rng))
        model = ref(derived)
        del derived
        assert model() is None and len(passes) == 1 and passes[0]() is None

        learner(base, tmp_path / "rank", rank=5)
        last = adapters[0].home.load(tmp_path / "rank")
        graphs = graphs_of(base, nano, last)
        requests = [replace(one, adapter=last) for one in random_requests(nano, 2, rng)]
        decode(base, requests, graphs=graphs), decode(base, requests)
        family = ref(graphs._adapted[last.layout][True])
        del last, requests
        assert not graphs._adapted and family() is None
    finally:
        gc.enable()


def test_row_by_row_a_pass_is_bitwise_the_same_for_any_neighbours(base, nano, adapters, rng):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (example,) = random_requests(nano, 1, rng, greedy=0.0)
    graphs = PassGraphs(base, SHAPES[-1:], example, row_by_row=True)
    graphs.admit(adapters[0])
    subject, *others = random_requests(nano, 7, rng, greedy=0.0)
    subject = replace(subject, adapter=adapters[1])
    try:
        answers = set()
        for owners in ([1, 1, 1], [0, 2, None], [2, 2, 0]):
            neighbours = [
                replace(one, adapter=None if owner is None else adapters[owner])
                for one, owner in zip(others, owners, strict=False)
            ]
            decoded = decode(base, [subject, *neighbours], SHAPES[-1], graphs=graphs)
            answers.add((decoded.token_ids_BN[0].tobytes(), decoded.token_logprobs_BN[0].tobytes()))
        assert len(answers) == 1
    finally:
        torch.set_num_threads(threads)


def test_attention_is_not_left_to_cudnn():
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it fails with masks, see llama.py
