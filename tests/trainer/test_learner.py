"""The learner: ratio 1 on fresh data and not 1 after a step, warm-up, parts and ranks that add up, resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.config import VLAConfig
from policy_server.vla.decoding import decode
from policy_server.vla.lora import apply_lora
from policy_server.vla.model import VLA
from policy_server.vla.passes import DecodeInput
from policy_server.vla.preprocessing import Prepared
from rl_trainer.batching import Batch, Prompter
from rl_trainer.critic import CriticKind
from rl_trainer.learner import Learner, left_out
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.loss import Counts, LossConfig, token_divergence
from rl_trainer.ranks import Ranks, launched
from rl_trainer.trajectories import Trajectory
from tests.trainer.fake_ranks import OneOfTwo

CRITICS = ("shared", "lora", "separate")
CONFIG = LearnerConfig(warm_up=0, epochs=2, minibatch=8, microbatch=8, target_kl=0.0, learning_rate=1e-3)
SLOW = replace(CONFIG, learning_rate=1e-4)
"""Adam turns rounding in a small gradient into a part of a whole step; these are small."""


def model_of(folder: Path) -> VLA:
    return load_checkpoint(folder, dtype="float32", device="cpu").model


def learner_of(folder: Path, config: LearnerConfig = CONFIG, **options) -> Learner:
    return Learner(model_of(folder), config, **options)


def observation(config: VLAConfig, rng: np.random.Generator) -> Prepared:
    side = config.towers[0].image_size
    return Prepared(
        image=rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        input_ids=np.array([1, *rng.integers(3, 200, rng.integers(2, 6))]),
        state=rng.normal(size=config.state_dim).astype(np.float32),
    )


def trajectories_of(model: VLA, lengths: Sequence[int] = (3, 5, 4), temperature: float = 0.7) -> list[Trajectory]:
    """Sampled by the model itself, with the log-probabilities that it reports; every second one a success."""
    rng, found = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        observations = tuple(observation(model.config, rng) for _ in range(length))
        inputs = [
            DecodeInput(prepared=prepared, temperature=temperature, seed=number, decision=t)
            for t, prepared in enumerate(observations)
        ]
        decoded = decode(model, inputs)
        success = number % 2 == 0
        found.append(
            Trajectory(
                episode_id=f"episode {number}",
                task="tiny/0",
                initial_state=str(number // 2),
                success=success,
                whole=True,
                observations=observations,
                after=None if success else observation(model.config, rng),
                token_ids_TN=decoded.token_ids_BN.astype(np.int64),
                logprobs_TN=decoded.token_logprobs_BN,
                mask_TN=np.ones((length, model.config.action_tokens), bool),
                temperature_T=np.full(length, temperature, np.float32),
                version_T=np.zeros(length, np.int64),
                ticks_T=np.full(length, model.config.chunk_length),
                rewards_T=np.array([0.0] * (length - 1) + [float(success)]),
            )
        )
    return found


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_ratio_is_1_on_fresh_data_and_not_after_a_step(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, epochs=1, minibatch=64))
    fresh = trajectories_of(learner.model)
    first = learner.update(fresh, version=0)
    assert first["logprob_gap"] < 1e-4
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["update_kl"] == pytest.approx(0, abs=1e-6)
    again = learner.update(fresh, version=0)
    assert again["logprob_gap"] > 1e-3 and abs(again["ratio"] - 1) > 1e-6


def test_an_adapters_dropout_makes_no_other_policy_of_the_one_that_played(tiny_vla: Path) -> None:
    model = model_of(tiny_vla)
    for parameter in apply_lora(model, rank=2, alpha=4, dropout=0.5):
        torch.nn.init.normal_(parameter, std=0.1)
    learner = Learner(model, replace(CONFIG, epochs=1, minibatch=64))
    first = learner.update(trajectories_of(model), version=0)
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["update_kl"] == pytest.approx(0, abs=1e-6)


def test_a_step_whose_gradient_is_not_finite_is_left_out_and_said_to_be(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, normalise=False))
    fresh, before = trajectories_of(learner.model), weights(learner.model)
    metrics = learner.update(fresh, [np.full(len(one), np.nan) for one in fresh])
    assert learner.steps == 0 and distance(weights(learner.model), before) == 0
    assert (metrics["steps_left_out"], metrics["critic_steps_left_out"]) == (1, 1)
    assert left_out(metrics).endswith("not finite: 100% of the steps of the critic, 100% of the steps of the policy")
    assert not left_out(learner_of(tiny_vla).update(fresh))


@pytest.mark.parametrize("critic", CRITICS)
def test_warm_up_moves_the_critic_and_leaves_the_policys_logits_bit_for_bit(tiny_vla: Path, critic: CriticKind) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, warm_up=1, critic=critic))
    fresh = trajectories_of(learner.model)
    before, values = learner.score(fresh), weights(learner.critic)
    learner.update(fresh)
    warm = learner.score(fresh)
    assert torch.equal(warm.policy.logprobs_BN, before.policy.logprobs_BN)
    assert distance(weights(learner.critic), values) > 0
    assert np.abs(warm.values_n - before.values_n).max() > 0
    learner.update(fresh)
    assert not torch.equal(learner.score(fresh).policy.logprobs_BN, before.policy.logprobs_BN)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_warm_critic_tells_states_apart(tiny_vla: Path, critic: CriticKind) -> None:
    """Defect 2: read at a padding slot, every state has one value."""
    learner = learner_of(
        tiny_vla, replace(CONFIG, warm_up=9, critic=critic, critic_epochs=8, critic_learning_rate=1e-2)
    )
    fresh = trajectories_of(learner.model)
    learner.update(fresh)
    values_n = learner.score(fresh).values_n
    assert len(np.unique(values_n.round(4))) == len(values_n)
    assert np.corrcoef(values_n, np.repeat([1.0, 0.0, 1.0], (3, 5, 4)))[0, 1] > 0.5  # successes are worth more


def test_a_critic_of_its_own_changes_nothing_in_the_policys_gradient(tiny_vla: Path) -> None:
    """With one step, values that are 0 everywhere and no gradient of the critic's in the policy."""
    learners = [learner_of(tiny_vla, replace(SLOW, critic=critic, epochs=1, minibatch=64)) for critic in CRITICS]
    fresh = trajectories_of(learners[0].model)
    for learner in learners:
        learner.update(fresh)
    assert all(distance(weights(learner.model), weights(learners[0].model)) < 1e-6 for learner in learners)


