"""The learner of behaviour cloning: batches in a fixed order, their gradient, and what held-out episodes say.

Everything random is a function of (seed, step), so that ranks and resumed runs agree without saving a generator.
Shapes: n samples, B batch, N = K*A action tokens, S of the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.decoding import decode
from policy_server.vla.model import VLA, Prompts
from policy_server.vla.passes import DecodeInput
from policy_server.vla.tokenizer import Tokenizer
from rl_trainer.augment import Augmentation, Draw, augment_images, augment_state, augment_tokens, draw
from rl_trainer.imitation import Objective
from rl_trainer.ranks import Ranks
from rl_trainer.sample_reader import SampleReader
from rl_trainer.samples import Samples

VALIDATION_SAMPLES = 256
VALIDATION_BATCH = 16


@dataclass(frozen=True)
class BatchOrder:
    """Which samples each step sees: every epoch a fresh permutation, the rest that fills no batch left out."""

    rows: np.ndarray
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.rows) // self.batch)

    def __call__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return order[place * self.batch : (place + 1) * self.batch]


class Cloner:
    """Gradients and validation of one model over one set of samples, for one rank's part."""

    def __init__(
        self,
        model: VLA,
        tokenizer: Tokenizer,
        samples: Samples,
        *,
        unnorm_key: str,
        objective: Objective,
        augmentation: Augmentation,
        batch_size: int,
        accumulate: int,
        autocast: bool,
        seed: int,
        ranks: Ranks,
    ):
        self.model, self.objective, self.augmentation, self.ranks = model, objective, augmentation, ranks
        self.accumulate, self.autocast, self.seed = accumulate, autocast, seed
        self.device = model.device
        self.action_tokens = ActionTokens(model.config, unnorm_key)
        self.reader = SampleReader(samples, model.config, tokenizer, unnorm_key=unnorm_key)
        self._actions_nKA = samples.actions_nKA
        self._labels_nN = torch.from_numpy(self.action_tokens.encode(samples.actions_nKA)).long()
        taught, held = np.flatnonzero(~samples.validation_n), np.flatnonzero(samples.validation_n)
        self._state_std_S = torch.from_numpy(self.reader.state_nS[taught].std(0))
        self.order = BatchOrder(taught, min(batch_size, len(taught)), seed)
        self.validation_rows = np.random.default_rng(seed).permutation(held)[:VALIDATION_SAMPLES]

    def gradient(self, step: int) -> float:
        """Adds this rank's part of the gradient of the batch's mean loss; gives that part of the loss.

        Summed over ranks, both are the whole batch's.
        """
        self.model.train()
        rows = self.order(step)
        sizes = len(rows), self.reader.state_nS.shape[1], self.model.config.action_tokens
        drawn = draw(self.augmentation, *sizes, seed=self.seed, step=step)
        mine = self.ranks.part(len(rows))
        torch.manual_seed(self.seed * 1_000_003 + step * self.ranks.size + self.ranks.rank)  # dropout
        total = 0.0
        for part in np.array_split(np.arange(mine.start, mine.stop), self.accumulate):
            if len(part):
                cut = slice(int(part[0]), int(part[-1]) + 1)
                prompts = self._augmented(self.reader.prompts(rows[cut]), drawn.part(cut))
                with self._arithmetic():
                    loss = self._loss(prompts, rows[cut], drawn.part(cut)) * (len(part) / len(rows))
                loss.backward()
                total += float(loss.detach())
        return total

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Over held-out episodes: loss and accuracy with the right tokens before each, and what greedy decoding gives.

        `l1/<dimension>` is the mean distance, in the policy's units, between the decoded chunk and the label.  Empty
        when no episode is held out.
        """
        if not len(self.validation_rows):
            return {}
        self.model.eval()
        mine = self.validation_rows[self.ranks.part(len(self.validation_rows))]
        config = self.model.config
        sums = torch.zeros(1 + 2 * config.action_dim, dtype=torch.float64)
        for start in range(0, len(mine), VALIDATION_BATCH):
            rows = mine[start : start + VALIDATION_BATCH]
            labels_BN = self._labels_nN[rows].to(self.device)
            logits_BNV = self.model(self.reader.prompts(rows).to(self.device), labels_BN).logits_BNV
            columns_BN = labels_BN - config.action_begin
            right_BKA = (logits_BNV.argmax(-1) == columns_BN).view(len(rows), -1, config.action_dim)
            decoded = decode(self.model, [DecodeInput(prepared=self.reader.prepared(row)) for row in rows])
            actions_BKA = self.action_tokens.decode(decoded.token_ids_BN)
            distance_A = np.abs(actions_BKA - self._actions_nKA[rows]).mean(1).sum(0)
            sums[0] += len(rows) * float(self.objective(logits_BNV, columns_BN))
            sums[1 : 1 + config.action_dim] += right_BKA.double().mean(1).sum(0).cpu()
            sums[1 + config.action_dim :] += torch.from_numpy(distance_A)
        loss, *rest = (self.ranks.sum(sums) / len(self.validation_rows)).tolist()
        accuracy, distance = rest[: config.action_dim], rest[config.action_dim :]
        return (
            {"validation/loss": loss, "accuracy/all": float(np.mean(accuracy)), "l1/all": float(np.mean(distance))}
            | {f"accuracy/{i}": value for i, value in enumerate(accuracy)}
            | {f"l1/{i}": value for i, value in enumerate(distance)}
        )

    def _loss(self, prompts: Prompts, rows: np.ndarray, drawn: Draw) -> torch.Tensor:
        config, columns_BN = self.model.config, self._labels_nN[rows] - self.model.config.action_begin
        read_BN = augment_tokens(columns_BN, config.n_action_bins, self.augmentation.token_noise, drawn)
        logits_BNV = self.model(prompts.to(self.device), (read_BN + config.action_begin).to(self.device)).logits_BNV
        return self.objective(logits_BNV, columns_BN.to(self.device))

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Matrix products in bfloat16 where that was asked for; weights, norms and the loss stay float32."""
        if not self.autocast:
            yield
            return
        with torch.autocast(self.device.type, torch.bfloat16):
            if self.device.type != "cpu":
                yield
                return
            with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is slow backwards in bfloat16
                yield

    def _augmented(self, prompts: Prompts, drawn: Draw) -> Prompts:
        images = augment_images(prompts.images_BHW3, drawn)
        if prompts.states_BS is None:
            return replace(prompts, images_BHW3=images)
        states = augment_state(prompts.states_BS, self._state_std_S, self.augmentation.state_noise, drawn)
        return replace(prompts, images_BHW3=images, states_BS=states)
