from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.decoding import decode
from policy_server.vla.model import collate
from policy_server.vla.passes import DecodeInput
from policy_server.vla.preprocessing import Preprocessor
from protos import episode_pb2
from rl_trainer.loss import (
    Counts,
    Loss,
    LossConfig,
    clone_loss,
    ppo_loss,
    token_divergence,
    token_entropy,
    token_logprobs,
    value_loss,
)
from rl_trainer.trajectories import Trajectory, TrajectoryReader
from tests.trainer import fake_episodes as fake

WIDTH = 2
"""A of the hand-computed cases; K = 2."""
ALL = torch.ones(1, 4, dtype=torch.bool)
EXTRA = ("found_BN", "moved_BN", "entropy_BN", "divergence_BN")


def loss(log_ratio: list, advantage: list, mask: torch.Tensor | None = None, **options) -> Loss:
    """Of decisions whose tokens had log-probability -1 and now have -1 + log_ratio."""
    difference_BN = torch.tensor(log_ratio, dtype=torch.float64)
    mask = torch.ones_like(difference_BN, dtype=torch.bool) if mask is None else mask
    extra = {name: options.pop(name) for name in EXTRA if name in options}
    return ppo_loss(
        difference_BN - 1,
        torch.full_like(difference_BN, -1),
        torch.tensor(advantage, dtype=torch.float64),
        mask,
        config=LossConfig(**options),
        counts=Counts.of(mask.numpy(), WIDTH),
        action_dim=WIDTH,
        **extra,
    )


def logs(*ratios: float) -> list[float]:
    return [math.log(ratio) for ratio in ratios]


def test_a_ratio_belongs_to_the_tokens_of_one_action_and_each_has_the_decisions_advantage() -> None:
    """Ticks with ratios 1.1 = 1.25 * .88 and .9 = .75 * 1.2, inside the clip: -(1.1 + .9) * 3 / 2 ticks."""
    result = loss([logs(1.25, 0.88, 0.75, 1.2)], [3.0])
    assert float(result.total) == pytest.approx(-3.0)
    assert float(result.metrics["ratio"]) == pytest.approx(1.0)
    assert float(result.metrics["clip_fraction"]) == 0


def test_a_ratio_of_each_token_is_clipped_by_itself() -> None:
    """1.25 counts as 1.2, .88 as itself, .75 as itself (min), 1.2 as itself; 4 tokens."""
    result = loss([logs(1.25, 0.88, 0.75, 1.2)], [3.0], ratio="token")
    assert float(result.total) == pytest.approx(-3.0 * (1.2 + 0.88 + 0.75 + 1.2) / 4)
    assert float(result.metrics["clip_fraction"]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.5, 2.0, -1.4 * 2, True),  # good and already likelier: nothing more to earn
        (1.5, -2.0, 1.5 * 2, False),  # bad and likelier: to be undone
        (0.5, -2.0, 0.9 * 2, True),  # bad and already less likely: nothing more to earn
        (0.5, 2.0, -0.5 * 2, False),  # good and less likely: to be undone
        (1.3, 2.0, -1.3 * 2, False),
        (0.95, -2.0, 0.95 * 2, False),
    ],
)
def test_the_clip_holds_on_both_sides(ratio: float, advantage: float, expected: float, clipped: bool) -> None:
    log_ratio = torch.tensor([[math.log(ratio), 0.0, math.log(ratio), 0.0]], dtype=torch.float64, requires_grad=True)
    result = ppo_loss(
        log_ratio,
        torch.zeros(1, 4),
        torch.tensor([advantage]),
        ALL,
        config=LossConfig(clip_low=0.1, clip_high=0.4),
        counts=Counts(decisions=1, ticks=2, tokens=4),
        action_dim=WIDTH,
    )
    assert float(result.metrics["policy_loss"]) == pytest.approx(expected)
    assert float(result.metrics["clip_fraction"]) == clipped
    [gradient] = torch.autograd.grad(result.total, log_ratio)
    expected_gradient = 0.0 if clipped else -ratio * advantage / 2
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected_gradient))


