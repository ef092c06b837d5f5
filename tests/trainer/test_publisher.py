"""Publishing with proof: what is healthy passes, and serving anything else is caught by either proof alone.

The faults are planted in the server, where the public code had them: it sent nothing, or sent the adapter unmerged.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from policy_server.observation import Observed
from policy_server.preparer import Preparer
from policy_server.version_store import Kind, VersionStore
from policy_server.vla import checkpoint
from policy_server.vla.checkpoint import Checkpoint, digest, load_checkpoint, weights_fingerprint
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel, Weights
from protos import admin_pb2, policy_pb2
from rl_trainer.patience import ServerGone
from rl_trainer.publisher import LEAST_TOLERANCE, Publisher, PublishMismatch
from tests.server.running import RunningServer, serving

SKIPPED = "language_model.model.layers.1.mlp.down_proj"


class FaultyModel(VlaModel):
    """fault(folder) spoils what arrived; a liar reports the fingerprint of what was sent all the same."""

    fault: Callable[[Path], None] | None = None
    lies = False

    def build(self, folder: Path, kind: Kind) -> Weights:
        self.sent = super().build(folder, kind)
        spoiled = folder.parent / "spoiled"
        shutil.copytree(folder, spoiled)
        if self.fault is not None:
            self.fault(spoiled)
        served = super().build(spoiled, kind)
        shutil.rmtree(spoiled)
        return served

    def fingerprint(self, weights: Weights) -> str:
        return super().fingerprint(self.sent if self.lies else weights)


@contextlib.contextmanager
def served(checkpoint: Path, *, dtype: str = "float32", model: type[VlaModel] = VlaModel) -> Iterator[RunningServer]:
    policy = model(Policy.load(checkpoint, dtype=dtype), name="tiny", max_batch=8)
    store = VersionStore(None, first=policy.fingerprint(policy.first))
    with serving(policy, max_batch=8, queue=64, versions=store, admin_port=0) as server:
        yield server


@contextlib.contextmanager
def publishing(server: RunningServer, learner: Checkpoint, **options) -> Iterator[Publisher]:
    publisher = Publisher(
        server.address, server.admin_address, model=learner.model, tokenizer=learner.tokenizer, **options
    )
    try:
        yield publisher
    finally:
        publisher.close()


def learner_of(model: Path, kind: str, *, dtype: str = "float32") -> Checkpoint:
    learner = load_checkpoint(model, dtype=dtype)
    if kind == "lora":
        apply_lora(learner.model, rank=4, alpha=8)
    return learner


def learn(learner: Checkpoint, *, by: float = 0.02) -> None:
    """As if the optimiser had moved everything that is trained."""
    draw = torch.Generator().manual_seed(0)
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def live(server: RunningServer) -> int:
    return server.policy.GetSpec(policy_pb2.GetSpecRequest()).live_version


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("serves", "learns"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_what_a_learner_publishes_is_proved_and_goes_live(tiny_vla, kind, serves, learns):
    learner = learner_of(tiny_vla, kind, dtype=learns)
    learner.model.train()
    with served(tiny_vla, dtype=serves) as server, publishing(server, learner) as publisher:
        assert publisher.begin() == 0 == live(server)
        assert publisher.proof.fingerprint == server.model.fingerprint(server.model.first)
        for version in (1, 2):
            learn(learner)
            assert publisher.publish(version - 1, note=f"run {version}") == version == live(server)
            assert publisher.proof.version == version and publisher.proof.gap <= publisher.proof.tolerance
            assert publisher.proof.fingerprint == weights_fingerprint(learner.model, serves)
    assert learner.model.training


def test_what_is_not_trained_is_hashed_once(tiny_vla, monkeypatch):
    """Of a 7B model under an adapter that is nearly everything, after every iteration."""
    read = list[str]()
    monkeypatch.setattr(checkpoint, "digest", lambda name, tensor: read.append(name) or digest(name, tensor))
    learner = learner_of(tiny_vla, "lora")
    frozen = {name for name, parameter in learner.model.named_parameters() if not parameter.requires_grad}
    with served(tiny_vla) as server, publishing(server, learner) as publisher:
        read.clear()
        publisher.begin()
        assert frozen <= {*read}
        learn(learner)
        read.clear()
        publisher.publish(0)
        assert read and not frozen & {*read}
        assert publisher.proof.fingerprint == weights_fingerprint(learner.model, "float32")


def test_a_resumed_learner_begins_at_the_version_it_published(tiny_vla):
    learner = learner_of(tiny_vla, "lora")
    with served(tiny_vla) as server:
        with publishing(server, learner) as publisher:
            publisher.begin()
            learn(learner)
            version = publisher.publish(0)
        with publishing(server, learner) as publisher:
            assert publisher.begin(version) == version
            with pytest.raises(PublishMismatch, match=r"version 0 of \S+ is not the learner's model"):
                publisher.begin(0)


def skip_a_tensor(folder: Path) -> None:
    """The layer keeps the base's weights: an adapter without it, a file without it."""
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if SKIPPED not in name}
    save_file(tensors, path)
    if (folder / "adapter_config.json").exists():
        edit_config(
            folder, lambda config: {"target_modules": [n for n in config["target_modules"] if SKIPPED not in n]}
        )


