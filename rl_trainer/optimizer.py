"""AdamW on float32 masters that lie in one vector: one all-reduce, one file, one moving average.

Parameters that are float32 become views of the vector; others (bf16) are cast to and from it round every step.
P is the number of trainable numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

BETAS = (0.9, 0.95)


class Optimizer:
    """Decay falls on matrices only, as is usual; biases and norms keep their size.

    ema: the moving average keeps this much of itself every step; 0 makes none.  Early steps keep less
    (1 - 3 / (3 + t)), so that the average forgets where it started: step s then weighs as s squared.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, clip_norm: float, ema: float):
        if not parameters:
            raise ValueError("there is nothing to train: no parameter requires a gradient")
        if clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, got {clip_norm}")
        self.clip_norm, self.ema, self.step_count = clip_norm, ema, 0
        self._parameters = sorted(parameters.values(), key=lambda p: p.ndim < 2)  # stable: matrices first
        decayed = sum(p.numel() for p in self._parameters if p.ndim >= 2)
        self.masters_P = torch.cat([p.detach().float().reshape(-1) for p in self._parameters])
        self.gradient_P = torch.zeros_like(self.masters_P)
        self.average_P = self.masters_P.clone() if ema else None
        for parameter, master, gradient in self._slices():
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = master, gradient
        parts = [self.masters_P[:decayed], self.masters_P[decayed:]]
        gradients = [self.gradient_P[:decayed], self.gradient_P[decayed:]]
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        self._adamw = torch.optim.AdamW(
            [{"params": [parts[0]], "weight_decay": weight_decay}, {"params": [parts[1]], "weight_decay": 0.0}],
            lr=0.0,
            betas=BETAS,
            fused=True,
        )

    def collect_gradients(self) -> torch.Tensor:
        """(P,) what backward() has summed since the last step, to be averaged over ranks in place."""
        for parameter, _, gradient in self._slices():
            if parameter.dtype != torch.float32 and parameter.grad is not None:
                gradient += parameter.grad.reshape(-1).float().view_as(gradient)
                parameter.grad = None
        return self.gradient_P

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One clipped AdamW step from gradient_P, which is then cleared; gives the gradient's norm before clipping.

        No step is taken where that is not finite: the weights would be lost.
        """
        norm = float(self.gradient_P.norm())
        if not math.isfinite(norm):
            self.forget()
            return norm
        if norm > self.clip_norm:
            self.gradient_P *= self.clip_norm / norm
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.gradient_P.zero_()
        self.step_count += 1
        if self.average_P is not None:
            keep = min(self.ema, 1 - 3 / (3 + self.step_count))
            self.average_P.lerp_(self.masters_P, 1 - keep)
        self._write_casts()
        return norm

    def forget(self) -> None:
        """Drops the gradient that was collected."""
        self.gradient_P.zero_()

    def begin_again(self) -> None:
        """From the weights as they are now, as if no step had been taken."""
        if self.average_P is not None:
            self.average_P.copy_(self.masters_P)
        self._adamw.state.clear()
        self.step_count = 0
        self.forget()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the moving average inside the block, where there is one."""
        if self.average_P is None:
            yield
            return
        kept = self.masters_P.clone()
        self.masters_P.copy_(self.average_P)
        self._write_casts()
        try:
            yield
        finally:
            self.masters_P.copy_(kept)
            self._write_casts()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a bit-for-bit continuation needs, by name."""
        tensors = {"masters": self.masters_P, "step": torch.tensor(self.step_count)}
        if self.average_P is not None:
            tensors["average"] = self.average_P
        for index, state in enumerate(self._adamw.state_dict()["state"].values()):
            tensors |= {f"adamw.{index}.{name}": value for name, value in state.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what state() gave.  Raises ValueError when it is of another model."""
        if tensors["masters"].shape != self.masters_P.shape or ("average" in tensors) != (self.average_P is not None):
            raise ValueError(
                f"the saved state has {tensors['masters'].numel()} numbers and {sorted(tensors)}, "
                f"this run trains {self.masters_P.numel()} with{'out' if self.average_P is None else ''} an average"
            )
        self.masters_P.copy_(tensors["masters"])
        self.step_count = int(tensors["step"])
        if self.average_P is not None:
            self.average_P.copy_(tensors["average"])
        whole = self._adamw.state_dict()
        names = ("step", "exp_avg", "exp_avg_sq")
        if "adamw.0.step" in tensors:
            whole["state"] = {i: {name: tensors[f"adamw.{i}.{name}"] for name in names} for i in range(2)}
            self._adamw.load_state_dict(whole)
        self._write_casts()

    def _slices(self) -> Iterator[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]:
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            shape = parameter.shape
            yield parameter, self.masters_P[start:stop].view(shape), self.gradient_P[start:stop].view(shape)
            start = stop

    @torch.no_grad()
    def _write_casts(self) -> None:
        for parameter, master, _ in self._slices():
            if parameter.dtype != torch.float32:
                parameter.copy_(master)
