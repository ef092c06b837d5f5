"""The fake model with weights that can be published: whatever bytes they are."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from policy_server.errors import BadRequest
from policy_server.version_store import WEIGHTS, Kind, VersionStore
from protos import admin_pb2_grpc
from tests.server.fake_model import FakeModel
from tests.server.running import RunningServer, serving


class FakeWeights(FakeModel):
    """Its weights are bytes; none that begin with "bad" can be built."""

    first = b"the first"
    max_weights_bytes = 2**16

    def together(self, weights: Sequence[Any]) -> bool:
        return True

    def build(self, folder: Path, kind: Kind) -> bytes:
        weights = (folder / WEIGHTS[kind]).read_bytes()
        if weights.startswith(b"bad"):
            raise BadRequest("tensor x must be finite", field="data")
        return weights

    def fingerprint(self, weights: bytes) -> str:
        return hashlib.sha256(weights).hexdigest()

    def score(
        self, prepared: Sequence[Any], token_ids_BN: np.ndarray, temperature: float, weights: bytes
    ) -> np.ndarray:
        return np.full(token_ids_BN.shape, -len(weights) / temperature, np.float32)


@contextlib.contextmanager
def administered(
    model: FakeWeights | None = None, *, versions: VersionStore | None = None, **options: Any
) -> Iterator[tuple[RunningServer, admin_pb2_grpc.AdminStub]]:
    """A server on it, and its admin service."""
    model = model or FakeWeights()
    versions = versions or VersionStore(None, first=model.fingerprint(model.first))
    with (
        serving(model, versions=versions, admin_port=0, **options) as server,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        yield server, admin_pb2_grpc.AdminStub(channel)