def halve_the_scale(folder: Path) -> None:
    edit_config(folder, lambda config: {"lora_alpha": config["lora_alpha"] / 2})


def send_nothing(folder: Path) -> None:
    """What arrived is dropped; version 0 is served under the new number."""
    (path,) = folder.glob("*.safetensors")
    save_file({name: tensor * ("lora_" not in name) for name, tensor in load_file(path).items()}, path)


def edit_config(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change(config)}))


FAULTS = {"a skipped tensor": skip_a_tensor, "a halved scale": halve_the_scale, "a stale version": send_nothing}


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_is_caught_by_each_proof_alone_and_never_goes_live(tiny_vla, fault, lies):
    learner = learner_of(tiny_vla, "lora")
    with served(tiny_vla, model=FaultyModel) as server, publishing(server, learner) as publisher:
        publisher.begin()
        learn(learner)
        assert publisher.publish(0) == 1 == live(server)
        learn(learner)
        server.model.fault, server.model.lies = FAULTS[fault], lies
        caught = "does not act as the learner" if lies else "is not what the learner holds"
        with pytest.raises(PublishMismatch, match=rf"version 2 of \S+ {caught}"):
            publisher.publish(1)
        assert live(server) == 1
        server.model.fault = None
        assert publisher.publish(1) == 3 == live(server)


def test_full_weights_without_one_of_their_tensors_are_caught(tiny_vla):
    learner = learner_of(tiny_vla, "full")
    with served(tiny_vla, model=FaultyModel) as server, publishing(server, learner) as publisher:
        publisher.begin()
        learn(learner)
        server.model.fault = skip_a_tensor
        with pytest.raises(PublishMismatch, match="is not what the learner holds"):
            publisher.publish(0)


def test_a_learner_that_goes_on_learning_is_not_what_it_published(tiny_vla):
    learner = learner_of(tiny_vla, "full")
    with served(tiny_vla) as server, publishing(server, learner) as publisher:
        publisher.begin()
        learn(learner)
        version = publisher.publish(0)
        learn(learner, by=1e-6)
        with pytest.raises(PublishMismatch, match="is not what the learner holds"):
            publisher.prove(version)


def test_the_tolerance_is_what_was_seen_between_equal_weights(tiny_vla, monkeypatch):
    learner = learner_of(tiny_vla, "lora")
    with served(tiny_vla) as server, publishing(server, learner) as publisher:
        publisher.begin()
        assert publisher.proof.tolerance == LEAST_TOLERANCE and publisher.proof.gap < LEAST_TOLERANCE
        score = VlaModel.score
        monkeypatch.setattr(VlaModel, "score", lambda *given: score(*given) + np.float32(4e-4))
        publisher.begin()
        assert publisher.proof.tolerance == pytest.approx(5 * publisher.proof.gap) == pytest.approx(2e-3, rel=0.1)
        monkeypatch.setattr(VlaModel, "score", lambda *given: score(*given) * np.float32("nan"))
        with pytest.raises(PublishMismatch, match="differ by inf"):
            publisher.prove(0)


def test_equal_weights_that_see_other_inputs_are_no_calibration(tiny_vla, monkeypatch):
    learner = learner_of(tiny_vla, "lora")
    prepare = Preparer.__call__
    monkeypatch.setattr(Preparer, "__call__", lambda self, observed: prepare(self, darker(observed)))
    refused = pytest.raises(PublishMismatch, match="the sides see different inputs")
    with served(tiny_vla) as server, publishing(server, learner) as publisher, refused:
        publisher.begin()


def darker(observed: Observed) -> Observed:
    return replace(observed, images={name: pixels // 2 for name, pixels in observed.images.items()})


def test_what_the_server_refuses_is_a_sentence(tiny_vla):
    learner = learner_of(tiny_vla, "full")
    with served(tiny_vla) as server, publishing(server, learner) as publisher:
        publisher.begin()
        learner.model.language_model.lm_head.weight.data[0, 0] = float("inf")
        with pytest.raises(
            ValueError, match=r"refused \(INVALID_ARGUMENT\): data: tensor \S*lm_head.weight must be finite"
        ):
            publisher.publish(0)
        assert live(server) == 0


def test_a_server_that_stays_away_is_waited_for_and_then_told(tiny_vla):
    learner = learner_of(tiny_vla, "full")
    with served(tiny_vla) as server, publishing(server, learner, patience_s=0.5) as publisher:
        publisher.begin()
        server.begin_stop().result(30)
        with pytest.raises(ServerGone, match="has been away for"):
            publisher.publish(0)


def test_an_adapters_folder_can_be_sent_by_itself(tiny_vla, tmp_path):
    learner = learner_of(tiny_vla, "lora")
    with served(tiny_vla) as server, publishing(server, learner) as publisher:
        publisher.begin()
        learn(learner)
        save_lora(learner.model, tmp_path)
        version = publisher.send(tmp_path, parent=0, note="by hand", set_live=True)
        assert live(server) == version
        assert publisher.prove(version).version == version
        info = publisher._admin.ListVersions(admin_pb2.ListVersionsRequest()).versions[version]
        assert (info.note, info.kind) == ("by hand", admin_pb2.WEIGHTS_KIND_LORA)
