"""How much of a policy gradient is signal, by the way its advantages are estimated.

    python -m benchmarks.gradient_noise --run runs/recipe/object-near-0 [--iterations 16]

The practice episodes of a run's first iterations are split at random into groups of about one iteration's size, and
each group's gradient is taken at the weights the run began with.  What two groups have in common is signal: the mean
inner product of two groups' gradients estimates |signal|^2, that of a gradient with itself |signal|^2 + |noise|^2.
Printed is their ratio for one group, and its standard error by a jackknife over groups; every coordinate is divided by
its root mean square over groups, as Adam would.  Critics are fitted to other groups than those they judge.  Taken is
the gradient of the language model's last block and head alone, a third of the work.  Prints a table and writes
benchmarks/results/gradient_noise.json.

Episodes must be independent: runs of one seed share theirs, and what they share looks like signal.

Shapes: G groups, n decisions of a group, E its trajectories, D width of the backbone, P numbers of a gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from protos import episode_pb2
from protos.episode_file import SUFFIX, read_episode
from rl_trainer.advantage import normalised
from rl_trainer.batching import Batch, Prompter
from rl_trainer.critic import Critic
from rl_trainer.learner import batch_gae
from rl_trainer.loss import token_logprobs
from rl_trainer.reward_model import load_reward_model
from rl_trainer.shaping import ShapingConfig, shaped_rewards
from rl_trainer.train_config import RECORD
from rl_trainer.trajectories import Trajectory, TrajectoryReader

ESTIMATORS = {
    f"{'shaped' if shaped else 'outcome'}, lambda {lambda_:g}": (shaped, lambda_)
    for shaped in (True, False)
    for lambda_ in (0.0, 0.5, 0.8, 0.95, 1.0)
}
FOLDS = 4
CRITIC = {"rounds": 8, "rows": 128, "rate": 1e-3}
"""A round: targets by the critic as it is, then one epoch."""
PASS = 64
RESULT = Path(__file__).parent / "results" / "gradient_noise.json"


@dataclass(frozen=True, kw_only=True)
class GradientNoiseConfig:
    """Measures signal and noise of the policy gradient in a run's episodes."""

    run: Path
    """folder of a run of GAE that had a reward model and started its own server"""
    iterations: int = 16
    """its first so many; the policy has hardly changed meanwhile, if its rate was low"""
    groups: int = 16
    out: Path = field(default=RESULT)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of the episodes."""

    trajectories: Sequence[Trajectory]
    hidden_nD: torch.Tensor
    after_ED: torch.Tensor
    """of what each trajectory was cut before; zeros where its task ended"""
    rewards: dict[bool, list[np.ndarray]]
    """shaped, and of the outcome alone"""


def main(config: GradientNoiseConfig) -> None:
    torch.set_num_threads(1)
    record = json.loads((config.run / RECORD).read_text())
    gamma = record["learner"]["gamma"]
    checkpoint = load_checkpoint(record["model"])
    reward = load_reward_model(Path(record["reward_model"]), checkpoint.config, checkpoint.tokenizer)
    trajectories = practised(config, checkpoint)
    order = np.random.default_rng(0).permutation(len(trajectories))
    groups = list[Group]()
    for number in range(config.groups):
        some = [trajectories[index] for index in order[number :: config.groups]]
        hidden_nD, after_ED = read(checkpoint, some)
        rewards = {
            shaped: shaped_rewards(some, reward if shaped else None, ShapingConfig(), gamma=gamma)
            for shaped in (True, False)
        }
        groups.append(Group(trajectories=some, hidden_nD=hidden_nD, after_ED=after_ED, rewards=rewards))
    print(f"{len(trajectories)} trajectories in {config.groups} groups", flush=True)
    advantages = {name: estimated(groups, *how, gamma=gamma) for name, how in ESTIMATORS.items()}
    gradients = gradients_of(checkpoint, groups, advantages)
    measured = {name: signal(gradients_GP) for name, gradients_GP in gradients.items()}
    for name, (ratio, error) in measured.items():
        print(f"{name:24} {ratio:7.4f} +- {error:.4f}")
    settings = {"run": config.run.name, "trajectories": len(trajectories), "groups": config.groups}
    config.out.write_text(json.dumps(settings | {"signal_to_noise_squared": measured}, indent=1) + "\n")


def practised(config: GradientNoiseConfig, checkpoint: Checkpoint) -> list[Trajectory]:
    """Of the run's first iterations, in the order they were asked for."""
    reader, found = TrajectoryReader(checkpoint.config, checkpoint.tokenizer), dict[tuple[int, int], list[Trajectory]]()
    for path in (config.run / "episodes").rglob(f"*{SUFFIX}"):
        episode = read_episode(path)
        if episode.start.purpose == episode_pb2.PURPOSE_TRAIN:
            _, iteration, number = episode.start.rollout_id.split("/")
            if int(iteration) < config.iterations:
                found[int(iteration), int(number)] = reader.read(episode)
    return [trajectory for _, some in sorted(found.items()) for trajectory in some]