def test_of_older_policies_the_clip_is_around_the_one_that_was_found_and_who_played_is_a_weight() -> None:
    """Found to played 0.5, and 3, cut off at 2; now to found 1.5, clipped to 1.2, and 1.1: an update can go on."""
    found_BN = torch.tensor([logs(0.5, 1.0, 3.0, 1.0)], dtype=torch.float64) - 1
    now = logs(0.5 * 1.5, 1.0, 3.0 * 1.1, 1.0)
    result = loss([now], [2.0], found_BN=found_BN, behaviour_cap=2.0)
    assert float(result.total) == pytest.approx(-(0.5 * 1.2 + 2 * 1.1) * 2.0 / 2)
    assert float(result.metrics["ratio"]) == pytest.approx(1.3)
    plain = loss([now], [2.0], found_BN=found_BN)
    assert float(plain.total) == pytest.approx(-(0.75 + 1.2) * 2.0 / 2), "off by default: ratios to who played"


def test_how_far_an_update_has_moved_is_told_of_an_action_and_costs_nothing() -> None:
    """Actions of two tokens; the tokens' divergences add up."""
    moved_BN = torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    result, plain = loss([logs(1.1, 1.0, 0.8, 1.0)], [1.0], moved_BN=moved_BN), loss([logs(1.1, 1.0, 0.8, 1.0)], [1.0])
    assert float(result.metrics["update_kl"]) == pytest.approx((0.1 + 0.2 + 0.3) / 2)
    assert result.total == plain.total and "update_kl" not in plain.metrics


def test_entropy_is_a_bonus_and_the_distance_to_the_reference_a_penalty() -> None:
    terms = {"entropy_BN": torch.full((1, 4), 0.5), "divergence_BN": torch.tensor([[0.0, 0.1, 0.2, 0.5]])}
    plain = float(loss([[0.0] * 4], [1.0], **terms).total)
    both = loss([[0.0] * 4], [1.0], entropy_weight=0.1, reference_weight=0.3, **terms)
    assert plain == pytest.approx(-1.0), "off by default"
    assert float(both.total) == pytest.approx(-1.0 - 0.1 * 0.5 + 0.3 * 0.2)
    assert float(both.metrics["entropy"]) == pytest.approx(0.5)
    assert float(both.metrics["reference_kl"]) == pytest.approx(0.2)


def test_the_divergence_from_the_reference_is_that_of_the_tempered_distributions() -> None:
    """Logits 0 and 2 log 3 at temperature 2: 1/4 and 3/4, against the reference's 1/2 and 1/2."""
    logits, reference = torch.tensor([[[0.0, 2 * math.log(3)]]]), torch.tensor([[[7.0, 7.0]]])
    got = token_divergence(logits, reference, torch.tensor([2.0]), torch.tensor([[True]]))
    assert float(got) == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert float(token_divergence(reference, reference, torch.tensor([2.0]), torch.tensor([[True]]))) == 0


