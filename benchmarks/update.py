"""Samples a second of our update beside a plain PPO step with transformers and peft, on the same shapes in one run.

The plain side is what one would write first: a LlamaForCausalLM over prompt and action tokens, logits of the whole
vocabulary at every position, log_softmax, gather, the clipped loss, a value head on the last hidden state, AdamW on all
weights of the decoder or on peft's adapters.  Once with the vision towers in every pass, once with their features given
for nothing.  Both sides value the batch, then make one epoch of optimiser steps; neither trains a tower.  One decision
is one sample.  The rounds alternate between the sides, so that a busy machine slows all; on a CPU, time is CPU time.

    python -m benchmarks.update
    python -m benchmarks.update --weights lora
    python -m benchmarks.update --shape openvla-7b --weights lora --device cuda --recompute

Shapes: B decisions of a pass, L tokens of a row, N action tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import peft
import torch
import tyro
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from policy_server.vla.config import TOWERS, VLAConfig, nano_config
from policy_server.vla.config import LlamaConfig as OurLlamaConfig
from policy_server.vla.lora import apply_lora
from policy_server.vla.model import VLA, collate
from policy_server.vla.preprocessing import Prepared
from rl_trainer.learner import Learner
from rl_trainer.learner_config import LearnerConfig
from rl_trainer.trajectories import Trajectory

STATISTICS = {
    "none": {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}
PROMPT_TOKENS = (18, 26)
"""shortest and longest"""
Llama = LlamaForCausalLM | peft.PeftModel
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    shape: Literal["nano", "openvla-7b"] = "nano"
    """random weights of this architecture; the larger one in bfloat16"""
    weights: Literal["full", "lora"] = "full"
    """what is trained of the decoder"""
    rank: int = 32
    decisions: int = 128
    """of the batch"""
    minibatch: int = 64
    """decisions of an optimiser step"""
    microbatch: int = 32
    """decisions of a pass"""
    recompute: bool = False
    """activation checkpointing, on both sides"""
    rounds: int = 3
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.shape != "nano" and self.weights == "full":
            raise ValueError(f"weights must be lora for {self.shape}, got full: AdamW on 7 B weights fits no one GPU")


def main(config: Config) -> None:
    """Print the table."""
    torch.set_num_threads(config.threads)
    vla = build(config)
    plain_llama = llama_like(vla, config)
    if config.weights == "lora":
        apply_lora(vla, rank=config.rank, alpha=config.rank, vision=False)
    else:
        vla.requires_grad_(False).language_model.requires_grad_(True)
    ours = Ours(vla, config)
    batch = recorded(ours.learner, episodes(vla.config, config.decisions))
    contenders = {
        "ours": ours,
        "plain, towers in every pass": Plain(vla, plain_llama, config),
        "plain, features given": Plain(vla, plain_llama, config, features=features(vla, batch, config)),
    }
    print(f"{config}\nlargest difference of a log-probability before training: {difference(contenders, batch):.1g}\n")
    spent = {name: [side.timed(batch)] for name, side in contenders.items()}  # the first round warms up
    for _ in range(config.rounds):
        for name, side in contenders.items():
            spent[name].append(side.timed(batch))
    rates = {name: config.decisions / np.median([s for s, _ in turns[1:]]) for name, turns in spent.items()}
    print(f"{'':30}{'samples/s':>12}{'ours is':>10}{'peak GiB':>10}")
    for name, rate in rates.items():
        peak_gib = max(peak for _, peak in spent[name]) / 2**30
        print(f"{name:30}{rate:12.2f}{rates['ours'] / rate:9.2f}x{peak_gib or float('nan'):10.1f}")


class Side:
    """Updates from a batch; both sides are timed alike."""

    device: str

    def update(self, trajectories: Sequence[Trajectory]) -> None:
        raise NotImplementedError

    def timed(self, trajectories: Sequence[Trajectory]) -> tuple[float, int]:
        """Seconds that an update takes, and the peak of the GPU's memory in bytes, 0 on a CPU."""
        if self.device == "cpu":
            started_s = time.process_time()
            self.update(trajectories)
            return time.process_time() - started_s, 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started_s = time.perf_counter()
        self.update(trajectories)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s, torch.cuda.max_memory_allocated()


class Ours(Side):
    """The learner as a run uses it."""

    def __init__(self, vla: VLA, config: Config):
        self.device = config.device
        settings = LearnerConfig(
            warm_up=0,
            epochs=1,
            minibatch=config.minibatch,
            microbatch=config.microbatch,
            critic_epochs=4,
            target_kl=0.0,
            recompute=config.recompute,
        )
        self.learner = Learner(vla, settings)

    def update(self, trajectories: Sequence[Trajectory]) -> None:
        self.learner.update(trajectories)


