"""What a run takes, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.config import TOWERS, LlamaConfig, VLAConfig, nano_config
from rl_trainer.costs import (
    GIB,
    MASTER_BYTES,
    Host,
    Need,
    Phases,
    Prices,
    Schedule,
    Shapes,
    batch_bytes,
    collecting_s,
    disk_bytes,
    iteration_s,
    learner_bytes,
    phases,
    refusal,
    requests_in_a_pass,
    run_s,
    saved_bytes,
    server_bytes,
    shapes_of,
)

HOST = Host(cores=2, processes=2, slots=4)
PRICES = Prices(
    tick_s=0.005,
    practice_frame_s=0.06,
    evaluation_frame_s=0.16,
    reset_s=0.2,
    build_s=3.0,
    pass_s=0.12,
    request_s=0.01,
    prepare_s=0.006,
    slowdown=1.0,
    warm_decision_s=0.01,
    decision_s=0.03,
    publish_s=0.5,
    load_s=1.0,
)
SCHEDULE = Schedule(
    iterations=5, rollouts=10, warm_up=2, evaluations=3, evaluated=10, ticks=80.0, chunk=8, tasks=2, overlap=False
)
PHASES = Phases(collect_s=60.0, learn_s=30.0, warm_learn_s=12.0, publish_s=2.0, evaluate_s=100.0, start_s=7.0)
STATISTICS = {"x": {name: {"q01": [-1.0] * 7, "q99": [1.0] * 7} for name in ("action", "proprio")}}


def openvla_7b() -> VLAConfig:
    return VLAConfig(towers=tuple(TOWERS.values()), tower_names=tuple(TOWERS), llm=LlamaConfig(), norm_stats=STATISTICS)


@pytest.mark.parametrize(
    ("between_s", "pass_s", "requests"),
    [
        (0.1, 0.12, 3.0),  # b = 2 (0.12 + 0.01 b) / 0.1
        (0.1, 0.24, 6.0),  # more than come while one waits
        (0.1, 0.04, 3.0),  # the pass is over before the next request comes, who waits 100 ms: 1 + 2 * 0.1 / 0.1
        (0.04, 0.12, 8.0),  # 12 would come, but 8 episodes are under way
        (0.02, 0.12, 8.0),  # the server cannot keep up
    ],
)
def test_requests_that_come_while_one_pass_is_computed_share_the_next(
    between_s: float, pass_s: float, requests: float
) -> None:
    assert requests_in_a_pass(between_s, pass_s, 0.01, HOST) == pytest.approx(requests)


def test_collecting_takes_the_cpu_seconds_of_all_parts_over_the_cores() -> None:
    # 100 decisions of 8 ticks and a frame are 1.12 * 10 s, ten resets 2 s; an answer is 1.08 (0.12 / 3 + 0.01) + 0.006.
    def seconds(**host: int) -> float:
        return collecting_s(10, 80.0, 0.06, PRICES, replace(HOST, **host), chunk=8)

    assert seconds() == pytest.approx((13.2 + 6) / 2)
    assert seconds(cores=16) == pytest.approx(6.6)  # a simulator is waited for
    assert seconds(cores=16, processes=4) == pytest.approx(1.08 * 100 * (0.12 / 8 + 0.01) + 0.6)  # and here the server
    assert collecting_s(10, 80.0, 0.06, replace(PRICES, slowdown=3.0), HOST, chunk=8) == pytest.approx(28.8)


def test_phases_are_sums_over_decisions_and_episodes() -> None:
    found = phases(SCHEDULE, PRICES, HOST)
    assert found.collect_s == pytest.approx(9.6 + 100 * 0.006 / 2)  # both cores read what was collected
    assert (found.learn_s, found.warm_learn_s, found.publish_s) == pytest.approx((3.0, 1.0, 0.5))
    # Evaluations are drawn in full: 2 s and 1.12 * 20 s of simulators; b = 1 + 2 * 0.1 / 0.2.
    assert found.evaluate_s == pytest.approx((24.4 + 100 * (1.08 * (0.12 / 2 + 0.01) + 0.006)) / 2)
    assert found.start_s == pytest.approx(1.0 + 2 * 2 * 3.0 / 2)


def test_a_run_is_its_start_its_iterations_and_its_evaluations() -> None:
    assert run_s(PHASES, SCHEDULE, HOST, learner_cores=1) == 7 + 2 * (60 + 12 + 2) + 3 * (60 + 30 + 2) + 3 * 100
    short = replace(SCHEDULE, iterations=1, evaluations=0)
    assert run_s(PHASES, short, HOST, learner_cores=1) == 7 + 74


@pytest.mark.parametrize(
    ("learn_s", "learner_cores", "seconds"),
    [
        (30.0, 1, 75.0),  # 60 s on both cores and 30 s on one
        (30.0, 2, 90.0),  # all of both: overlapping gains nothing but the publish
        (200.0, 1, 202.0),  # the learner is waited for
        (0.0, 1, 60.0),
    ],
)
def test_overlapped_sides_share_the_cores(learn_s: float, learner_cores: int, seconds: float) -> None:
    found, schedule = replace(PHASES, learn_s=learn_s), replace(SCHEDULE, overlap=True)
    assert iteration_s(found, schedule, HOST, warm=False, learner_cores=learner_cores) == seconds


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # All weights in float32 are the masters: 16 bytes a number, and 12 while a state is saved.
        ({"width": 4, "trained_width": 4, "frozen": 0, "trained": 1000, "saved_bytes": 5000}, 16_000 + 12_000),
        ({"width": 4, "trained_width": 4, "frozen": 0, "trained": 1000, "saved_bytes": 50_000}, 16_000 + 50_000),
        # In bfloat16 they lie beside, with gradients of their own while activations are held.
        ({"width": 2, "trained_width": 2, "frozen": 0, "trained": 1000, "saved_bytes": 50_000}, 18_000 + 52_000),
        # An adapter of 100 numbers over frozen bfloat16; to publish, a copy of the weights is laid out.
        ({"width": 2, "trained_width": 4, "frozen": 1000, "trained": 100, "saved_bytes": 50_000}, 3_600 + 50_000),
        ({"width": 2, "trained_width": 4, "frozen": 1000, "trained": 100, "saved_bytes": 500}, 3_600 + 2_000),
    ],
)
def test_a_learner_holds_weights_masters_gradients_moments_and_what_passes(shapes: dict, expected: int) -> None:
    held = learner_bytes(Shapes(numbers=1000, **shapes), reference=False)
    assert held == expected
    assert learner_bytes(Shapes(numbers=1000, **shapes), reference=True) == held + 1000 * shapes["width"]


def test_an_average_of_the_weights_is_held_saved_and_published_beside_them() -> None:
    shapes = Shapes(numbers=1000, frozen=0, trained=1000, width=4, trained_width=4, saved_bytes=500)
    assert learner_bytes(shapes, reference=False, averaged=True) == 16_000 + 4_000 + 16_000
    config, two_states, versions = nano_config(STATISTICS), 2 * 4 * shapes.trained, SCHEDULE.iterations * 4000
    alone, beside = (disk_bytes(config, shapes, schedule=SCHEDULE, averaged=averaged) for averaged in (False, True))
    assert beside - alone == two_states + versions


def test_a_7b_model_is_counted_without_its_memory() -> None:
    rows = {"rows": 2, "prompt_tokens": 30}
    whole = shapes_of(openvla_7b(), dtype=torch.bfloat16, lora_rank=0, **rows)
    assert whole.numbers == whole.trained == 7_541_237_184  # as published
    assert learner_bytes(whole, reference=False) == 30 * whole.numbers  # 2 + 16, and 12 while a state is saved
    assert server_bytes(whole, width=2) == 10 * whole.numbers
    adapter = shapes_of(openvla_7b(), dtype=torch.bfloat16, lora_rank=32, **rows)
    assert (adapter.frozen, adapter.trained_width) == (whole.numbers, 4)
    assert 0.01 < adapter.trained / whole.numbers < 0.02
    assert 14 < learner_bytes(adapter, reference=False) / GIB < 40
    assert server_bytes(adapter, width=2) == 2 * adapter.numbers + 36 * adapter.trained


def test_what_autograd_keeps_is_proportional_to_the_microbatch_and_the_same_without_memory(tiny_vla: Path) -> None:
    model = load_checkpoint(tiny_vla).model
    real = saved_bytes(model, rows=8, prompt_tokens=12)
    planned = shapes_of(model.config, dtype=torch.float32, lora_rank=0, rows=8, prompt_tokens=12).saved_bytes
    twice = shapes_of(model.config, dtype=torch.float32, lora_rank=0, rows=16, prompt_tokens=12).saved_bytes
    assert planned == pytest.approx(real, rel=0.15)
    assert twice == pytest.approx(2 * planned, rel=0.05)


@pytest.mark.parametrize(("rows", "recompute", "measured_gb"), [(8, False, 27.4), (32, True, 20.8)])
def test_a_7b_learner_needs_what_an_h100_has_seen(rows: int, recompute: bool, measured_gb: float) -> None:
    """An adapter of rank 32 on the decoder, bfloat16 (benchmarks/FIGURES.md); within 15 %, and never far below."""
    options = {"freeze_vision": True, "recompute": recompute, "prompt_tokens": 25}
    shapes = shapes_of(openvla_7b(), dtype=torch.bfloat16, lora_rank=32, rows=rows, **options)
    passing_gb = (shapes.weights_bytes + MASTER_BYTES * shapes.trained + shapes.saved_bytes) / GIB
    assert 0.95 * measured_gb < passing_gb < 1.15 * measured_gb


def test_frozen_vision_keeps_nothing_for_the_backward_pass(tiny_vla: Path) -> None:
    config = load_checkpoint(tiny_vla).model.config
    rows = {"dtype": torch.float32, "lora_rank": 0, "rows": 8, "prompt_tokens": 12}
    whole, frozen = (shapes_of(config, freeze_vision=freeze, **rows) for freeze in (False, True))
    assert frozen.saved_bytes < whole.saved_bytes and frozen.trained < whole.trained


def test_a_run_leaves_episodes_versions_a_state_and_a_model_on_disk() -> None:
    config = nano_config(STATISTICS)
    shapes = Shapes(numbers=1000, frozen=0, trained=1000, width=4, trained_width=4, saved_bytes=0)
    decision = 3 * 128**2 + 2048
    # 80 episodes of 10 decisions and a final observation, 5 versions, the state twice, the last policy and the best.
    assert disk_bytes(config, shapes, schedule=SCHEDULE) == 80 * 11 * decision + 5 * 4000 + 24_000 + 2 * 4000
    adapter = replace(shapes, numbers=10_000, frozen=10_000)  # whose base lies elsewhere
    assert disk_bytes(config, adapter, schedule=SCHEDULE) == disk_bytes(config, shapes, schedule=SCHEDULE)


def test_no_more_versions_lie_on_disk_than_the_server_keeps() -> None:
    shapes = Shapes(numbers=1000, frozen=0, trained=1000, width=4, trained_width=4, saved_bytes=0)
    some, more = (replace(SCHEDULE, iterations=n, rollouts=0, evaluations=0) for n in (17, 500))
    config = nano_config(STATISTICS)
    assert disk_bytes(config, shapes, schedule=more) - disk_bytes(config, shapes, schedule=some) == 4000


def test_a_critic_with_a_backbone_of_its_own_is_held_and_saved_too() -> None:
    options = {"dtype": torch.bfloat16, "lora_rank": 32, "rows": 2, "prompt_tokens": 30, "critic_rank": 16}
    shared, lora, separate = (
        shapes_of(openvla_7b(), critic=kind, **options) for kind in ("shared", "lora", "separate")
    )
    assert (shared.critic_trained, shared.critic_copied, lora.critic_copied) == (0, 0, 0)
    assert 0 < lora.critic_trained < lora.trained, "an adapter of half the rank, on the decoder alone"
    assert (separate.critic_trained, separate.critic_copied) == (separate.trained, separate.numbers)
    held = [learner_bytes(shapes, reference=False) for shapes in (shared, lora, separate)]
    assert held[2] - held[0] >= 2 * separate.numbers + MASTER_BYTES * separate.trained > held[1] - held[0] > 0


def test_image_tokens_that_are_kept_take_2_mb_a_decision_of_a_7b_model() -> None:
    config = openvla_7b()
    assert batch_bytes(config, 10, kept_width=2) - batch_bytes(config, 10) == 10 * 256 * 4096 * 2


def test_memory_is_added_up_where_it_is() -> None:
    needs = [
        Need(process="learner", where="GPU 0", gb=60.0, room_gb=80.0),
        Need(process="server", where="GPU 0", gb=15.0, room_gb=80.0),
        Need(process="workers", where="this machine", gb=6.0, room_gb=8.0),
    ]
    assert refusal(needs) == ""
    full = [*needs, Need(process="more", where="GPU 0", gb=6.0, room_gb=80.0)]
    assert refusal(full).startswith("the run needs 81.0 GiB of the memory of GPU 0, which has 80.0: learner 60.0, ")
    assert "this machine, which has 8.0: workers 6.0, server 3.0;" in refusal(
        [*needs, Need(process="server", where="this machine", gb=3.0, room_gb=8.0)]
    )