def test_the_lora_critic_reads_the_weights_that_the_policy_has_now(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, critic="lora", critic_learning_rate=0.0))
    backbone, fresh = learner.critic.backbone, trajectories_of(learner.model)
    assert backbone is not None
    learner.update(fresh)
    mine, theirs = dict(backbone.named_parameters()), dict(learner.model.named_parameters())
    assert all(torch.equal(mine[name], parameter) for name, parameter in theirs.items())
    assert {name.rpartition(".")[2] for name in learner.critic.trained() if "backbone" in name} == {"lora_A", "lora_B"}


def test_the_separate_critic_trains_what_the_policy_trains(tiny_vla: Path) -> None:
    model = model_of(tiny_vla)
    apply_lora(model, rank=2, alpha=4, vision=False)
    learner = Learner(model, replace(CONFIG, critic="separate"))
    backbone = {n.removeprefix("backbone.") for n in learner.critic.trained() if n.startswith("backbone.")}
    assert backbone == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_succeeded_becomes_likelier(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, advantage="rloo", epochs=4, normalise=False))
    success, failure, *_ = trajectories_of(learner.model, (4, 4))
    learner.update([success, failure])

    def likelihood(trajectory: Trajectory) -> float:
        scored = learner.score([trajectory])
        return float(scored.policy.logprobs_BN.sum())

    assert likelihood(success) > success.logprobs_TN.sum() and likelihood(failure) < failure.logprobs_TN.sum()


