from __future__ import annotations

import pytest
import torch

from rl_trainer.augment import Augmentation, augment_images, augment_state, augment_tokens, draw

NOTHING = Augmentation(brightness=0, contrast=0, saturation=0, shift_px=0, state_noise=0)


def images(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 8, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_no_augmentation_leaves_every_pixel() -> None:
    assert torch.equal(augment_images(images(), draw(NOTHING, 3, 8, seed=0, step=5)), images())


def test_a_shift_moves_the_frame_and_repeats_its_edge() -> None:
    drawn = draw(NOTHING, 1, 8, seed=0, step=0)
    drawn.shift_B2[0] = torch.tensor([2, -1])  # two down, one left
    moved, still = augment_images(images(1), drawn)[0], images(1)[0]
    assert torch.equal(moved[2:, :-1], still[:-2, 1:])
    assert torch.equal(moved[0, :-1], still[0, 1:])
    assert torch.equal(moved[:, -1], moved[:, -2])


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    one, same, next_step, other_seed = (
        draw(Augmentation(), 4, 8, seed=seed, step=step).state_BS for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, next_step) and not torch.equal(one, other_seed)


def test_ranks_augment_their_parts_as_one_would_the_whole() -> None:
    drawn = draw(Augmentation(), 3, 8, seed=0, step=0)
    whole = augment_images(images(), drawn)
    parts = [augment_images(images()[rows], drawn.part(rows)) for rows in (slice(0, 1), slice(1, 3))]
    assert torch.equal(whole, torch.cat(parts))


def test_state_noise_is_measured_in_standard_deviations_of_the_data() -> None:
    drawn = draw(Augmentation(), 5000, 2, seed=0, step=0)
    noisy = augment_state(torch.zeros(5000, 2), torch.tensor([1.0, 10.0]), 0.1, drawn)
    torch.testing.assert_close(noisy.std(0), torch.tensor([0.1, 1.0]), rtol=0.05, atol=0)


def test_token_noise_is_measured_in_bins_and_stays_among_them() -> None:
    drawn = draw(Augmentation(), 4000, 0, 56, seed=0, step=0)
    middle = torch.full((4000, 56), 128)
    off = (augment_tokens(middle, 256, 3.0, drawn) - 128).float()
    assert off.mean().abs() < 0.05
    assert 2.9 < off.std(1).mean() < 3.1  # a sample's own deviation is uniform in [0, 6]
    assert (off == 0).all(1).any() and off.std(1).max() > 5
    edge = augment_tokens(torch.zeros(4000, 56, dtype=torch.long), 256, 3.0, drawn)
    assert edge.min() == 0 and augment_tokens(torch.full((4000, 56), 255), 256, 3.0, drawn).max() == 255
    assert torch.equal(augment_tokens(middle, 256, 0.0, drawn), middle)


@pytest.mark.parametrize("wrong", [{"brightness": 1.0}, {"shift_px": -1}, {"state_noise": -0.1}, {"token_noise": -1.0}])
def test_an_augmentation_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)  # type: ignore[arg-type]
