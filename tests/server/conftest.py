"""A server on the tiny VLA that takes new weights, for the tests of the admin service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.model import VLA
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos import admin_pb2_grpc
from tests.server.running import RunningServer, serving


@pytest.fixture(scope="session")
def tiny_model(tiny_vla: Path) -> VlaModel:
    return VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=8)


@pytest.fixture
def admin_server(tiny_model: VlaModel, tmp_path: Path) -> Iterator[RunningServer]:
    store = VersionStore(tmp_path / "versions", first=tiny_model.fingerprint(tiny_model.first))
    with serving(tiny_model, max_batch=8, queue=64, versions=store, admin_port=0) as running:
        yield running


@pytest.fixture
def admin(admin_server: RunningServer) -> Iterator[admin_pb2_grpc.AdminStub]:
    with grpc.insecure_channel(admin_server.admin_address) as channel:
        yield admin_pb2_grpc.AdminStub(channel)


@pytest.fixture
def base(tiny_vla: Path) -> VLA:
    return load_checkpoint(tiny_vla).model