def test_a_batch_cut_into_parts_gives_the_same_update(tiny_vla: Path) -> None:
    """Defect 8.  Parts of 3, 3 and 1: a mean of their means is another direction, which Adam does not forgive."""
    whole, parts = learner_of(tiny_vla, SLOW), learner_of(tiny_vla, replace(SLOW, microbatch=3))
    fresh = trajectories_of(whole.model, (3, 5, 5))
    for learner in (whole, parts):
        learner.update(fresh)
    assert distance(weights(whole.model), weights(parts.model)) < 1e-5


def frozen_vision(folder: Path, config: LearnerConfig, **options) -> Learner:
    model = model_of(folder)
    model.freeze_vision()
    return Learner(model, config, **options)


@pytest.mark.parametrize("critic", CRITICS)
def test_image_tokens_kept_over_the_epochs_give_the_same_update(tiny_vla: Path, critic: CriticKind) -> None:
    config = replace(SLOW, critic=critic)
    kept, again = (frozen_vision(tiny_vla, replace(config, keep_images=keep)) for keep in (True, False))
    fresh, seen = trajectories_of(kept.model), []
    for learner in (kept, again):
        images = count_images(learner.model)
        learner.update(fresh)
        seen.append(sum(images))
    decisions, ends = 12, 1
    epochs = config.epochs + (config.critic_epochs if critic != "shared" else 0)
    assert seen == [decisions + ends, decisions + ends + epochs * decisions]
    assert distance(weights(kept.model), weights(again.model)) < 1e-6
    assert distance(weights(kept.critic), weights(again.critic)) < 1e-6


def count_images(model: VLA) -> list[int]:
    """How many images every pass of the towers gets, from here on."""
    counts: list[int] = []
    model.vision_backbone.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    return counts


@pytest.mark.parametrize("critic", CRITICS)
def test_activations_computed_again_give_the_same_update(tiny_vla: Path, critic: CriticKind) -> None:
    """As for a batch cut into parts: to rounding."""
    learners = [learner_of(tiny_vla, replace(SLOW, critic=critic, recompute=recompute)) for recompute in (False, True)]
    fresh, passes = trajectories_of(learners[0].model), []
    for learner in learners:
        calls: list[torch.Tensor] = []
        attention = learner.model.language_model.model.layers[0].get_submodule("self_attn")
        attention.register_forward_hook(lambda _, __, output, calls=calls: calls.append(output))
        learner.update(fresh)
        passes.append(len(calls))
    scored, steps = 1, 2 * 2
    assert passes == [scored + steps, scored + 2 * steps]
    assert distance(weights(learners[0].model), weights(learners[1].model)) < 1e-5
    assert distance(weights(learners[0].critic), weights(learners[1].critic)) < 1e-5


def test_parts_of_a_minibatch_hold_prompts_of_about_one_length(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla)
    trajectory, *_ = trajectories_of(learner.model, (12,))
    lengths = np.array([len(observation.input_ids) for observation in trajectory.observations])
    rows = np.random.default_rng(0).permutation(12)[:10]
    parts = Prompter(learner.model, trajectory.observations).parts(rows, 4)
    assert sorted(np.concatenate(parts)) == sorted(rows) and [len(part) for part in parts] == [4, 4, 2]
    assert all(lengths[a].max() <= lengths[b].min() for a, b in pairwise(parts))