@pytest.mark.parametrize("ratio", ["action", "token"])
def test_masked_tokens_cost_exactly_nothing(ratio: str) -> None:
    """Not even where model or record hold no number; a row that is masked altogether is as good as none."""
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 2 + [False] * 2, [True] * 4, [False] * 4])
    behaviour, reference = torch.full((3, 4), -1.5), torch.zeros(3, 4, 5)
    logits[~mask], behaviour[~mask], reference[~mask] = math.nan, math.nan, math.nan
    advantage = torch.tensor([1.0, -2.0, math.nan])
    config = LossConfig(ratio=ratio, entropy_weight=0.1, reference_weight=0.1)  # type: ignore[arg-type]
    counts = Counts.of(mask.numpy(), WIDTH)
    assert counts == Counts(decisions=3, ticks=3, tokens=6)

    def of(rows: slice) -> tuple[Loss, torch.Tensor]:
        leaf = logits[rows].clone().requires_grad_()
        columns, temperature = torch.ones(leaf.shape[:2], dtype=torch.long), torch.full((len(leaf),), 1.5)
        result = ppo_loss(
            token_logprobs(leaf, columns, temperature, mask[rows]),
            behaviour[rows],
            advantage[rows],
            mask[rows],
            config=config,
            counts=counts,
            action_dim=WIDTH,
            entropy_BN=token_entropy(leaf, temperature, mask[rows]),
            divergence_BN=token_divergence(leaf, reference[rows], temperature, mask[rows]),
        )
        return result, torch.autograd.grad(result.total, leaf)[0]

    (whole, gradient), (scored, _) = of(slice(0, 3)), of(slice(0, 2))
    assert torch.isfinite(gradient).all() and (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
    assert torch.isfinite(whole.total) and torch.equal(whole.total, scored.total)
    assert {name: float(value) for name, value in whole.metrics.items()} == {
        name: float(value) for name, value in scored.metrics.items()
    }


def test_the_loss_itself_gives_masked_tokens_no_gradient() -> None:
    logprobs = torch.full((1, 4), -1.0, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    unknown = torch.tensor([[-1.0, -3.0, math.nan, math.inf]])
    result = ppo_loss(
        logprobs,
        unknown,
        torch.tensor([1.0]),
        mask,
        config=LossConfig(reference_weight=0.1),
        counts=Counts(decisions=1, ticks=1, tokens=1),
        action_dim=WIDTH,
        divergence_BN=unknown,
    )
    [gradient] = torch.autograd.grad(result.total, logprobs)
    assert gradient.tolist() == [[-1.0, 0.0, 0.0, 0.0]]
    assert float(result.metrics["ratio"]) == 1


@pytest.mark.parametrize("ratio", ["action", "token"])
def test_parts_of_a_batch_add_up_to_its_gradient_however_it_is_cut(ratio: str) -> None:
    """Defect 8: accumulation is by what there is to score in the whole batch, not a mean of means."""
    rng = torch.Generator().manual_seed(0)
    prefix = torch.tensor([1, 3, 2, 3, 1])
    mask = torch.arange(6) < WIDTH * prefix[:, None]
    behaviour, direction = -torch.rand(5, 6, generator=rng).double(), torch.randn(5, 6, generator=rng).double()
    advantage, targets = torch.randn(5, generator=rng).double(), torch.randn(5, generator=rng).double()
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    config, counts = LossConfig(ratio=ratio), Counts.of(mask.numpy(), WIDTH)  # type: ignore[arg-type]

    def gradient(*cuts: slice) -> tuple[float, dict[str, float]]:
        weight.grad, metrics = None, {}
        for cut in cuts:
            policy = ppo_loss(
                behaviour[cut] + weight * direction[cut],
                behaviour[cut],
                advantage[cut],
                mask[cut],
                config=config,
                counts=counts,
                action_dim=WIDTH,
            )
            value = value_loss(weight * targets[cut], 0 * targets[cut], targets[cut], config=config, counts=counts)
            (policy.total + value.total).backward()
            for name, number in (policy.metrics | value.metrics).items():
                metrics[name] = metrics.get(name, 0.0) + float(number)
        assert weight.grad is not None
        return float(weight.grad), metrics

    whole, of_whole = gradient(slice(0, 5))
    parts, of_parts = gradient(slice(0, 1), slice(1, 4), slice(4, 5))
    assert parts == pytest.approx(whole, rel=1e-12) and whole != 0
    assert of_parts == pytest.approx(of_whole, rel=1e-12)


def test_the_value_loss_is_half_the_squared_error_and_its_clip_takes_the_larger() -> None:
    """Recorded 0, clip .2.  1 -> .2 against target 1: the clipped error .8 rules; 1 against -1: the free one, 2."""
    counts = Counts(decisions=2, ticks=0, tokens=0)
    values, recorded = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    clipped = value_loss(values, recorded, torch.tensor([1.0, -1.0]), config=LossConfig(), counts=counts)
    free = value_loss(values, recorded, torch.tensor([1.0, -1.0]), config=LossConfig(value_clip=0), counts=counts)
    assert float(clipped.total) == pytest.approx(0.5 * (0.8**2 + 2**2) / 2)
    assert float(free.total) == pytest.approx(0.5 * (0 + 2**2) / 2)


def test_the_loss_of_cloning_is_the_mean_over_the_tokens_of_the_whole_batch() -> None:
    """Likelihoods 1/2, 1/4 and a masked 1/8 in one part, 1/16 in the other: ln 2 times (1 + 2 + 4) / 3."""
    logprobs_BN = torch.tensor([logs(1 / 2, 1 / 4, 1 / 8), logs(1 / 16, 1, 1)])
    mask_BN = torch.tensor([[True, True, False], [True, False, False]])
    counts = Counts.of(mask_BN.numpy(), 1)
    parts = [clone_loss(logprobs_BN[row], mask_BN[row], counts=counts) for row in ([0], [1])]
    assert sum(float(part.total) for part in parts) == pytest.approx(math.log(2) * 7 / 3)
    assert sum(float(part.metrics["nll"]) for part in parts) == pytest.approx(math.log(2) * 7 / 3)


def test_logprobs_are_of_the_action_tokens_alone_at_the_temperature() -> None:
    """Defect 5: logits T log p have probabilities p at temperature T."""
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = (torch.tensor([1.5, 0.5])[:, None, None] * probabilities.log()).expand(2, 3, 3)
    columns, temperature = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([1.5, 0.5])
    mask = torch.ones(2, 3, dtype=torch.bool)
    got = token_logprobs(logits, columns, temperature, mask)
    torch.testing.assert_close(got, probabilities.log().expand(2, 3))
    entropy = token_entropy(logits, temperature, mask)
    torch.testing.assert_close(entropy, (-(probabilities * probabilities.log()).sum()).expand(2, 3))


def test_a_policy_far_from_the_one_that_acted_still_has_a_finite_loss() -> None:
    for advantage in (1.0, -1.0):
        log_ratio = torch.full((1, 4), 80.0, requires_grad=True)
        result = ppo_loss(
            log_ratio,
            torch.zeros(1, 4),
            torch.tensor([advantage]),
            ALL,
            config=LossConfig(),
            counts=Counts.of(ALL.numpy(), WIDTH),
            action_dim=WIDTH,
        )
        result.total.backward()
        assert torch.isfinite(result.total) and torch.isfinite(log_ratio.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"value_clip": -1}, {"entropy_weight": -1}]
)
def test_a_clip_that_makes_no_sense_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        LossConfig(**fields)