class Plain(Side):
    """A PPO step on a causal language model, as it comes.

    features: context tokens of every decision; None computes them in every pass.
    """

    def __init__(self, vla: VLA, llama: Llama, config: Config, *, features: Sequence[torch.Tensor] | None = None):
        self.device, self.vla, self.llama, self.config, self.features = config.device, vla, llama, config, features
        width = vla.config.llm.hidden_size
        self.value = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 1)).to(config.device)
        trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW([*trained, *self.value.parameters()], lr=2e-5)

    def update(self, trajectories: Sequence[Trajectory]) -> None:
        observations = [observation for trajectory in trajectories for observation in trajectory.observations]
        ids_nN = torch.from_numpy(np.concatenate([trajectory.token_ids_TN for trajectory in trajectories]))
        old_nN = torch.from_numpy(np.concatenate([trajectory.logprobs_TN for trajectory in trajectories]))
        parts = [
            rows.tolist() for rows in np.array_split(np.arange(len(ids_nN)), len(ids_nN) // self.config.microbatch)
        ]
        with torch.no_grad():
            values_n = torch.cat([self.scored(observations, ids_nN, rows)[1] for rows in parts]).cpu()
        targets_n = torch.from_numpy(np.concatenate([trajectory.rewards_T for trajectory in trajectories])).float()
        advantage_n = targets_n - values_n
        every = self.config.minibatch // self.config.microbatch
        for number, rows in enumerate(parts):
            logprobs_BN, values_B = self.scored(observations, ids_nN, rows)
            ratio_BN = (logprobs_BN - old_nN[rows].to(self.device)).exp()
            advantage_B1 = advantage_n[rows, None].to(self.device)
            policy = -torch.minimum(ratio_BN * advantage_B1, ratio_BN.clamp(0.8, 1.2) * advantage_B1).mean()
            value = functional.mse_loss(values_B, targets_n[rows].to(self.device))
            ((policy + 0.5 * value) / every).backward()
            if (number + 1) % every == 0:
                nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def scored(
        self, observations: Sequence[Prepared], ids_nN: torch.Tensor, rows: Sequence[int], *, actions_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, N) of the action tokens and values (B,)."""
        ids_BN = ids_nN[rows].to(self.device)
        embedded, mask_BL, prompt_B = self.embedded([observations[row] for row in rows], rows, ids_BN)
        out = self.llama(inputs_embeds=embedded, attention_mask=mask_BL, output_hidden_states=True, use_cache=False)
        logits = out.logits.float()
        if actions_only:
            logits[..., : self.vla.config.action_begin] = logits[..., self.vla.config.vocabulary :] = -torch.inf
        logprobs = torch.log_softmax(logits, -1)
        # The token at slot s is predicted at slot s - 1.
        slots_BN = prompt_B[:, None] - 1 + torch.arange(ids_BN.shape[1], device=self.device)
        rows_B1 = torch.arange(len(rows), device=self.device)[:, None]
        hidden_BD = out.hidden_states[-1][rows_B1[:, 0], prompt_B - 1].detach().float()
        return logprobs[rows_B1, slots_BN, ids_BN], self.value(hidden_BD)[:, 0]

    def embedded(
        self, observations: Sequence[Prepared], rows: Sequence[int], ids_BN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings (B, L, D) of prompt and actions, padded on the right; their mask; tokens of each prompt (B,)."""
        if self.features is None:
            with torch.no_grad():
                context = list(self.vla.context(collate(observations).to(self.vla.device)))
        else:
            context = [self.features[row].to(self.device) for row in rows]
        embed = self.llama.get_input_embeddings()
        found, prompt = [], []
        for observation, tokens_CD, ids_N in zip(observations, context, ids_BN, strict=True):
            words = embed(torch.from_numpy(observation.input_ids).to(self.device))
            found.append(torch.cat((words[:1], tokens_CD, words[1:], embed(ids_N))))
            prompt.append(len(words) + len(tokens_CD))
        lengths = torch.tensor([len(row) for row in found], device=self.device)
        x = nn.utils.rnn.pad_sequence(found, batch_first=True)
        mask_BL = torch.arange(x.shape[1], device=self.device) < lengths[:, None]
        return x, mask_BL.long(), torch.tensor(prompt, device=self.device)


def build(config: Config) -> VLA:
    """Random weights."""
    if config.shape == "nano":
        return VLA.initialise(nano_config(STATISTICS)).to(config.device)
    openvla = VLAConfig(
        towers=tuple(TOWERS.values()), tower_names=tuple(TOWERS), llm=OurLlamaConfig(), norm_stats=STATISTICS
    )
    with torch.device(config.device):
        return VLA(openvla).to(config.device, torch.bfloat16).requires_grad_(False)


def llama_like(vla: VLA, config: Config) -> Llama:
    """A LlamaForCausalLM that is trained as the VLA's decoder is; with LoRA both hold the same frozen weights."""
    llama = library_llama(vla, share=config.weights == "lora")
    if config.recompute:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    llama.train()
    if config.weights == "full":
        return llama
    adapter = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=TARGETS)
    return peft.get_peft_model(llama, adapter)