def _train_rank(ranks: Ranks, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    for critic in CRITICS:
        learner = frozen_vision(folder, replace(SLOW, critic=critic), ranks=ranks)
        learner.update(trajectories_of(model_of(folder)))
        torch.save(learned(learner), out / f"{critic} {ranks.rank}.pt")


def learned(learner: Learner) -> dict[str, torch.Tensor]:
    return weights(learner.model) | weights(learner.critic)


def test_two_ranks_give_the_update_of_one(tiny_vla: Path, tmp_path: Path) -> None:
    with launched(2, _train_rank, tiny_vla, tmp_path) as ranks:
        _train_rank(ranks, tiny_vla, tmp_path)
    for critic in CRITICS:
        alone = frozen_vision(tiny_vla, replace(SLOW, critic=critic))
        alone.update(trajectories_of(model_of(tiny_vla)))
        first, second = (torch.load(tmp_path / f"{critic} {rank}.pt") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert distance(learned(alone), first) < 1e-5


def test_a_minibatch_beyond_the_target_divergence_is_not_learned_from(tiny_vla: Path) -> None:
    config = replace(CONFIG, target_kl=1e-6, epochs=4, minibatch=64, microbatch=64, advantage="rloo")
    learner = learner_of(tiny_vla, config)
    passes: list[torch.Tensor] = []
    fresh = trajectories_of(learner.model)
    attention = learner.model.language_model.model.layers[0].get_submodule("self_attn")
    attention.register_forward_hook(lambda _, __, output: passes.append(output))
    metrics = learner.update(fresh)
    assert metrics["stopped_early"] == 1 and learner.steps == 1  # the first step saw no divergence yet
    assert len(passes) == 1 + 2, "after scoring, the step that moved it and the one that measured how far; no more"


def test_the_critic_takes_all_its_steps_where_divergence_stops_the_policy(tiny_vla: Path) -> None:
    stopped, warming = (
        learner_of(tiny_vla, replace(CONFIG, warm_up=warm_up, target_kl=1e-6, minibatch=64)) for warm_up in (0, 1)
    )
    fresh = trajectories_of(stopped.model)
    metrics = [learner.update(fresh) for learner in (stopped, warming)]
    assert metrics[0]["stopped_early"] == 1
    assert distance(weights(stopped.critic), weights(warming.critic)) == 0
    assert stopped.critic_optimizer.step_count == CONFIG.critic_epochs  # of one minibatch each


@pytest.mark.parametrize("warm_up", [0, 1])
def test_the_critics_gradient_reaches_the_backbone_where_it_is_asked_to_and_not_before_it_is_warm(
    tiny_vla: Path, warm_up: int
) -> None:
    config = replace(CONFIG, critic_gradient=True, warm_up=warm_up, learning_rate=1e-3)
    learner, alone = learner_of(tiny_vla, config), learner_of(tiny_vla, replace(config, critic_gradient=False))
    fresh, before = trajectories_of(learner.model), weights(learner.model)
    values = [learner.update(fresh)["value_loss"] for _ in range(2)]
    assert values[1] < values[0]
    for _ in range(2):
        alone.update(fresh)
    assert distance(weights(learner.model), weights(alone.model)) > 1e-5
    learner = learner_of(tiny_vla, config)
    learner.update(fresh)
    assert (distance(weights(learner.model), before) == 0) == bool(warm_up)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_loaded_learner_goes_on_bit_for_bit(tiny_vla: Path, critic: CriticKind) -> None:
    kept, resumed = (learner_of(tiny_vla, replace(CONFIG, critic=critic)) for _ in range(2))
    fresh = trajectories_of(kept.model)
    kept.update(fresh)
    resumed.load(kept.state())
    for learner in (kept, resumed):
        learner.update(fresh)
    assert (kept.iteration, kept.steps) == (resumed.iteration, resumed.steps)
    assert distance(weights(kept.model), weights(resumed.model)) == 0
    assert distance(weights(kept.critic), weights(resumed.critic)) == 0
    assert np.array_equal(kept.score(fresh).values_n, resumed.score(fresh).values_n)


def test_the_reference_holds_the_policy_back(tiny_vla: Path) -> None:
    fresh = trajectories_of(model_of(tiny_vla))
    start = weights(model_of(tiny_vla))
    moved = []
    for weight in (0.0, 100.0):
        config = replace(CONFIG, loss=LossConfig(reference_weight=weight), epochs=6)
        learner = learner_of(tiny_vla, config, reference=model_of(tiny_vla))
        metrics = [learner.update(fresh) for _ in range(2)]
        moved.append(metrics[-1]["reference_kl"])
        assert distance(weights(learner.model), start) > 0
    assert moved[1] < moved[0]


def test_without_a_critic_the_critic_learns_nothing(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, advantage="grpo"))
    before = weights(learner.critic)
    learner.update(trajectories_of(learner.model))
    assert distance(weights(learner.critic), before) == 0


def test_the_learning_rate_falls_in_a_line_and_a_resumed_run_goes_on_along_it(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, learning_rate=1e-3, anneal=4))
    fresh = trajectories_of(learner.model)
    rates = [learner.update(fresh)["learning_rate"] for _ in range(2)]
    resumed = learner_of(tiny_vla, learner.config)
    resumed.load(learner.state())
    rates += [resumed.update(fresh)["learning_rate"] for _ in range(2)]
    before = weights(resumed.model)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert resumed.update(fresh)["learning_rate"] == 0 and distance(weights(resumed.model), before) == 0


