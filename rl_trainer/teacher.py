"""Labels from a policy: what it would do, greedily, where someone has been (DAgger with a policy as the expert).

A policy that taught itself this way, on episodes of its own and with noise on the tokens it reads, does when it samples
what it did when it was greedy: training can then begin at the success that evaluation measured.

Shapes: n samples, K actions of a chunk, A numbers of an action.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.checkpoint import Checkpoint
from policy_server.vla.decoding import decode
from policy_server.vla.passes import DecodeInput
from rl_trainer.ranks import Ranks
from rl_trainer.sample_reader import SampleReader
from rl_trainer.samples import Samples

BATCH = 64


def relabelled(samples: Samples, teacher: Checkpoint, *, unnorm_key: str, ranks: Ranks) -> Samples:
    """The samples with the teacher's greedy chunks as their labels; each rank decodes its part.

    Raises ValueError when the teacher's chunks have another shape than the samples', or its statistics no such key.
    """
    config, shape = teacher.config, samples.actions_nKA.shape
    if (config.chunk_length, config.action_dim) != shape[1:]:
        raise ValueError(
            f"the teacher's chunks have {config.chunk_length} actions of {config.action_dim} numbers,"
            f" the model to be trained has {shape[1]} of {shape[2]}"
        )
    reader = SampleReader(samples, config, teacher.tokenizer, unnorm_key=unnorm_key)
    tokens = ActionTokens(config, unnorm_key)
    actions_nKA = torch.zeros(shape)
    mine = np.arange(len(samples))[ranks.part(len(samples))]
    teacher.model.eval()
    for start in range(0, len(mine), BATCH):
        rows = mine[start : start + BATCH]
        decoded = decode(teacher.model, [DecodeInput(prepared=reader.prepared(row)) for row in rows])
        actions_nKA[rows] = torch.from_numpy(tokens.decode(decoded.token_ids_BN)).float()
    return replace(samples, actions_nKA=ranks.sum(actions_nKA).numpy())