@torch.no_grad()
def read(checkpoint: Checkpoint, trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a critic reads, float32: (n, D) of the decisions, (E, D) of what comes after them."""
    ends = [trajectory.after for trajectory in trajectories if trajectory.after is not None]
    observations = [observation for trajectory in trajectories for observation in trajectory.observations]
    prompts = Prompter(checkpoint.model, [*observations, *ends])
    hidden_ND = torch.zeros(len(observations) + len(ends), checkpoint.config.llm.hidden_size)
    for rows in prompts.parts(np.arange(len(hidden_ND)), PASS):
        hidden_ND[rows] = checkpoint.model.read(prompts(rows)).float()
    after_ED = torch.zeros(len(trajectories), hidden_ND.shape[1])
    after_ED[[trajectory.after is not None for trajectory in trajectories]] = hidden_ND[len(observations) :]
    return hidden_ND[: len(observations)], after_ED


def estimated(groups: Sequence[Group], shaped: bool, lambda_: float, *, gamma: float) -> list[np.ndarray]:
    """float64 (n,) per group: advantages by a critic of the other folds, normalised over all groups."""
    parts = [np.zeros(0)] * len(groups)
    for fold in range(FOLDS):
        critic = Critic(groups[0].hidden_nD.shape[1])
        optimizer = torch.optim.AdamW(critic.parameters(), lr=CRITIC["rate"], weight_decay=0.0)
        torch.manual_seed(0)
        others = [group for number, group in enumerate(groups) if number % FOLDS != fold]
        hidden_ND = torch.cat([group.hidden_nD for group in others])
        for _ in range(CRITIC["rounds"]):
            judged = [judge(critic, group, shaped, lambda_, gamma) for group in others]
            target_N = torch.from_numpy(
                np.concatenate([advantage_n + value_n for advantage_n, value_n in judged])
            ).float()
            for rows in torch.randperm(len(hidden_ND)).split(CRITIC["rows"]):
                loss = (critic(hidden_ND[rows]) - target_N[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for number in range(fold, len(groups), FOLDS):
            parts[number] = judge(critic, groups[number], shaped, lambda_, gamma)[0]
    every = normalised(np.concatenate(parts), np.ones(sum(map(len, parts)), bool))
    return np.split(every, np.cumsum([len(part) for part in parts])[:-1])


@torch.no_grad()
def judge(critic: Critic, group: Group, shaped: bool, lambda_: float, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """float64 (n,) each: advantages and values."""
    value_n, after_E = critic(group.hidden_nD).double().numpy(), critic(group.after_ED).double().numpy()
    after_E[[trajectory.after is None for trajectory in group.trajectories]] = 0.0
    rewards = group.rewards[shaped]
    return batch_gae(group.trajectories, rewards, value_n, after_E, gamma=gamma, lambda_=lambda_), value_n


def gradients_of(
    checkpoint: Checkpoint, groups: Sequence[Group], advantages: dict[str, list[np.ndarray]]
) -> dict[str, torch.Tensor]:
    """float32 (G, P) by estimator: of the mean over a group's decisions of advantage times log-probability."""
    model, last = checkpoint.model, f".layers.{checkpoint.config.llm.num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name and (last in name or "lm_head" in name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {name: torch.zeros(len(groups), sum(p.numel() for p in trained)) for name in advantages}
    for number, group in enumerate(groups):
        batch = Batch.of(group.trajectories)
        prompts = Prompter(model, batch.observations)
        for rows in prompts.parts(np.arange(len(batch)), PASS):
            logits_BNV = model(prompts(rows), batch.token_ids_nN[rows]).logits_BNV
            chosen_BN = batch.token_ids_nN[rows] - checkpoint.config.action_begin
            mask_BN = batch.mask_nN[rows]
            logprobs_BN = token_logprobs(logits_BNV, chosen_BN, batch.temperature_n[rows], mask_BN)
            said_B = torch.where(mask_BN, logprobs_BN, 0.0).sum(1) / len(batch)
            for name, of_groups in advantages.items():
                weight_B = torch.from_numpy(of_groups[number][rows]).float()
                parts = torch.autograd.grad(said_B @ weight_B, trained, retain_graph=True)
                found[name][number] += torch.cat([part.reshape(-1) for part in parts])
        print(f"group {number + 1} of {len(groups)}", flush=True)
    return found


def signal(gradients_GP: torch.Tensor) -> tuple[float, float]:
    """|signal|^2 / |noise|^2 of one group, and its standard error."""
    scaled_GP = gradients_GP / gradients_GP.square().mean(0).sqrt().clamp_min(1e-12)
    products_GG = (scaled_GP @ scaled_GP.T).double()
    own = float(products_GG.diagonal().mean())

    def common(kept: list[int]) -> float:
        some = products_GG[kept][:, kept]
        return float((some.sum() - some.diagonal().sum()) / (len(kept) * (len(kept) - 1)))

    every = list(range(len(products_GG)))
    left_out = np.array([common([other for other in every if other != one]) for one in every])
    shared, error = common(every), np.sqrt((len(every) - 1) * left_out.var())
    return shared / (own - shared), float(error) / (own - shared)


if __name__ == "__main__":
    main(tyro.cli(GradientNoiseConfig, description=__doc__))