def test_how_far_older_weights_were_stops_no_update(tiny_vla: Path) -> None:
    """Overlapped episodes are one update old: were its divergence counted again, every second update would be none."""
    config = replace(CONFIG, target_kl=0.1, learning_rate=1e-6, minibatch=64, critic_learning_rate=0.0)
    learner = learner_of(tiny_vla, config)
    fresh = trajectories_of(learner.model)
    metrics = learner.update([replace(one, logprobs_TN=one.logprobs_TN - 1) for one in fresh], version=1)
    assert metrics["stopped_early"] == 0 and learner.steps == CONFIG.epochs
    assert metrics["ratio"] > 2 and metrics["update_kl"] < 1e-3
    assert "logprob_gap" not in metrics, "no answer was of version 1: there was nothing to compare"


def test_advantages_are_each_trajectorys_own_and_targets_are_never_normalised(tiny_vla: Path) -> None:
    """gamma .5, lambda .8: one ended after 2 + 1 ticks, one was cut after 3, before a value of .6 (defect 6)."""
    learner = learner_of(tiny_vla, replace(CONFIG, gamma=0.5, lambda_=0.8))
    ended, cut = trajectories_of(learner.model, (2, 1))
    both = [replace(ended, ticks_T=np.array([2, 1])), replace(cut, ticks_T=np.array([3]))]
    looked = replace(learner.score(both), values_n=np.array([0.5, 0.75, 0.25]), after_E=np.array([0.0, 0.6]))
    advantage_n, target_n = learner._advantages(both, [np.array([0.0, 1.0]), np.array([0.1])], looked)
    last, only = 1 - 0.75, 0.1 + 0.125 * 0.6 - 0.25
    first = 0.25 * 0.75 - 0.5 + 0.8 * 0.25 * last
    np.testing.assert_allclose(target_n, [first + 0.5, last + 0.75, only + 0.25])
    raw_n = np.array([first, last, only])
    np.testing.assert_allclose(advantage_n, (raw_n - raw_n.mean()) / raw_n.std())


def test_a_trajectory_is_bootstrapped_from_the_value_of_what_came_after_itself(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, warm_up=9, critic_learning_rate=1e-2))
    fresh = trajectories_of(learner.model, (2, 3, 2, 1))
    learner.update(fresh)
    after_E = learner.score(fresh).after_E
    assert after_E[[0, 2]].tolist() == [0, 0] and abs(after_E[1] - after_E[3]) > 1e-3
    for place in (1, 3):
        one = fresh[place]
        assert one.after is not None
        seen_now = replace(one, observations=(one.after, *one.observations[1:]))
        assert after_E[place] == pytest.approx(learner.score([seen_now]).values_n[0], abs=1e-5)


