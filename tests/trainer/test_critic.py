from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.model import Prompts, collate
from policy_server.vla.preprocessing import Prepared, Preprocessor
from rl_trainer.critic import Critic
from rl_trainer.optimizer import Optimizer


@pytest.fixture
def checkpoint(tiny_vla: Path) -> Checkpoint:
    return load_checkpoint(tiny_vla)


def opinionated(width: int, seed: int = 0) -> Critic:
    """A critic whose values differ, as after training."""
    critic = Critic(width, hidden=16, seed=seed)
    nn.init.normal_(critic.value.weight, generator=torch.Generator().manual_seed(seed))
    return critic


def seen(checkpoint: Checkpoint, grey: int = 0, state: float = 0.0, instruction: str = "pick up the bowl") -> Prepared:
    side = checkpoint.config.image_size
    pixels, numbers = np.full((side, side, 3), grey, np.uint8), np.full(8, state, np.float32)
    return Preprocessor(checkpoint.config, checkpoint.tokenizer).prepare(pixels, instruction, numbers)


def actions(checkpoint: Checkpoint, rows: int, column: int = 0) -> torch.Tensor:
    return torch.full((rows, checkpoint.config.action_tokens), checkpoint.config.action_begin + column)


def values(checkpoint: Checkpoint, critic: Critic, prompts: Prompts, column: int = 0) -> torch.Tensor:
    return critic(checkpoint.model(prompts, actions(checkpoint, len(prompts.lengths_B), column)).hidden_BD).detach()


def test_values_differ_between_states(checkpoint: Checkpoint) -> None:
    """Defect 2: a padding slot knows nothing of the state; the last real prompt token has seen all of it."""
    states = [
        seen(checkpoint),
        seen(checkpoint, grey=200),
        seen(checkpoint, state=0.8),
        seen(checkpoint, instruction="place it on the plate"),
    ]
    value_B = values(checkpoint, opinionated(checkpoint.config.llm.hidden_size), collate(states))
    gaps = (value_B[:, None] - value_B[None]).abs()[~torch.eye(4, dtype=torch.bool)]
    assert gaps.min() > 1e-3


def test_a_value_knows_neither_padding_nor_the_actions_that_follow(checkpoint: Checkpoint) -> None:
    """Defect 2: the same state alone, beside a longer prompt, with other ids as padding, before another action."""
    critic, short = opinionated(checkpoint.config.llm.hidden_size), seen(checkpoint, grey=90, instruction="pick")
    alone = values(checkpoint, critic, collate([short]))
    padded = collate([short, seen(checkpoint, instruction="pick up the black bowl and place it on the plate")])
    other_padding = padded.input_ids_BL.clone()
    other_padding[0, len(short.input_ids) :] = 7
    for prompts, column in [(padded, 0), (replace(padded, input_ids_BL=other_padding), 0), (padded, 99)]:
        torch.testing.assert_close(values(checkpoint, critic, prompts, column)[:1], alone, rtol=0, atol=1e-5)


def test_a_fresh_critic_values_everything_at_nothing_and_is_the_same_for_the_same_seed() -> None:
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    value_B = Critic(8)(hidden)
    assert value_B.dtype == torch.float32 and value_B.tolist() == [0.0] * 5
    before = torch.random.get_rng_state()
    assert torch.equal(Critic(8, seed=3).hidden.weight, Critic(8, seed=3).hidden.weight)
    assert not torch.equal(Critic(8, seed=3).hidden.weight, Critic(8, seed=4).hidden.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_warm_up_teaches_the_critic_and_leaves_the_policys_logits_bit_equal(checkpoint: Checkpoint) -> None:
    critic = opinionated(checkpoint.config.llm.hidden_size)
    trained = Optimizer(dict(critic.named_parameters()), weight_decay=0.1, clip_norm=1.0, ema=0.0)
    prompts, ids = collate([seen(checkpoint), seen(checkpoint, grey=200)]), actions(checkpoint, 2)
    before, errors = checkpoint.model(prompts, ids).logits_BNV.detach(), []
    for _ in range(20):
        error = (critic(checkpoint.model(prompts, ids).hidden_BD.detach()) - torch.tensor([0.0, 1.0])).square().mean()
        error.backward()
        trained.collect_gradients()
        trained.step(0.01)
        errors.append(float(error.detach()))
    assert errors[-1] < 0.1 * errors[0]
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert torch.equal(checkpoint.model(prompts, ids).logits_BNV, before)


def test_without_detaching_the_backbone_learns_too(checkpoint: Checkpoint) -> None:
    critic, prompts = opinionated(checkpoint.config.llm.hidden_size), collate([seen(checkpoint)])
    critic(checkpoint.model(prompts, actions(checkpoint, 1)).hidden_BD).sum().backward()
    gradients = [parameter.grad for parameter in checkpoint.model.language_model.model.parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
