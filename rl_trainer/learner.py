"""One iteration of learning: values, advantages, epochs of the critic, epochs of clipped updates of the policy.

A critic that shares the policy's backbone learns from the hidden states of the pass that scored the batch: its epochs
cost next to nothing, and go on where the policy's divergence stops the policy.  Everything random is a function of
(seed, iteration, epoch), so that ranks and resumed runs agree without saving a generator; every rank calls update()
with the same trajectories, computes its part, and ends with the same weights.

Lessons that are given beside the trajectories are cloned in the policy's own steps, and stop where those stop.  They
need no critic: where there are no trajectories, the policy learns from them alone.

Shapes: n decisions of a batch, E trajectories, B decisions of a minibatch, N = K*A action tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch

from policy_server.vla.model import VLA, Prompts
from rl_trainer.advantage import batch_gae, group_relative, leave_one_out, normalised
from rl_trainer.batching import Batch, Prompter, minibatches
from rl_trainer.critic import critic_of
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.lessons import Lesson
from rl_trainer.loss import (
    Counts,
    Loss,
    divergence_estimate,
    ppo_loss,
    token_divergence,
    token_entropy,
    token_logprobs,
    value_loss,
)
from rl_trainer.optimizer import Optimizer
from rl_trainer.ranks import Ranks
from rl_trainer.trajectories import Trajectory
from rl_trainer.tutor import Tutor

LOOK_BATCH = 64
"""Decisions of one pass without gradients."""
MEASURES = {
    "critic": ("value_loss",),
    "policy": ("policy_loss", "ratio", "update_kl", "clip_fraction", "reference_kl"),
}
"""Who learns, and what adds up for it over the parts of a minibatch."""
PREFIXES = {"critic": "critic_", "policy": ""}
"""Of the names of its other measures."""


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What a policy makes of some decisions."""

    logprobs_BN: torch.Tensor
    entropy_BN: torch.Tensor
    hidden_BD: torch.Tensor
    """float32: where a critic that shares the backbone reads"""
    logits_BNV: torch.Tensor
    """float32, detached"""
    divergence_BN: torch.Tensor | None = None
    """from the reference policy, where one was given"""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What the learner thinks of a batch before it learns from it."""

    prompts: Prompter
    """of the batch's rows"""
    values_n: np.ndarray
    after_E: np.ndarray
    """value of what each trajectory was cut before; 0 where its task ended"""
    policy: Opinion
    """without logits while the critic warms up: nobody asks how far the policy moves"""
    reference_nNV: torch.Tensor | None
    """logits of the reference policy"""


