"""Augmentation of a batch: colour jitter, a small shift of the frame, noise on the state and on the tokens before.

What is drawn depends on the seed and the optimiser's step alone, for the whole batch at once: any rank can apply its
own part of the same draw, and a resumed run sees what an uninterrupted one would have seen.

Why tokens: cloning shows the model the expert's own tokens before each, which are smooth.  A policy that samples reads
its own, which are not; one bin off, and what follows is anything (nano, LIBERO-Goal: greedy 5 of 5, at temperature 0.05
1 of 5; executing the samples but reading the greedy tokens 5 of 5 again, at temperature 1).

Shapes: B batch, H, W, S, N action tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# ITU-R BT.601 luma, the grey that contrast and saturation move towards.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far a sample may be moved; 0 everywhere turns it off."""

    brightness: float = 0.2
    """factor drawn from [1 - b, 1 + b]"""
    contrast: float = 0.2
    saturation: float = 0.2
    shift_px: int = 0
    """the frame is shifted by up to this many pixels each way, its edge repeated; to a camera fixed to the world
    a pixel is a place, and a shift costs precision"""
    state_noise: float = 0.02
    """standard deviation of the noise on the state, in standard deviations of the training data"""
    token_noise: float = 0.0
    """mean standard deviation, in bins, of noise on the action tokens that the model reads; labels stay as they are"""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("shift_px", "state_noise", "token_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One step's random numbers, a row per sample."""

    colour_B3: torch.Tensor
    """factors of brightness, contrast and saturation"""
    shift_B2: torch.Tensor
    """int64 pixels, down and right"""
    state_BS: torch.Tensor
    """standard normal"""
    token_BN: torch.Tensor
    """standard normal, times a number of each sample's own that is uniform in [0, 2]: some are hardly disturbed"""

    def part(self, rows: slice) -> Draw:
        return Draw(**{name: tensor[rows] for name, tensor in vars(self).items()})


def draw(augmentation: Augmentation, batch: int, state_dim: int, tokens: int = 0, *, seed: int, step: int) -> Draw:
    """The draw of one step for a batch of samples."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    reach_3 = torch.tensor([augmentation.brightness, augmentation.contrast, augmentation.saturation])
    shift = augmentation.shift_px
    return Draw(
        colour_B3=1 + reach_3 * (2 * torch.rand(batch, 3, generator=generator) - 1),
        shift_B2=torch.randint(-shift, shift + 1, (batch, 2), generator=generator),
        state_BS=torch.randn(batch, state_dim, generator=generator),
        token_BN=2 * torch.rand(batch, 1, generator=generator) * torch.randn(batch, tokens, generator=generator),
    )


def augment_images(images_BHW3: torch.Tensor, drawn: Draw) -> torch.Tensor:
    """uint8 (B, H, W, 3) shifted, then brightness, contrast and saturation in this order; uint8."""
    x = _shift(images_BHW3, drawn.shift_B2).float()
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in drawn.colour_B3.unbind(1))
    x = x * brightness
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    grey = _grey(x)
    x = grey + saturation * (x - grey)
    return x.round().clamp(0, 255).to(torch.uint8)


def augment_state(state_BS: torch.Tensor, std_S: torch.Tensor, amount: float, drawn: Draw) -> torch.Tensor:
    return state_BS + amount * std_S * drawn.state_BS


def augment_tokens(columns_BN: torch.Tensor, bins: int, amount: float, drawn: Draw) -> torch.Tensor:
    """int64 (B, N): columns of action tokens, each a few bins off, within [0, bins)."""
    return (columns_BN + (amount * drawn.token_BN).round().long()).clamp(0, bins - 1)


def _shift(images_BHW3: torch.Tensor, shift_B2: torch.Tensor) -> torch.Tensor:
    batch, height, width = images_BHW3.shape[:3]
    rows_BH = (torch.arange(height) - shift_B2[:, :1]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) - shift_B2[:, 1:]).clamp(0, width - 1)
    return images_BHW3[torch.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def _grey(x_BHW3: torch.Tensor) -> torch.Tensor:
    return (x_BHW3 * x_BHW3.new_tensor(LUMA)).sum(-1, keepdim=True)
