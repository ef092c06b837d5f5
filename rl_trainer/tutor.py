"""The lessons of one update: which of them each optimiser step draws, and their gradient.

What is drawn is a function of (seed, iteration, step), for the whole batch at once: every rank computes its part of it.
Shapes: B decisions of a pass, N = K*A action tokens, V action bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from policy_server.vla.model import VLA
from rl_trainer.batching import Prompter
from rl_trainer.lessons import KINDS, Lesson, LessonKind
from rl_trainer.loss import Counts, Loss, clone_loss, token_divergence, token_logprobs
from rl_trainer.ranks import Ranks


class Tutor:
    """Falsy where there is nothing to teach.

    weights: of each kind's mean negative log-likelihood of a token; a kind of weight 0 is left out.
    draw: decisions of each kind for one optimiser step, over all ranks; all there are, where they are fewer.
    microbatch: decisions of one pass with gradients.
    seed: of the run, and the iteration.
    """

    def __init__(
        self,
        model: VLA,
        lessons: Iterable[Lesson],
        *,
        weights: Mapping[LessonKind, float],
        draw: int,
        microbatch: int,
        keep_images: bool,
        ranks: Ranks,
        seed: tuple[int, int],
    ):
        self._model, self._ranks, self._draw, self._microbatch = model, ranks, draw, microbatch
        self._seed, self._weights = seed, weights
        self._lessons = [lesson for lesson in lessons if weights[lesson.kind]]
        self._rows: dict[LessonKind, np.ndarray] = {
            kind: np.flatnonzero([lesson.kind == kind for lesson in self._lessons]) for kind in KINDS if weights[kind]
        }
        self._prompts = Prompter(model, [lesson.observation for lesson in self._lessons], keep_images=keep_images)

    def __len__(self) -> int:
        return len(self._lessons)

    @property
    def counts(self) -> dict[str, float]:
        """How many lessons there are of each kind that has a weight, by the name of the measure."""
        return {f"{kind}_lessons": float(len(rows)) for kind, rows in self._rows.items()}

    @property
    def steps(self) -> int:
        """Optimiser steps that draw about as many decisions as there are, of the kind that has most."""
        return max(1, round(max(self.counts.values(), default=0) / self._draw))

    def drawn(self, step: int) -> dict[LessonKind, np.ndarray]:
        """Rows of the lessons for a step of this iteration, by kind; none twice."""
        return {
            kind: np.random.default_rng((*self._seed, step, 1 + KINDS.index(kind))).permutation(rows)[: self._draw]
            for kind, rows in self._rows.items()
            if len(rows)
        }

    def gradient(self, step: int) -> dict[str, float]:
        """Adds this rank's part of the step's gradient; gives what all ranks measured."""
        sums = dict[str, float]()
        for kind, rows in self.drawn(step).items():
            name = f"{kind}_nll"
            sums[name] = 0.0
            counts = Counts.of(np.stack([self._lessons[row].mask_N for row in rows]), self._model.config.action_dim)
            for part in self._prompts.parts(rows[self._ranks.part(len(rows))], self._microbatch):
                loss = self._loss(part, counts)
                (self._weights[kind] * loss.total).backward()
                sums[name] += float(loss.metrics["nll"])
        total = self._ranks.sum(torch.tensor(list(sums.values()), dtype=torch.float64))
        return dict(zip(sums, total.tolist(), strict=True))

    @torch.no_grad()
    def logits(self, step: int) -> list[torch.Tensor]:
        """float32 (B, N, V) each: of this rank's parts of what a step draws, kind by kind."""
        return [self._scored(part)[0].float().cpu() for part in self._parts(step)]

    @torch.no_grad()
    def divergence(self, step: int, found: Sequence[torch.Tensor]) -> float:
        """Of the policy from the one that had these logits, nats an action in the mean over what the step draws."""
        model, sums = self._model, torch.zeros(2, dtype=torch.float64)
        for part, found_BNV in zip(self._parts(step), found, strict=True):
            logits_BNV, _, temperature_B, mask_BN = self._scored(part)
            moved_BN = token_divergence(found_BNV.to(model.device), logits_BNV, temperature_B, mask_BN)
            sums += torch.stack((moved_BN.sum(), mask_BN.sum() / model.config.action_dim)).cpu()
        moved, actions = self._ranks.sum(sums).tolist()
        return moved / actions

    def _parts(self, step: int) -> Iterator[np.ndarray]:
        for rows in self.drawn(step).values():
            yield from self._prompts.parts(rows[self._ranks.part(len(rows))], self._microbatch)

    def _loss(self, part: np.ndarray, counts: Counts) -> Loss:
        """Of a part of what is drawn of one kind."""
        logits_BNV, columns_BN, temperature_B, mask_BN = self._scored(part)
        return clone_loss(token_logprobs(logits_BNV, columns_BN, temperature_B, mask_BN), mask_BN, counts=counts)

    def _scored(self, part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What token_logprobs() reads of some lessons: logits_BNV, columns_BN, temperature_B, mask_BN."""
        lessons, device = [self._lessons[row] for row in part], self._model.device
        ids_BN = torch.from_numpy(np.stack([lesson.token_ids_N for lesson in lessons])).to(device)
        mask_BN = torch.from_numpy(np.stack([lesson.mask_N for lesson in lessons])).to(device)
        temperature_B = torch.tensor([lesson.temperature for lesson in lessons], device=device)
        logits_BNV = self._model(self._prompts(part), ids_BN).logits_BNV
        return logits_BNV, ids_BN - self._model.config.action_begin, temperature_B, mask_BN
