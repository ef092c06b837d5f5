from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rl_trainer.optimizer import BETAS, Optimizer


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def optimizer(model: nn.Module, **options: float) -> Optimizer:
    return Optimizer(dict(model.named_parameters()), **{"weight_decay": 0.1, "clip_norm": 1e9, "ema": 0.0, **options})


def learn(model: nn.Linear, trained: Optimizer, steps: int, rate: float = 0.1, seed: int = 1) -> None:
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + step))
        model(x.to(model.weight.dtype)).square().mean().backward()
        trained.collect_gradients()
        trained.step(rate)


def test_float32_parameters_move_as_adamw_moves_them_with_decay_on_matrices_only() -> None:
    ours, theirs = layer(), layer()
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=BETAS)
    learn(ours, optimizer(ours), 5)
    for step in range(5):
        reference.zero_grad()
        theirs(torch.randn(4, 3, generator=torch.Generator().manual_seed(1 + step))).square().mean().backward()
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_steps_too_small_for_bfloat16_add_up_in_float32_masters() -> None:
    model = layer(torch.bfloat16)
    before = model.weight.detach().clone()
    trained = optimizer(model, weight_decay=0.0)
    learn(model, trained, 1, rate=1e-5)
    assert torch.equal(model.weight, before)
    learn(model, trained, 1000, rate=1e-5)
    assert model.weight.dtype == torch.bfloat16
    assert (model.weight - before).abs().max() > 1e-3


def test_a_long_gradient_is_cut_to_the_norm() -> None:
    model = layer()
    trained = optimizer(model, clip_norm=0.5)
    trained.gradient_P.fill_(3.0)
    assert trained.step(0.0) == pytest.approx(3.0 * 8**0.5)
    first_moment = trained.state()["adamw.0.exp_avg"]
    torch.testing.assert_close(first_moment.norm() / (1 - BETAS[0]), torch.tensor(0.5 * (6 / 8) ** 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_moves_nothing(bad: float) -> None:
    model = layer()
    trained = optimizer(model, ema=0.5)
    before = trained.state()
    trained.gradient_P[0] = bad
    assert not math.isfinite(trained.step(0.1))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state().items())
    learn(model, trained, 1)
    assert trained.step_count == 1 and trained.masters_P.isfinite().all()


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_that_leaves_no_gradient_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=f"clip_norm must be above 0, got {norm}"):
        optimizer(layer(), clip_norm=norm)


def test_the_average_is_shown_only_inside_its_block() -> None:
    model = layer()
    trained = optimizer(model, ema=0.9)
    learn(model, trained, 20)
    now = model.weight.detach().clone()
    with trained.averaged():
        assert not torch.equal(model.weight, now)
    assert torch.equal(model.weight, now)


def test_a_saved_state_goes_on_as_if_never_stopped() -> None:
    whole, parts, rest = layer(), layer(), layer()
    learn(whole, optimizer(whole, ema=0.9), 6)
    first = optimizer(parts, ema=0.9)
    learn(parts, first, 3)
    second = optimizer(rest, ema=0.9)
    second.load(first.state())
    learn(rest, second, 3, seed=4)
    assert torch.equal(whole.weight, rest.weight)


def test_the_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="this run trains 8"):
        optimizer(layer()).load(optimizer(nn.Linear(5, 5)).state())