def library_llama(vla: VLA, *, share: bool) -> LlamaForCausalLM:
    """A LlamaForCausalLM that computes what the VLA's decoder does, over its very tensors or over copies."""
    ours = vla.config.llm
    theirs = LlamaConfig(
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        vocab_size=ours.vocab_size,
        rms_norm_eps=ours.rms_norm_eps,
        max_position_embeddings=ours.max_position_embeddings,
        tie_word_embeddings=False,
    )
    with torch.device(vla.device):
        llama = LlamaForCausalLM(theirs)
    nn.Module.to(llama, vla.action_head.dtype)
    llama.load_state_dict(vla.language_model.state_dict(), assign=share)
    return llama


def episodes(config: VLAConfig, decisions: int) -> list[Trajectory]:
    """Random observations and actions, in episodes of 16 decisions; every second one a success."""
    rng, length = np.random.default_rng(0), 16
    tokens = (length, config.action_tokens)
    found = []
    for number in range(decisions // length):
        rewards_T = np.zeros(length)
        rewards_T[-1] = number % 2
        found.append(
            Trajectory(
                episode_id=str(number),
                task="random/0",
                initial_state=str(number),
                success=bool(number % 2),
                whole=True,
                observations=tuple(observation(config, rng) for _ in range(length)),
                after=None,
                token_ids_TN=rng.integers(config.action_begin, config.vocabulary, tokens),
                logprobs_TN=np.zeros(tokens, np.float32),
                mask_TN=np.ones(tokens, bool),
                temperature_T=np.ones(length, np.float32),
                version_T=np.zeros(length, np.int64),
                ticks_T=np.full(length, config.chunk_length),
                rewards_T=rewards_T,
            )
        )
    return found


def observation(config: VLAConfig, rng: np.random.Generator) -> Prepared:
    shortest, longest = PROMPT_TOKENS
    return Prepared(
        image=rng.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8),
        input_ids=np.array([1, *rng.integers(3, 500, rng.integers(shortest, longest))]),
        state=rng.normal(size=config.state_dim).astype(np.float32) if config.state_dim else None,
    )


def recorded(learner: Learner, batch: Sequence[Trajectory]) -> list[Trajectory]:
    """As if the policy had sampled the actions: with its own log-probabilities."""
    logprobs_nN = learner.score(batch).policy.logprobs_BN.numpy()
    parts = np.split(logprobs_nN, np.cumsum([len(trajectory) for trajectory in batch])[:-1])
    return [replace(trajectory, logprobs_TN=part) for trajectory, part in zip(batch, parts, strict=True)]


@torch.no_grad()
def features(vla: VLA, batch: Sequence[Trajectory], config: Config) -> list[torch.Tensor]:
    """(C, D) of every decision: image tokens, then the state token; in the host's memory."""
    observations = [observation for trajectory in batch for observation in trajectory.observations]
    found: list[torch.Tensor] = []
    for start in range(0, len(observations), config.microbatch):
        found += vla.context(collate(observations[start : start + config.microbatch]).to(vla.device)).cpu()
    return found


@torch.no_grad()
def difference(contenders: dict[str, Side], batch: Sequence[Trajectory]) -> float:
    """Of any side's log-probabilities over the action tokens from the recorded ones: both compute the same function."""
    first = batch[0]
    worst = 0.0
    for side in contenders.values():
        if isinstance(side, Plain):
            ids_nN = torch.from_numpy(first.token_ids_TN)
            logprobs, _ = side.scored(first.observations, ids_nN, range(len(first)), actions_only=True)
            worst = max(worst, float((logprobs.cpu() - torch.from_numpy(first.logprobs_TN)).abs().max()))
    return worst


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