class Learner:
    """Owns the weights that are trained: the model's parameters that require gradients, and those of a fresh critic.

    reference: the policy that loss.reference_weight holds on to, never trained.
    """

    def __init__(
        self,
        model: VLA,
        config: LearnerConfig,
        *,
        reference: VLA | None = None,
        ranks: Ranks | None = None,
        seed: int = 0,
    ):
        if config.loss.reference_weight and reference is None:
            raise ValueError(f"reference_weight {config.loss.reference_weight} needs a reference policy, got none")
        self.model, self.config, self.seed = model, config, seed
        self.reference = reference
        self.ranks = ranks or Ranks()
        self.iteration = self.steps = 0
        model.recompute_blocks(config.recompute)
        model.eval()  # with an adapter's dropout it would not be the policy that played
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.policy_optimizer = _optimizer(trained, config, average=config.average)
        # After the policy's optimiser, which lays out anew the weights that a critic may share.
        self.critic = critic_of(model, config.critic, rank=config.critic_rank, seed=seed)
        self.critic_optimizer = _optimizer(self.critic.trained(), config)

    def update(
        self,
        trajectories: Sequence[Trajectory],
        rewards: Sequence[np.ndarray] | None = None,
        lessons: Iterable[Lesson] = (),
        *,
        version: int = -1,
    ) -> dict[str, float]:
        """Learns from the trajectories and from the lessons, of either there may be none; gives what was measured.

        rewards: per trajectory, float64 (T,); by default those of the episodes' outcomes.
        version: the weights as they are now; log-probabilities that it answered must equal the learner's.
        Raises ValueError where there is nothing to learn from.
        """
        rewards = [trajectory.rewards_T for trajectory in trajectories] if rewards is None else rewards
        tutor = Tutor(
            self.model,
            lessons,
            weights={"success": self.config.success_weight, "intervention": self.config.intervention_weight},
            draw=self.config.lessons,
            microbatch=self.config.microbatch,
            keep_images=self.config.keep_images,
            ranks=self.ranks,
            seed=(self.seed, self.iteration),
        )
        if self.config.advantage != "gae":  # an outcome that others had a hand in compares with nothing
            whole = [number for number, trajectory in enumerate(trajectories) if trajectory.whole]
            if trajectories and not whole and not tutor:
                raise ValueError(
                    f"{self.config.advantage} compares whole episodes, of {len(trajectories)} none is: others had a"
                    " hand in each; use gae"
                )
            trajectories, rewards = [trajectories[n] for n in whole], [rewards[n] for n in whole]
        if trajectories:
            metrics = self._learn(trajectories, rewards, tutor, version)
        elif tutor:
            metrics = self._clone(tutor)
        else:
            raise ValueError("there is nothing to learn from: no trajectories, and no lessons of a kind with a weight")
        self.iteration += 1
        return metrics | tutor.counts

    @property
    def warming_up(self) -> bool:
        """Trajectories teach the critic alone."""
        return self.config.advantage == "gae" and self.iteration < self.config.warm_up

    @property
    def learning_rate(self) -> float:
        """Of the policy, in this iteration."""
        config = self.config
        left = 1 - self.iteration / config.anneal if config.anneal else 1.0
        return config.learning_rate * max(left, 0.0)

    def averaged(self) -> AbstractContextManager[None]:
        """The model is the policy that is released, inside the block: its weights' average, where there is one."""
        return self.policy_optimizer.averaged()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a bit-for-bit continuation needs, by name."""
        tensors = {"iteration": torch.tensor(self.iteration), "steps": torch.tensor(self.steps)}
        for owner, optimizer in self._optimizers().items():
            tensors |= {f"{owner}.{name}": tensor for name, tensor in optimizer.state().items()}
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what state() gave.  Raises ValueError when it is of another model."""
        for owner, optimizer in self._optimizers().items():
            prefix = f"{owner}."
            optimizer.load({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        self.iteration, self.steps = int(tensors["iteration"]), int(tensors["steps"])

    def _optimizers(self) -> dict[str, Optimizer]:
        return {"policy": self.policy_optimizer, "critic": self.critic_optimizer}

    def score(self, trajectories: Sequence[Trajectory], batch: Batch | None = None) -> Looked:
        """Values and log-probabilities under the present weights; each rank computes its part."""
        batch = batch or Batch.of(trajectories)
        ends = [trajectory.after for trajectory in trajectories if trajectory.after is not None]
        n, width = batch.token_ids_nN.shape
        prompts = Prompter(self.model, [*batch.observations, *ends], keep_images=self.config.keep_images)
        ids = torch.cat((batch.token_ids_nN, batch.token_ids_nN[:1].expand(len(ends), width)))
        mask, temperature = torch.zeros(ids.shape, dtype=torch.bool), torch.ones(len(ids))
        mask[:n], temperature[:n] = batch.mask_nN, batch.temperature_n
        logprobs, entropy = torch.zeros(ids.shape), torch.zeros(ids.shape)
        reference, bins = self.reference, self.model.config.n_action_bins
        found = torch.zeros(*ids.shape, 0 if self.warming_up else bins)
        apart = torch.zeros(*ids.shape, bins if reference is not None else 0)
        values, hidden = torch.zeros(len(ids)), torch.zeros(len(ids), self.model.config.llm.hidden_size)
        mine = np.arange(len(ids))[self.ranks.part(len(ids))]
        with torch.no_grad():
            for rows in prompts.parts(mine, LOOK_BATCH):
                seen, asked = prompts(rows), (ids[rows], temperature[rows], mask[rows])
                policy = self._opinion(seen, *asked)
                logprobs[rows], entropy[rows] = policy.logprobs_BN.cpu(), policy.entropy_BN.cpu()
                hidden[rows], values[rows] = policy.hidden_BD.cpu(), self._values(seen, policy.hidden_BD).cpu()
                if not self.warming_up:
                    found[rows] = policy.logits_BNV.cpu()
                if reference is not None:
                    if not self.model.vision_is_frozen:  # else it sees the same
                        seen = replace(seen, image_tokens_BCD=None)
                    apart[rows] = reference(seen, ids[rows].to(self.model.device)).logits_BNV.float().cpu()
        for tensor in (values, logprobs, entropy, hidden, found, apart):
            self.ranks.sum(tensor)
        after_E = np.zeros(len(trajectories))
        after_E[[trajectory.after is not None for trajectory in trajectories]] = values[n:].numpy()
        return Looked(
            prompts=prompts,
            values_n=values[:n].double().numpy(),
            after_E=after_E,
            policy=Opinion(
                logprobs_BN=logprobs[:n], entropy_BN=entropy[:n], hidden_BD=hidden[:n], logits_BNV=found[:n]
            ),
            reference_nNV=None if reference is None else apart[:n],
        )

    def _advantages(
        self, trajectories: Sequence[Trajectory], rewards: Sequence[np.ndarray], looked: Looked
    ) -> tuple[np.ndarray, np.ndarray]:
        """float64 (n,) each: advantages, and what the critic should have said."""
        config, lengths = self.config, [len(trajectory) for trajectory in trajectories]
        if config.advantage == "gae":
            ticks, how = [one.ticks_T for one in trajectories], {"gamma": config.gamma, "lambda_": config.lambda_}
            advantage_n = batch_gae(rewards, ticks, looked.values_n, looked.after_E, **how)
            target_n = advantage_n + looked.values_n
            if config.normalise:
                advantage_n = normalised(advantage_n)
        else:
            compare = group_relative if config.advantage == "grpo" else leave_one_out
            groups = [(trajectory.task, trajectory.initial_state) for trajectory in trajectories]
            advantage_n = np.repeat(compare(np.array([r_T.sum() for r_T in rewards]), groups), lengths)
            target_n = looked.values_n
        return advantage_n, target_n

    def _learn(
        self, trajectories: Sequence[Trajectory], rewards: Sequence[np.ndarray], tutor: Tutor, version: int
    ) -> dict[str, float]:
        """The critic's steps and the policy's; means of what they measured, and what was measured before."""
        batch = Batch.of(trajectories)
        looked = self.score(trajectories, batch)
        advantage_n, target_n = self._advantages(trajectories, rewards, looked)
        work = (batch, looked, torch.from_numpy(advantage_n).float(), torch.from_numpy(target_n).float())
        gae = self.config.advantage == "gae"
        metrics = dict[str, float]()
        if gae and (self.warming_up or not self.config.critic_gradient):
            metrics |= self._epochs(("critic",), *work)
        if not self.warming_up:
            metrics["learning_rate"] = self.learning_rate
            who = ("policy", "critic") if gae and self.config.critic_gradient else ("policy",)
            metrics |= self._epochs(who, *work, tutor)
        return metrics | {"optimiser_steps": float(self.steps)} | _measured_before(batch, looked, target_n, version)

    def _clone(self, tutor: Tutor) -> dict[str, float]:
        """Epochs of optimiser steps of the policy, from the lessons alone; means of what they measured.

        They end as those from trajectories do, before the policy has moved further; here on the lessons of the first.
        """
        measured, stopped, found = defaultdict[str, list[float]](list), False, tutor.logits(0)
        for step in range(self.config.epochs * tutor.steps):
            metrics = tutor.gradient(step) | {"update_kl": tutor.divergence(0, found)}
            self.ranks.sum(self.policy_optimizer.collect_gradients())
            stopped = self._move(("policy",), metrics, measured)
            if stopped:
                break
        means = {name: float(np.mean(numbers)) for name, numbers in measured.items()}
        rate, steps = self.learning_rate, float(self.steps)
        return means | {"stopped_early": float(stopped), "learning_rate": rate, "optimiser_steps": steps}

    def _epochs(
        self,
        who: Sequence[str],
        batch: Batch,
        looked: Looked,
        advantage_n: torch.Tensor,
        target_n: torch.Tensor,
        tutor: Tutor | None = None,
    ) -> dict[str, float]:
        """Epochs of optimiser steps; means of what they measured, the minibatch that stopped them included.

        tutor: adds the lessons' gradient to every step.
        """
        config, measured, stopped = self.config, defaultdict[str, list[float]](list), False
        size, epochs = config.minibatch, config.epochs
        if "policy" not in who:
            size, epochs = config.critic_minibatch, config.critic_epochs
        order = minibatches(len(batch), size, epochs=epochs, seed=self.seed, iteration=self.iteration)
        for step, rows in enumerate(order):
            taught = tutor.gradient(step) if tutor else {}
            metrics = taught | self._gradient(who, batch, looked, rows, advantage_n, target_n)
            stopped = self._move(who, metrics, measured)
            if stopped:
                break
        means = {name: float(np.mean(numbers)) for name, numbers in measured.items()}
        return means | ({"stopped_early": float(stopped)} if "policy" in who else {})

    def _gradient(
        self,
        who: Sequence[str],
        batch: Batch,
        looked: Looked,
        rows: np.ndarray,
        advantage_n: torch.Tensor,
        target_n: torch.Tensor,
    ) -> dict[str, float]:
        """Adds the minibatch's gradient, over all ranks, and gives its measures."""
        counts = Counts.of(batch.mask_nN[rows].numpy(), self.model.config.action_dim)
        mine = rows[self.ranks.part(len(rows))]
        sums = dict.fromkeys([measure for owner in who for measure in MEASURES[owner]], 0.0)
        if looked.reference_nNV is None:
            sums.pop("reference_kl", None)
        for part in looked.prompts.parts(mine, self.config.microbatch):
            loss = self._loss(who, batch, looked, part, advantage_n[part], target_n[part], counts)
            if loss.total.requires_grad:
                loss.total.backward()
            for owner in who:
                self._optimizers()[owner].collect_gradients()  # parts add up in float32
            for name in sums:
                sums[name] += float(loss.metrics.get(name, 0.0))
        for owner in who:
            self.ranks.sum(self._optimizers()[owner].collect_gradients())
        total = self.ranks.sum(torch.tensor(list(sums.values()), dtype=torch.float64))
        return dict(zip(sums, total.tolist(), strict=True))

    def _loss(
        self,
        who: Sequence[str],
        batch: Batch,
        looked: Looked,
        part: np.ndarray,
        advantage_B: torch.Tensor,
        target_B: torch.Tensor,
        counts: Counts,
    ) -> Loss:
        """Of a part of a minibatch."""
        if "policy" not in who:
            return self._value_loss(self._values_apart(looked, part), looked, part, target_B, counts)
        config, device = self.config, self.model.device
        asked = (batch.token_ids_nN[part], batch.temperature_n[part], batch.mask_nN[part])
        reference_BNV = None if looked.reference_nNV is None else looked.reference_nNV[part]
        policy = self._opinion(looked.prompts(part), *asked, reference_BNV)
        found_BNV = looked.policy.logits_BNV[part].to(device)
        moved_BN = token_divergence(found_BNV, policy.logits_BNV, *(tensor.to(device) for tensor in asked[1:]))
        loss = ppo_loss(
            policy.logprobs_BN,
            batch.behaviour_nN[part].to(device),
            advantage_B.to(device),
            batch.mask_nN[part].to(device),
            config=config.loss,
            counts=counts,
            action_dim=self.model.config.action_dim,
            found_BN=looked.policy.logprobs_BN[part].to(device),
            moved_BN=moved_BN,
            entropy_BN=policy.entropy_BN,
            divergence_BN=policy.divergence_BN,
        )
        if "critic" not in who:
            return loss
        value = self._value_loss(self.critic(policy.hidden_BD), looked, part, target_B, counts)
        return Loss(total=loss.total + config.critic_weight * value.total, metrics=loss.metrics | value.metrics)

    def _value_loss(
        self, values_B: torch.Tensor, looked: Looked, part: np.ndarray, target_B: torch.Tensor, counts: Counts
    ) -> Loss:
        recorded_B = torch.from_numpy(looked.values_n[part]).float().to(values_B.device)
        return value_loss(values_B, recorded_B, target_B.to(values_B.device), config=self.config.loss, counts=counts)

    def _values_apart(self, looked: Looked, part: np.ndarray) -> torch.Tensor:
        """float32 (B,), of which no gradient reaches the policy."""
        if self.critic.backbone is None:
            return self.critic(looked.policy.hidden_BD[part].to(self.model.device))
        with torch.no_grad():
            prompts = looked.prompts(part)
        return self.critic.read(prompts)

    def _opinion(
        self,
        prompts: Prompts,
        ids_BN: torch.Tensor,
        temperature_B: torch.Tensor,
        mask_BN: torch.Tensor,
        reference_BNV: torch.Tensor | None = None,
    ) -> Opinion:
        """Log-probabilities as the server reports them; the entropy has a gradient only where one is asked for."""
        model = self.model
        ids_BN, temperature_B, mask_BN = (t.to(model.device) for t in (ids_BN, temperature_B, mask_BN))
        scores = model(prompts, ids_BN)
        logits_BNV = scores.logits_BNV
        logprobs_BN = token_logprobs(logits_BNV, ids_BN - model.config.action_begin, temperature_B, mask_BN)
        divergence_BN = None
        if reference_BNV is not None:
            divergence_BN = token_divergence(logits_BNV, reference_BNV.to(model.device), temperature_B, mask_BN)
        measured_BNV = logits_BNV if self.config.loss.entropy_weight else logits_BNV.detach()
        return Opinion(
            logprobs_BN=logprobs_BN,
            entropy_BN=token_entropy(measured_BNV, temperature_B, mask_BN),
            hidden_BD=scores.hidden_BD.float(),
            logits_BNV=logits_BNV.detach().float(),
            divergence_BN=divergence_BN,
        )

    def _values(self, prompts: Prompts, hidden_BD: torch.Tensor) -> torch.Tensor:
        """float32 (B,)"""
        return self.critic(hidden_BD) if self.critic.backbone is None else self.critic.read(prompts)

    def _move(self, who: Sequence[str], metrics: Mapping[str, float], measured: dict[str, list[float]]) -> bool:
        """One optimiser step of whoever learns; none, and True, where the policy has moved far enough.

        measured: is told the step's metrics, the norms of its gradients, and whether it was left out because its
        gradient is not finite.
        """
        told, stopped = dict(metrics), 0 < self.config.target_kl < metrics.get("update_kl", 0)
        rates = {"critic": self.config.critic_learning_rate, "policy": self.learning_rate}
        for owner in who:
            optimizer, prefix = self._optimizers()[owner], PREFIXES[owner]
            if stopped:
                optimizer.forget()
                continue
            norm = optimizer.step(rates[owner])
            finite = math.isfinite(norm)
            told |= {f"{prefix}gradient_norm": norm} if finite else {}
            told[f"{prefix}steps_left_out"] = float(not finite)
            self.steps += finite and owner == "policy"
        for name, value in told.items():
            measured[name].append(value)
        return stopped


def left_out(metrics: Mapping[str, float]) -> str:
    """What is to be said of steps that an update left out; empty where it left out none."""
    shares = {owner: metrics.get(f"{prefix}steps_left_out", 0.0) for owner, prefix in PREFIXES.items()}
    lost = [f"{share:.0%} of the steps of the {owner}" for owner, share in shares.items() if share]
    return f"left out, since gradients are not finite: {', '.join(lost)}" if lost else ""


def _optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: LearnerConfig, *, average: float = 0.0
) -> Optimizer:
    return Optimizer(parameters, weight_decay=config.weight_decay, clip_norm=config.clip_norm, ema=average)


def _measured_before(batch: Batch, looked: Looked, target_n: np.ndarray, version: int) -> dict[str, float]:
    """What the batch says about critic and server before anything was learned from it."""
    spread, mine = float(target_n.var()), torch.from_numpy(batch.version_n == version)
    log_ratio = looked.policy.logprobs_BN - batch.behaviour_nN
    gap = log_ratio[mine][batch.mask_nN[mine]].abs()
    # Overlapped episodes are all of an older version: then nothing is compared.
    compared = {"logprob_gap": float(gap.max())} if len(gap) else {}
    return compared | {
        "value": float(looked.values_n.mean()),
        "entropy": float(looked.policy.entropy_BN[batch.mask_nN].mean()),
        "explained_variance": 1 - float((target_n - looked.values_n).var()) / spread if spread else 0.0,
        # Of a token, from who played to the policy that was found.
        "staleness_kl": float(divergence_estimate(log_ratio[batch.mask_nN]).mean()),
    }
