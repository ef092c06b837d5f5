"""The log-probabilities a model gives to chosen tokens: one arithmetic for the two sides of a publish.

Shapes: B batch, N action tokens, V action bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from policy_server.vla.adapters import Adapter, adapted
from policy_server.vla.model import VLA, collate
from policy_server.vla.preprocessing import Prepared


@torch.inference_mode()
def score(
    vla: VLA,
    prepared: Sequence[Prepared],
    token_ids_BN: np.ndarray,
    temperature: float,
    *,
    adapter: Adapter | None = None,
) -> np.ndarray:
    """float32 (B, N), natural logarithms over the action tokens, logits divided by the temperature.

    The model must be in evaluation mode: dropout would make it another.
    """
    if vla.training:
        raise ValueError("the model must be in evaluation mode, got one in training mode")
    ids_BN = torch.from_numpy(token_ids_BN.astype(np.int64)).to(vla.device)
    with adapted(vla, [adapter] * len(prepared) if adapter is not None else []) as model:
        logits_BNV = model(collate(prepared).to(vla.device), ids_BN).logits_BNV
    logprobs_BNV = torch.log_softmax(logits_BNV / temperature, -1)
    return logprobs_BNV.gather(-1, (ids_BN - vla.config.action_begin)[..., None])[..., 0].cpu().numpy()