def acted(checkpoint: Checkpoint, folder: Path) -> Trajectory:
    """What the model itself did at temperature 1.5, through an episode file."""
    config, decisions = checkpoint.config, 3
    preprocessor = Preprocessor(config, checkpoint.tokenizer)
    requests = []
    for number in range(decisions):
        side = config.image_size
        pixels, state = np.full((side, side, 3), 10 * number, np.uint8), np.full(8, number / 100, np.float32)
        prepared = preprocessor.prepare(pixels, "pick up the bowl", state)
        requests.append(DecodeInput(prepared=prepared, temperature=1.5, seed=5, decision=number))
    answers = decode(checkpoint.model, requests)
    chunks = [fake.chunk(config, *row) for row in zip(answers.token_ids_BN, answers.token_logprobs_BN, strict=True)]
    executed = [*fake.ticks(0, "pp"), *fake.ticks(1, "p"), *fake.ticks(2, "pp")]
    episode = fake.write_episode(folder, config, executed, chunks, outcome=episode_pb2.OUTCOME_FAILURE, terminal=False)
    [trajectory] = TrajectoryReader(config, checkpoint.tokenizer).read(episode)
    return trajectory


def test_the_ratio_is_one_on_fresh_data_and_not_after_a_step(tiny_vla: Path, tmp_path: Path) -> None:
    """Defect 3: the ratio is taken against what was recorded when sampling, so that the clip has something to clip."""
    checkpoint = load_checkpoint(tiny_vla)
    model, trajectory = checkpoint.model, acted(checkpoint, tmp_path)
    mask_TN = torch.from_numpy(trajectory.mask_TN)

    def score() -> tuple[torch.Tensor, Loss]:
        ids_TN = torch.from_numpy(trajectory.token_ids_TN)
        logits = model(collate(trajectory.observations), ids_TN).logits_BNV
        temperature_T = torch.from_numpy(trajectory.temperature_T)
        logprobs = token_logprobs(logits, ids_TN - model.config.action_begin, temperature_T, mask_TN)
        recorded, action_dim = torch.from_numpy(trajectory.logprobs_TN), model.config.action_dim
        counts = Counts.of(trajectory.mask_TN, action_dim)
        advantage = torch.tensor([1.0, -1.0, 0.5])
        result = ppo_loss(
            logprobs, recorded, advantage, mask_TN, config=LossConfig(), counts=counts, action_dim=action_dim
        )
        return (logprobs - recorded)[mask_TN].detach(), result

    fresh, before = score()
    assert fresh.abs().max() < 1e-4
    assert float(before.metrics["ratio"]) == pytest.approx(1, abs=1e-4)
    assert float(before.metrics["clip_fraction"]) == 0
    before.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * (0 if parameter.grad is None else parameter.grad)
    moved, after = score()
    assert moved.abs().max() > 0.01
    assert after.metrics["policy_loss"] < before.metrics["policy_loss"]