def test_only_episodes_that_began_alike_are_compared(tiny_vla: Path) -> None:
    """Two of state 0 with returns 1 and 0, two of state 1 with 1 and 1."""
    learner = learner_of(tiny_vla, replace(CONFIG, advantage="rloo"))
    four = trajectories_of(learner.model, (2, 1, 1, 1))
    four[3] = replace(four[3], rewards_T=np.array([1.0]))
    advantage_n, _ = learner._advantages(four, [one.rewards_T for one in four], learner.score(four))
    np.testing.assert_allclose(advantage_n, [1, 1, -1, 0, 0])


def test_an_episode_that_others_had_a_hand_in_compares_with_nothing(tiny_vla: Path) -> None:
    alone, together = (learner_of(tiny_vla, replace(CONFIG, advantage="rloo")) for _ in range(2))
    *fresh, helped = trajectories_of(alone.model, (3, 3, 3))
    alone.update(fresh)
    together.update([*fresh, replace(helped, whole=False, initial_state="0")])
    assert distance(weights(alone.model), weights(together.model)) == 0


def test_a_batch_in_which_nothing_compares_is_named(tiny_vla: Path) -> None:
    learner = learner_of(tiny_vla, replace(CONFIG, advantage="grpo"))
    helped = [replace(one, whole=False) for one in trajectories_of(learner.model)]
    with pytest.raises(ValueError, match=r"grpo compares whole episodes, of 3 none is: .* use gae"):
        learner.update(helped)


def test_rewards_that_are_given_take_the_place_of_the_outcomes(tiny_vla: Path) -> None:
    swapped, outcomes = (learner_of(tiny_vla, replace(CONFIG, advantage="rloo")) for _ in range(2))
    success, failure = trajectories_of(swapped.model, (3, 3))
    swapped.update([success, failure], [failure.rewards_T, success.rewards_T])
    outcomes.update([replace(success, rewards_T=failure.rewards_T), replace(failure, rewards_T=success.rewards_T)])
    start = weights(model_of(tiny_vla))
    assert distance(weights(swapped.model), weights(outcomes.model)) == 0 < distance(weights(swapped.model), start)


def test_gradients_of_uneven_ranks_add_up_to_that_of_one(tiny_vla: Path) -> None:
    """7 decisions, of which one rank has 3: means of their own would add up to another one, up to a scale unseen."""
    learner = learner_of(tiny_vla, replace(CONFIG, loss=LossConfig(entropy_weight=0.1)))
    fresh = trajectories_of(learner.model, (3, 4))
    batch, looked, rows = Batch.of(fresh), learner.score(fresh), np.arange(7)
    advantage_n, target_n = torch.linspace(-1, 1, 7), torch.linspace(0, 1, 7)
    gradients, metrics = [], []
    for ranks in ([Ranks()], [OneOfTwo(rank=0, size=2), OneOfTwo(rank=1, size=2)]):
        measured = []
        for learner.ranks in ranks:
            measured.append(learner._gradient(("policy", "critic"), batch, looked, rows, advantage_n, target_n))
        gradients.append(learner.policy_optimizer.gradient_P.clone())
        metrics.append({name: sum(one[name] for one in measured) for name in measured[0]})
        learner.policy_optimizer.forget()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-5)
    assert gradients[0].abs().max() > 1e-3


def test_how_far_an_update_has_moved_is_the_divergence_in_full(tiny_vla: Path) -> None:
    """Sampled tokens, of a policy some updates older, would tell it anyhow: one rare token makes it nats."""
    twice, once = (learner_of(tiny_vla, replace(CONFIG, minibatch=64, epochs=epochs)) for epochs in (2, 1))
    fresh = trajectories_of(once.model)
    batch, found = Batch.of(fresh), once.score(fresh).policy.logits_BNV
    once.update(fresh)
    moved = token_divergence(found, once.score(fresh).policy.logits_BNV, batch.temperature_n, batch.mask_nN)
    ticks = Counts.of(batch.mask_nN.numpy(), once.model.config.action_dim).ticks
    assert twice.update(fresh)["update_kl"] == pytest.approx((0 + float(moved.sum()) / ticks) / 2, rel=1e-3)
