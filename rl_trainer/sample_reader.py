"""Samples as a model reads them: their images, its prompt ids for their instructions, its normalised state.

Shapes: n samples, B batch, S of the state.
"""

from __future__ import annotations

import numpy as np

from policy_server.vla.config import VLAConfig
from policy_server.vla.model import Prompts, collate
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.tokenizer import Tokenizer
from rl_trainer.samples import Samples


class SampleReader:
    """What one model makes of one set of samples.  Raises ValueError when its state has other numbers than theirs."""

    def __init__(self, samples: Samples, config: VLAConfig, tokenizer: Tokenizer, *, unnorm_key: str):
        preprocessor = Preprocessor(config, tokenizer, unnorm_key=unnorm_key)
        self._frames = samples.frames()
        self._prompts = [preprocessor.prompt_ids(instruction) for instruction in samples.instructions]
        self._instruction_n = samples.instruction_n
        self.state_nS = _model_state(preprocessor, samples, config)
        """float32; S is 0 for a model without state"""

    def prepared(self, row: int) -> Prepared:
        """One sample."""
        state = self.state_nS[row] if self.state_nS.shape[1] else None
        return Prepared(
            image=np.asarray(self._frames[row]), input_ids=self._prompts[self._instruction_n[row]], state=state
        )

    def prompts(self, rows: np.ndarray) -> Prompts:
        """A batch of samples."""
        return collate([self.prepared(row) for row in rows])


def _model_state(preprocessor: Preprocessor, samples: Samples, config: VLAConfig) -> np.ndarray:
    if config.state_dim == 0:
        return np.zeros((len(samples), 0), np.float32)
    if config.state_names and samples.state_names and config.state_names != samples.state_names:
        raise ValueError(
            f"the model reads the state {config.state_names}, the demonstrations have {samples.state_names}"
        )
    state_nS = preprocessor.state(samples.state_nS)
    assert state_nS is not None
    return state_nS
