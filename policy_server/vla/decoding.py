"""Action tokens for requests that were gathered into a batch.

What is sampled for a request depends on the request alone: its uniform numbers come from (seed, decision), one a token.
Shapes: B batch, N action tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from policy_server.vla.adapters import adapted
from policy_server.vla.graphs import PassGraphs
from policy_server.vla.model import VLA
from policy_server.vla.passes import Batch, DecodeInput, Laps, Pass, PassShape, padded


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The answers to a batch, and where the time went."""

    token_ids_BN: np.ndarray
    """int32"""
    token_logprobs_BN: np.ndarray
    """float32, over the action tokens, at the request's temperature (at 1 when greedy)"""
    vision_s: float
    prefill_s: float
    decode_s: float


@torch.inference_mode()
def decode(
    vla: VLA, inputs: Sequence[DecodeInput], shape: PassShape | None = None, *, graphs: PassGraphs | None = None
) -> Decoded:
    """N tokens for each of B requests.

    With a shape, rows and prompts are padded to it.  graphs: captured passes of this model, used where one fits.
    """
    order = sorted(range(len(inputs)), key=lambda n: _place(inputs[n]))
    requests = padded([inputs[n] for n in order], shape)
    with torch.cuda.device(vla.device) if vla.device.type == "cuda" else nullcontext():
        laps = Laps(vla.device)
        answers = graphs.run(requests, laps) if graphs is not None else None
        if answers is None:
            adapters = [one.adapter for one in requests if one.adapter is not None]
            with adapted(vla, adapters, row_by_row=shape is not None) as model:
                batch = Batch.of(model.config, requests, prompt_length=shape and shape.prompt_length)
                one = Pass(model, batch.to(vla.device))
                laps.run(one.phases)
                answers = one.answers
        columns_BN, logprobs_BN = (tensor.cpu()[np.argsort(order)] for tensor in answers)
        vision_s, prefill_s, decode_s = laps.seconds()
    return Decoded(
        token_ids_BN=(columns_BN + vla.config.action_begin).numpy().astype(np.int32),
        token_logprobs_BN=logprobs_BN.numpy(),
        vision_s=vision_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


def _place(one: DecodeInput) -> tuple[bool, int]:
    """Rows with an adapter come first, since only they add to what the base computes; those of one side by side."""
    return one.adapter is None, id(one.adapter)
