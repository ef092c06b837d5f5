"""Small episodes of a policy in the real file format, with known numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from policy_server.vla.config import VLAConfig
from protos import codec, episode_pb2
from protos.episode_file import Episode, EpisodeWriter, read_episode

SOURCES = {
    "p": episode_pb2.SOURCE_POLICY,
    "b": episode_pb2.SOURCE_BLEND,
    "h": episode_pb2.SOURCE_HOLD,
    "u": episode_pb2.SOURCE_HUMAN,
    "x": episode_pb2.SOURCE_EXPERT,
}
FINAL = 200
"""Grey of the final observation; that of decision d is 10 d."""


def ticks(decision: int, sources: str, *, first: int = 0, reason: str = "") -> list[episode_pb2.Tick]:
    """Ticks of one decision, a letter each: p policy, b blend, h hold, u human, x expert."""
    return [
        episode_pb2.Tick(decision=decision, index=first + i, action=[0.1] * 7, source=SOURCES[letter], reason=reason)
        for i, letter in enumerate(sources)
    ]


def observation(config: VLAConfig, grey: int, instruction: str = "pick up the bowl") -> episode_pb2.Observation:
    side = config.image_size
    return episode_pb2.Observation(
        images={config.camera: codec.encode_image(np.full((side, side, 3), grey, np.uint8), "png")},
        state=codec.encode_tensor(np.full(config.state_dim, grey / 1000, np.float32)),
        instruction=instruction,
    )


def chunk(
    config: VLAConfig, token_ids_N: np.ndarray, logprobs_N: np.ndarray, *, temperature: float = 1.5, version: int = 1
) -> episode_pb2.Chunk:
    actions_KA = np.zeros((config.chunk_length, config.action_dim), np.float32)
    return episode_pb2.Chunk(
        actions=codec.encode_tensor(actions_KA),
        token_ids=codec.encode_tensor(token_ids_N.astype(np.int32)),
        token_logprobs=codec.encode_tensor(logprobs_N.astype(np.float32)),
        version=version,
        temperature=temperature,
    )


def numbered_chunk(config: VLAConfig, decision: int, **fields: float) -> episode_pb2.Chunk:
    """Token i of decision d is the action token of column i + d, its log-probability -(d + 1) - i / 100."""
    places = np.arange(config.action_tokens)
    return chunk(config, config.action_begin + places + decision, -(decision + 1) - places / 100, **fields)


def write_episode(
    folder: Path,
    config: VLAConfig,
    executed: Sequence[episode_pb2.Tick],
    chunks: Sequence[episode_pb2.Chunk],
    *,
    outcome: episode_pb2.Outcome = episode_pb2.OUTCOME_SUCCESS,
    terminal: bool = True,
    final: bool = True,
    **start: object,
) -> Episode:
    """The episode, written and read again; decision d was answered by chunks[d]."""
    fields = {
        "episode_id": "e",
        "task": "libero_object/3",
        "initial_state": "17",
        "purpose": episode_pb2.PURPOSE_TRAIN,
        "image_path": config.image_path,
        "unnorm_key": next(iter(config.norm_stats)),
    }
    writer = EpisodeWriter(folder / "e.episode", episode_pb2.EpisodeStart(**{**fields, **start}))
    for number, answer in enumerate(chunks):
        seen = observation(config, 10 * number)
        writer.decision(episode_pb2.Decision(decision=number, observation=seen, chunk=answer))
        writer.executed([tick for tick in executed if tick.decision == number])
    writer.executed([tick for tick in executed if tick.decision >= len(chunks)])
    last = observation(config, FINAL) if final else None
    writer.finish(episode_pb2.EpisodeEnd(outcome=outcome, terminal=terminal, final_observation=last))
    return read_episode(folder / "e.episode")
