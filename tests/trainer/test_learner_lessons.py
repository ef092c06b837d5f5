"""The learner's lessons: beside PPO's minibatches, in its warm-up and alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy_server.vla.model import collate
from rl_trainer.learner import Learner
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.lessons import Lesson, successes
from rl_trainer.loss import token_logprobs
from rl_trainer.ranks import Ranks, launched
from rl_trainer.tutor import Tutor
from tests.trainer.fake_ranks import OneOfTwo
from tests.trainer.test_learner import CONFIG, SLOW, distance, learner_of, trajectories_of, weights

TAUGHT = replace(CONFIG, success_weight=0.5, intervention_weight=2.0, lessons=4)


def lessons_of(learner: Learner) -> list[Lesson]:
    """8 decisions of the policy's own, at temperature 0.7, and 5 of others, of which only one action counts."""
    own = successes(trajectories_of(learner.model, (3, 5, 5)))
    first = np.arange(learner.model.config.action_tokens) < learner.model.config.action_dim
    rng, begin = np.random.default_rng(1), learner.model.config.action_begin
    others = [
        replace(
            one,
            kind="intervention",
            token_ids_N=begin + rng.integers(0, 256, len(first)),
            mask_N=~first,
            temperature=1.0,
        )
        for one in own[:5]
    ]
    return own + others


def tutor_of(learner: Learner, lessons: list[Lesson], **changed: Any) -> Tutor:
    options: dict[str, Any] = {
        "weights": {"success": 0.5, "intervention": 2.0},
        "draw": 64,
        "microbatch": 64,
        "keep_images": True,
        "ranks": Ranks(),
        "seed": (0, 0),
    }
    return Tutor(learner.model, lessons, **{**options, **changed})


def likelihood(learner: Learner, lessons: list[Lesson]) -> float:
    """Mean log-probability of a token that is to be imitated, by hand."""
    with torch.no_grad():
        return -float(by_hand(learner, lessons))


def by_hand(learner: Learner, lessons: list[Lesson]) -> torch.Tensor:
    """Mean negative log-likelihood of a token, each lesson by itself."""
    config, told = learner.model.config, []
    for lesson in lessons:
        ids_N = torch.from_numpy(lesson.token_ids_N)
        logits_NV = learner.model(collate([lesson.observation]), ids_N[None]).logits_BNV[0]
        logprobs_NV = (logits_NV / lesson.temperature).log_softmax(-1)
        chosen_N = logprobs_NV[torch.arange(len(ids_N)), ids_N - config.action_begin]
        told.append(chosen_N[torch.from_numpy(lesson.mask_N)])
    return -torch.cat(told).mean()


