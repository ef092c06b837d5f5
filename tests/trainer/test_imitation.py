from __future__ import annotations

import math

import pytest
import torch

from rl_trainer.imitation import Objective, learning_rate, soft_targets


def objective(weights: list[float], sigma: float = 0.0, smooth: list[bool] | None = None) -> Objective:
    return Objective(
        weight_N=torch.tensor(weights),
        smooth_N=torch.tensor(smooth or [True] * len(weights)),
        target_VV=soft_targets(4, sigma) if sigma else None,
    )


def test_the_loss_of_even_logits_is_the_logarithm_of_the_number_of_bins() -> None:
    loss = objective([1.0, 1.0, 1.0])(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 3, 3]]))
    assert float(loss) == pytest.approx(math.log(4))


def test_tokens_count_by_weight_whatever_its_scale() -> None:
    logits = torch.tensor([[[100.0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 0]])
    assert float(objective([3.0, 1.0])(logits, labels)) == pytest.approx(math.log(4) / 4)
    assert float(objective([6.0, 2.0])(logits, labels)) == pytest.approx(math.log(4) / 4)


def test_soft_targets_are_symmetric_neighbourhoods() -> None:
    targets = soft_targets(256, 2.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(256))
    torch.testing.assert_close(targets[100, 98], targets[100, 102])
    assert float(targets[100, 102] / targets[100, 100]) == pytest.approx(math.exp(-0.5))


def test_a_soft_target_prefers_a_near_miss_and_a_gripper_does_not() -> None:
    near, far = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    near[..., 1], far[..., 3] = 5.0, 5.0
    label = torch.tensor([[0]])
    soft, hard = objective([1.0], sigma=1.0), objective([1.0], sigma=1.0, smooth=[False])
    assert soft(near, label) < soft(far, label)
    assert hard(near, label) == hard(far, label)


def test_the_rate_warms_up_and_falls_to_the_final_one_when_the_budget_is_spent() -> None:
    settings = {"peak": 1.0, "final": 0.1, "warmup_steps": 10}
    assert learning_rate(0.0, 0, **settings) == pytest.approx(0.1)
    assert learning_rate(0.0, 9, **settings) == pytest.approx(1.0)
    assert learning_rate(0.5, 99, **settings) == pytest.approx(0.55)
    assert learning_rate(1.0, 99, **settings) == learning_rate(1.2, 99, **settings) == pytest.approx(0.1)
