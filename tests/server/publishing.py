"""Weights as a trainer would send them, and what a server says of its versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from policy_server.vla.checkpoint import weights_fingerprint
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla.model import VLA
from protos import admin_pb2, episode_pb2, policy_pb2
from protos.codec import decode_tensor, encode_tensor
from tests.server import messages
from tests.server.test_served_vla import observation

NAME = "language_model.model.layers.0.mlp.down_proj.weight"
FULL, LORA = admin_pb2.WEIGHTS_KIND_FULL, admin_pb2.WEIGHTS_KIND_LORA


def moved(base: VLA, by: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: base.state_dict()[name] + by for name in names or (NAME,)}


def publication(
    fingerprint: str, data: bytes, *, part: int = 1000, **header
) -> Iterator[admin_pb2.PublishWeightsRequest]:
    fields = {
        "kind": FULL,
        "base_fingerprint": fingerprint,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "note": "a test",
        **header,
    }
    yield admin_pb2.PublishWeightsRequest(header=admin_pb2.WeightsHeader(**fields))
    for begin in range(0, len(data), part):
        yield admin_pb2.PublishWeightsRequest(data=data[begin : begin + part])


def publish(admin, base: VLA, by: float, **header) -> admin_pb2.PublishWeightsReply:
    return admin.PublishWeights(publication(weights_fingerprint(base), save(moved(base, by)), **header), timeout=60)


def adapter(base: VLA, folder: Path) -> tuple[VLA, bytes, str]:
    """The learner's model with an adapter that changes something, and the adapter's two files."""
    torch.manual_seed(0)
    for parameter in apply_lora(base, rank=2, alpha=4):
        parameter.data.normal_(std=0.1)
    save_lora(base, folder)
    return base, (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_text()


def listed(admin) -> admin_pb2.ListVersionsReply:
    return admin.ListVersions(admin_pb2.ListVersionsRequest(), timeout=30)


def start(server, **fields) -> policy_pb2.StartEpisodeReply:
    return server.policy.StartEpisode(messages.start(seed=1, temperature=1.0, **fields), timeout=30)


def act(server, episode_id: str, decision: int = 0, number: int = 1) -> episode_pb2.Chunk:
    request = policy_pb2.ActRequest(episode_id=episode_id, decision=decision, observation=observation(number))
    return server.policy.Act(request, timeout=30).chunk


def scored(admin, version: int, tokens: np.ndarray, number: int = 1, temperature: float = 1.0) -> np.ndarray:
    probe = admin_pb2.Probe(observation=observation(number), token_ids=encode_tensor(tokens))
    request = admin_pb2.ScoreProbeRequest(version=version, probes=[probe], temperature=temperature)
    return decode_tensor(admin.ScoreProbe(request, timeout=30).token_logprobs, dtype="float32", shape=(1, len(tokens)))[
        0
    ]