def test_the_gradient_is_that_of_the_weighed_mean_likelihoods_of_tokens(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    lessons, optimizer = lessons_of(learner), learner.policy_optimizer
    own, others = ([one for one in lessons if one.kind == kind] for kind in ("success", "intervention"))
    nll = {"success_nll": by_hand(learner, own), "intervention_nll": by_hand(learner, others)}
    (0.5 * nll["success_nll"] + 2 * nll["intervention_nll"]).backward()
    expected = optimizer.collect_gradients().clone()
    optimizer.forget()
    measured = tutor_of(learner, lessons).gradient(0)
    torch.testing.assert_close(optimizer.collect_gradients(), expected, rtol=1e-4, atol=1e-5)
    assert measured == pytest.approx({name: float(value.detach()) for name, value in nll.items()}, abs=1e-5)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("ranks", [1, 2])
def test_neither_ranks_nor_passes_change_what_a_step_learns_from_lessons(tiny_vla: Path, ranks: int) -> None:
    """8 and 5 decisions in passes of at most 3, on uneven ranks."""
    learner = learner_of(tiny_vla)
    lessons, optimizer = lessons_of(learner), learner.policy_optimizer
    whole = tutor_of(learner, lessons).gradient(0)
    expected = optimizer.collect_gradients().clone()
    optimizer.forget()
    parts = [OneOfTwo(rank=rank, size=ranks) for rank in range(ranks)]
    measured = [tutor_of(learner, lessons, microbatch=3, ranks=part).gradient(0) for part in parts]
    torch.testing.assert_close(optimizer.collect_gradients(), expected, rtol=1e-4, atol=1e-5)
    assert {name: sum(one[name] for one in measured) for name in whole} == pytest.approx(whole, abs=1e-5)


def _train_rank(ranks: Ranks, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    learner = learner_of(folder, replace(TAUGHT, learning_rate=SLOW.learning_rate), ranks=ranks)
    learner.update(trajectories_of(learner.model), lessons=lessons_of(learner))
    torch.save(weights(learner.model), out / f"{ranks.rank}.pt")


def test_two_ranks_give_the_update_of_one(tiny_vla: Path, tmp_path: Path) -> None:
    with launched(2, _train_rank, tiny_vla, tmp_path) as ranks:
        _train_rank(ranks, tiny_vla, tmp_path)
    alone = learner_of(tiny_vla, replace(TAUGHT, learning_rate=SLOW.learning_rate, microbatch=3))
    alone.update(trajectories_of(alone.model), lessons=lessons_of(alone))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert distance(weights(alone.model), first) < 1e-5


@pytest.mark.parametrize("warm_up", [0, 1])
@pytest.mark.parametrize(("config", "given"), [(CONFIG, True), (TAUGHT, False)])
def test_without_a_weight_or_without_lessons_everything_is_as_it_was_bit_for_bit(
    tiny_vla: Path, config: LearnerConfig, given: bool, warm_up: int
) -> None:
    plain, other = (learner_of(tiny_vla, replace(one, warm_up=warm_up)) for one in (CONFIG, config))
    fresh = trajectories_of(plain.model)
    for _ in range(2):
        before = plain.update(fresh, version=0)
        after = other.update(fresh, lessons=lessons_of(other) if given else [], version=0)
        assert {name: after[name] for name in before} == before
    assert all(torch.equal(plain.state()[name], tensor) for name, tensor in other.state().items())


def test_lessons_become_likelier_beside_ppo_and_both_kinds_are_measured(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(TAUGHT, epochs=4))
    fresh, lessons = trajectories_of(learner.model), lessons_of(learner)
    own, others = lessons[:8], lessons[8:]
    before = likelihood(learner, own), likelihood(learner, others)
    first, second = (learner.update(fresh, lessons=lessons) for _ in range(2))
    assert likelihood(learner, own) > before[0] and likelihood(learner, others) > before[1]
    assert second["success_nll"] < first["success_nll"] and second["intervention_nll"] < first["intervention_nll"]
    assert (first["success_lessons"], first["intervention_lessons"]) == (8, 5)
    assert {"policy_loss", "update_kl", "value_loss"} <= first.keys()


def test_a_kind_without_a_weight_is_neither_taught_nor_measured(tiny_vla: Path) -> None:
    both, alone = (learner_of(tiny_vla, replace(TAUGHT, success_weight=0.0)) for _ in range(2))
    fresh, lessons = trajectories_of(both.model), lessons_of(both)
    metrics = both.update(fresh, lessons=lessons)
    alone.update(fresh, lessons=lessons[8:])
    assert distance(weights(both.model), weights(alone.model)) == 0
    assert "intervention_nll" in metrics and not {"success_nll", "success_lessons"} & metrics.keys()


def test_while_the_critic_warms_up_the_policy_waits_and_its_lessons_too(tiny_vla: Path) -> None:
    """Nothing would bound how far steps from lessons alone move it."""
    taught, plain = (learner_of(tiny_vla, replace(config, warm_up=1)) for config in (TAUGHT, CONFIG))
    fresh, before = trajectories_of(taught.model), weights(taught.model)
    metrics = taught.update(fresh, lessons=lessons_of(taught))
    plain.update(fresh)
    assert distance(weights(taught.model), before) == 0 and taught.steps == 0
    assert distance(weights(taught.critic), weights(plain.critic)) == 0
    assert "value_loss" in metrics and "intervention_nll" not in metrics and metrics["intervention_lessons"] == 5


def test_what_lessons_move_the_policy_counts_against_the_divergence_that_ends_an_update(tiny_vla: Path) -> None:
    config = replace(TAUGHT, epochs=20, target_kl=1e-3, minibatch=64, intervention_weight=1e3)
    learner = learner_of(tiny_vla, config)
    fresh = [replace(one, rewards_T=np.zeros_like(one.rewards_T)) for one in trajectories_of(learner.model)]
    metrics = learner.update(fresh, lessons=lessons_of(learner))
    assert metrics["stopped_early"] == 1 and 1 <= learner.steps < 20


def test_lessons_alone_are_learned_from_where_no_trajectory_is_left(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(TAUGHT, advantage="grpo"))
    helped = [replace(one, whole=False) for one in trajectories_of(learner.model)]
    lessons = lessons_of(learner)
    before = likelihood(learner, lessons[8:])
    for trajectories in ([], helped):
        metrics = learner.update(trajectories, lessons=lessons)
    assert likelihood(learner, lessons[8:]) > before
    assert (learner.iteration, metrics["optimiser_steps"]) == (2, 8.0)


def test_lessons_alone_move_the_policy_no_further_than_trajectories_may(tiny_vla: Path) -> None:
    stopped, free = (learner_of(tiny_vla, replace(TAUGHT, epochs=20, target_kl=kl)) for kl in (1e-2, 0.0))
    lessons = lessons_of(stopped)
    metrics = [learner.update([], lessons=lessons) for learner in (stopped, free)]
    assert metrics[0]["stopped_early"] == 1 and 1 <= stopped.steps < free.steps == 40
    assert not metrics[1]["stopped_early"] and metrics[1]["update_kl"] > metrics[0]["update_kl"] > 0
    assert not stopped.policy_optimizer.gradient_P.any()


def test_the_divergence_over_lessons_is_that_of_their_actions(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    lessons = lessons_of(learner)
    tutor = tutor_of(learner, lessons, microbatch=3)
    found, before = tutor.logits(0), scored_logits(learner, lessons)
    assert tutor.divergence(0, found) == pytest.approx(0, abs=1e-6)
    learner.update(trajectories_of(learner.model))
    moved = sum(kl_by_hand(*pair) for pair in zip(lessons, before, scored_logits(learner, lessons), strict=True))
    actions = sum(int(one.mask_N.sum()) for one in lessons) // learner.model.config.action_dim
    assert tutor.divergence(0, found) == pytest.approx(moved / actions, rel=1e-4) and moved > 0


def scored_logits(learner: Learner, lessons: list[Lesson]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            learner.model(collate([one.observation]), torch.from_numpy(one.token_ids_N)[None]).logits_BNV[0]
            for one in lessons
        ]


def kl_by_hand(lesson: Lesson, before_NV: torch.Tensor, after_NV: torch.Tensor) -> float:
    p_NV, q_NV = ((logits_NV / lesson.temperature).log_softmax(-1) for logits_NV in (before_NV, after_NV))
    return float((p_NV.exp() * (p_NV - q_NV)).sum(-1)[torch.from_numpy(lesson.mask_N)].sum())


@pytest.mark.parametrize("config", [CONFIG, TAUGHT, replace(CONFIG, advantage="grpo")])
def test_an_update_from_nothing_is_refused(tiny_vla: Path, config: LearnerConfig) -> None:
    learner = learner_of(tiny_vla, config)
    with pytest.raises(ValueError, match="nothing to learn from: no trajectories, and no lessons"):
        learner.update([], lessons=[] if config is TAUGHT else lessons_of(learner))
    assert learner.iteration == 0


def test_a_minibatch_beyond_the_target_divergence_takes_its_lessons_with_it(tiny_vla: Path) -> None:
    stopped, short = (
        learner_of(tiny_vla, replace(TAUGHT, target_kl=target_kl, epochs=epochs, minibatch=64))
        for target_kl, epochs in ((1e-6, 4), (0.0, 1))
    )
    fresh, lessons = trajectories_of(stopped.model), lessons_of(stopped)
    metrics = [learner.update(fresh, lessons=lessons) for learner in (stopped, short)]
    assert metrics[0]["stopped_early"] == 1 and stopped.steps == short.steps == 1
    assert distance(weights(stopped.model), weights(short.model)) == 0
    assert not stopped.policy_optimizer.gradient_P.any()


def test_what_a_step_draws_depends_on_seed_iteration_and_step_alone(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    lessons = lessons_of(learner)

    def drawn(step: int, **changed: Any) -> list[list[int]]:
        rows = tutor_of(learner, lessons, draw=4, **changed).drawn(step)
        return [rows[kind].tolist() for kind in ("success", "intervention")]

    assert drawn(3) == drawn(3, ranks=OneOfTwo(rank=1, size=2), microbatch=1)
    assert len({str(drawn(*place[1:], seed=(0, place[0]))) for place in ((0, 0), (0, 1), (1, 0))}) == 3
    assert drawn(0) != drawn(0, seed=(1, 0))
    for step in range(5):
        own, others = drawn(step)
        assert len({*own}) == 4 and {*own} <= {*range(8)}
        assert len({*others}) == 4 and {*others} <= {*range(8, 13)}


def test_all_lessons_are_drawn_where_they_are_few(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    rows = tutor_of(learner, lessons_of(learner), draw=64).drawn(0)
    assert sorted(rows["success"]) == [*range(8)] and sorted(rows["intervention"]) == [*range(8, 13)]
    assert [tutor_of(learner, lessons_of(learner), draw=draw).steps for draw in (64, 8, 4, 3)] == [1, 1, 2, 3]


def test_a_loaded_learner_goes_on_bit_for_bit(tiny_vla: Path) -> None:
    kept, resumed = (learner_of(tiny_vla, replace(TAUGHT, warm_up=1)) for _ in range(2))
    fresh, lessons = trajectories_of(kept.model), lessons_of(kept)
    kept.update(fresh, lessons=lessons)
    resumed.load(kept.state())
    for learner in (kept, resumed):
        learner.update(fresh, lessons=lessons)
    assert distance(weights(kept.model), weights(resumed.model)) == 0


def test_successes_of_the_policys_own_are_scored_where_they_were_sampled(tiny_vla: Path) -> None:
    """Over all tokens, each as often as it is sampled, imitation at that temperature has no gradient."""
    logits_V, gradients = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_(), []
    sampled_V = (logits_V / 1.5).softmax(-1).detach()
    logits_BNV, every_BN = logits_V.expand(5, 1, 5), torch.arange(5)[:, None]
    for temperature in (1.5, 1.0):
        logprobs_BN = token_logprobs(logits_BNV, every_BN, torch.full((5,), temperature), every_BN >= 0)
        (gradient_V,) = torch.autograd.grad(sampled_V @ logprobs_BN[:, 0], logits_V)
        gradients.append(float(gradient_V.abs().max()))
    assert gradients[0] < 1e-6 < 1e-2 < gradients[1]


@pytest.mark.parametrize("name", ["success_weight", "intervention_weight", "lessons"])
def test_weights_below_0_and_no_lessons_a_step_are_refused(name: str) -> None:
    changed: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must be >= "):
        replace(CONFIG, **changed)


def test_lessons_of_a_tutor_are_those_that_have_a_weight(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    lessons = lessons_of(learner)
    assert len(tutor_of(learner, lessons, weights={"success": 0.0, "intervention": 1.0})) == 5
    assert not tutor_of(learner, lessons, weights={"success": 0.0, "intervention": 0.0})
    assert tutor_of(learner, [], weights={"success": 1.0, "intervention": 0.0}).counts == {"success_lessons": 0}
