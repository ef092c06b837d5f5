"""From an observation to the model's inputs, one request at a time, in numpy.

Image paths:
  libero     what the reference LIBERO evaluation does: JPEG round trip, Lanczos-3 to the model's size, middle 90 %
  plain      Lanczos-3 to the model's size; nothing when it has that size
  processor  the checkpoint's own processor alone: bicubic to the model's size
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policy_server.vla.action_tokens import statistics_key
from policy_server.vla.config import PLACEHOLDER, VLAConfig
from policy_server.vla.tokenizer import Tokenizer
from protos import image

LIBERO_JPEG_QUALITY = 95
LIBERO_CROP_AREA = 0.9
STATE_CLIP = 2.0
"""Normalised states beyond this are clipped: a sensor far outside the training data must not dominate."""


class BadInput(ValueError):
    """An observation the model cannot read.  `field` is "image", "instruction" or "state"."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One request, ready for a batch."""

    image: np.ndarray
    """uint8 (S, S, 3) at the model's size"""
    input_ids: np.ndarray
    """int64 (L,): BOS and the prompt"""
    state: np.ndarray | None
    """float32 (S,), normalised; None for a model without state"""


class Preprocessor:
    """What a checkpoint does to an image, an instruction and a state."""

    def __init__(
        self,
        config: VLAConfig,
        tokenizer: Tokenizer,
        *,
        unnorm_key: str | None = None,
        max_prompt_tokens: int | None = None,
    ):
        self._config, self._tokenizer = config, tokenizer
        self.max_prompt_tokens = min(max_prompt_tokens or config.max_prompt_tokens, config.max_prompt_tokens)
        if config.state_dim:
            statistics = config.norm_stats[statistics_key(config, unnorm_key)]["proprio"]
            self._state_low = np.array(statistics["q01"], np.float32)
            extent = np.array(statistics["q99"], np.float32) - self._state_low
            self._state_scale = np.where(extent > 0, 2 / np.where(extent > 0, extent, 1), 0).astype(np.float32)

    def prepare(self, pixels_HW3: np.ndarray, instruction: str, state_S: np.ndarray | None = None) -> Prepared:
        """Raises BadInput."""
        return Prepared(image=self.image(pixels_HW3), input_ids=self.prompt_ids(instruction), state=self.state(state_S))

    def image(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """uint8 (S, S, 3) of a uint8 image of any size."""
        if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3:
            raise BadInput("image", f"must be uint8 (H, W, 3), got {pixels_HW3.dtype} {pixels_HW3.shape}")
        size = (self._config.image_size, self._config.image_size)
        if self._config.image_path == "libero":
            stored = image.jpeg_round_trip(pixels_HW3, quality=LIBERO_JPEG_QUALITY)
            return image.centre_crop(image.resize(stored, size, "lanczos3"), area=LIBERO_CROP_AREA)
        return image.resize(pixels_HW3, size, RESIZE_FILTER[self._config.image_path])

    def prompt_ids(self, instruction: str) -> np.ndarray:
        """int64 (L,)."""
        if not instruction.strip():
            raise BadInput("instruction", "must not be empty")
        ids = self._tokenizer.encode_prompt(self._config.prompt_template.replace(PLACEHOLDER, instruction.lower()))
        if len(ids) > self.max_prompt_tokens:
            raise BadInput("instruction", f"must fit {self.max_prompt_tokens} tokens, got {len(ids)} with the prompt")
        return ids

    def state(self, state_S: np.ndarray | None) -> np.ndarray | None:
        """float32 (..., S): quantiles 1 % and 99 % to -1 and 1, clipped; None when the model reads no state."""
        if not self._config.state_dim:
            return None
        if state_S is None or state_S.shape[-1:] != (self._config.state_dim,):
            got = "none" if state_S is None else f"shape {state_S.shape}"
            raise BadInput("state", f"must have {self._config.state_dim} numbers, got {got}")
        if not np.isfinite(state_S).all():
            raise BadInput("state", f"must be finite, got {state_S}")
        scaled = (state_S.astype(np.float32) - self._state_low) * self._state_scale - (self._state_scale > 0)
        return np.clip(scaled, -STATE_CLIP, STATE_CLIP).astype(np.float32)


RESIZE_FILTER: dict[str, image.Filter] = {"libero": "lanczos3", "plain": "lanczos3", "processor": "bicubic"}
"""The filter of each image path, by its name in protos/image.py."""
