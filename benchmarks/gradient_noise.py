"""How much of a policy gradient is signal, by the way its advantages are estimated.

    python -m benchmarks.gradient_noise --run RUN [--first 0] [--iterations 10]

Each iteration's practice episodes give a gradient, at the weights that the run began with and that practised them: RUN
is of critic warm-up alone (`train --learner.warm-up 10 --iterations 10`).  What two iterations have in common is
signal: the mean inner product of two gradients estimates |signal|^2, that of a gradient with itself
|signal|^2 + |noise|^2.  Printed is their ratio for one iteration and its standard error by a jackknife over all;
plain, as SGD would step, and with every coordinate divided by its root mean square over iterations, as Adam would.
Critics are fitted to other iterations than those they judge, on what the backbone made of the observations when the run
began.  Prints a table and writes benchmarks/results/gradient_noise/RUN.json.

Episodes must be independent: runs of one seed share theirs, and what they share looks like signal.

Shapes: G iterations, n decisions of one, E its trajectories, D width of the backbone, P numbers of a gradient.
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
from rl_trainer.advantage import batch_gae, normalised
from rl_trainer.batching import Batch, Prompter
from rl_trainer.critic import Critic
from rl_trainer.loss import token_logprobs
from rl_trainer.reward_model import RewardModel, load_reward_model
from rl_trainer.shaping import ShapingConfig, shaped_rewards
from rl_trainer.train_config import RECORD
from rl_trainer.trajectories import Trajectory, TrajectoryReader

ESTIMATORS = {
    f"{'shaped' if shaped else 'outcome'}, lambda {lambda_:g}": (shaped, lambda_)
    for shaped in (True, False)
    for lambda_ in (0.0, 0.6, 0.95)
}
FOLDS = 4
CRITIC = {"rounds": 8, "rows": 128, "rate": 1e-3}
"""A round: targets by the critic as it is, then one epoch."""
PASS = 64
RESULTS = Path(__file__).parent / "results" / "gradient_noise"


@dataclass(frozen=True, kw_only=True)
class GradientNoiseConfig:
    """Measures signal and noise of the policy gradient in a run's episodes."""

    run: Path
    """folder of a run of GAE that had a reward model and started its own server"""
    first: int = 0
    """iteration, from 0"""
    iterations: int = 10
    threads: int = 2
    out: Path = field(default=RESULTS)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The episodes of an iteration."""

    trajectories: Sequence[Trajectory]
    hidden_nD: torch.Tensor
    after_ED: torch.Tensor
    """of what each trajectory was cut before; zeros where its task ended"""
    rewards: dict[bool, list[np.ndarray]]
    """shaped, and of the outcome alone"""


def main(config: GradientNoiseConfig) -> None:
    torch.set_num_threads(config.threads)
    record = json.loads((config.run / RECORD).read_text())
    gamma, warm_up = record["learner"]["gamma"], record["learner"]["warm_up"]
    if config.first + config.iterations > warm_up:  # later ones were practised with other weights
        raise ValueError(
            f"iterations must be of the warm-up, the first {warm_up}, got {config.first} + {config.iterations}"
        )
    checkpoint = load_checkpoint(record["model"])
    reward = load_reward_model(Path(record["reward_model"]), checkpoint.config, checkpoint.tokenizer)
    groups = [group_of(some, record, checkpoint, reward) for some in practised(config, checkpoint)]
    print(f"{sum(len(group.trajectories) for group in groups)} trajectories of {len(groups)} iterations", flush=True)
    advantages = {name: estimated(groups, *how, gamma=gamma) for name, how in ESTIMATORS.items()}
    gradients = gradients_of(checkpoint, groups, advantages)
    measured = {name: {"plain": signal(g_GP), "adam": signal(scaled(g_GP))} for name, g_GP in gradients.items()}
    for name, ratios in measured.items():
        print(f"{name:24}", *(f"{how} {ratio:7.4f} +- {error:.4f}" for how, (ratio, error) in ratios.items()))
    about = {name: record[name] for name in ("temperature", "noise_correlation", "rollouts") if name in record}
    about |= {"run": config.run.name, "first": config.first, "iterations": len(groups)}
    config.out.mkdir(parents=True, exist_ok=True)
    result = json.dumps(about | {"signal_to_noise_squared": measured}, indent=1)
    (config.out / f"{config.run.name}.json").write_text(result + "\n")


def practised(config: GradientNoiseConfig, checkpoint: Checkpoint) -> list[list[Trajectory]]:
    """Of each iteration that is asked for."""
    reader, last = TrajectoryReader(checkpoint.config, checkpoint.tokenizer), config.first + config.iterations
    found = {iteration: list[Trajectory]() for iteration in range(config.first, last)}
    for path in sorted((config.run / "episodes").rglob(f"*{SUFFIX}")):
        episode = read_episode(path)
        if episode.start.purpose == episode_pb2.PURPOSE_TRAIN:
            iteration = int(episode.start.rollout_id.split("/")[1])
            if iteration in found:
                found[iteration] += reader.read(episode)
    if missing := [iteration for iteration, some in found.items() if not some]:
        raise ValueError(
            f"{config.run} must have episodes of iterations {config.first} to {last - 1}, none of {missing}"
        )
    return list(found.values())


def group_of(trajectories: Sequence[Trajectory], record: dict, checkpoint: Checkpoint, reward: RewardModel) -> Group:
    """Reads what the episodes show."""
    hidden_nD, after_ED = read(checkpoint, trajectories)
    gamma = record["learner"]["gamma"]
    rewards = {
        shaped: shaped_rewards(trajectories, reward if shaped else None, ShapingConfig(), gamma=gamma)
        for shaped in (True, False)
    }
    return Group(trajectories=trajectories, hidden_nD=hidden_nD, after_ED=after_ED, rewards=rewards)


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
    every = normalised(np.concatenate(parts))
    return np.split(every, np.cumsum([len(part) for part in parts])[:-1])


@torch.no_grad()
def judge(critic: Critic, group: Group, shaped: bool, lambda_: float, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """float64 (n,) each: advantages and values."""
    value_n, after_E = critic(group.hidden_nD).double().numpy(), critic(group.after_ED).double().numpy()
    after_E[[trajectory.after is None for trajectory in group.trajectories]] = 0.0
    rewards, ticks = group.rewards[shaped], [trajectory.ticks_T for trajectory in group.trajectories]
    return batch_gae(rewards, ticks, value_n, after_E, gamma=gamma, lambda_=lambda_), value_n


def gradients_of(
    checkpoint: Checkpoint, groups: Sequence[Group], advantages: dict[str, list[np.ndarray]]
) -> dict[str, torch.Tensor]:
    """float32 (G, P) by estimator: of the mean over a group's decisions of advantage times log-probability."""
    model, trained = checkpoint.model, list(checkpoint.model.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
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


def scaled(gradients_GP: torch.Tensor) -> torch.Tensor:
    """As Adam does."""
    return gradients_GP / gradients_GP.square().mean(0).sqrt().clamp_min(1e-12)


def signal(gradients_GP: torch.Tensor) -> tuple[float, float]:
    """|signal|^2 / |noise|^2 of one group, and its standard error."""
    products_GG = (gradients_GP @ gradients_GP.T).double()
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
