"""What the Admin service refuses, by field and by tensor; none of it changes what is served."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from policy_server.refusals import REFUSAL_KEY
from policy_server.vla.checkpoint import weights_fingerprint
from policy_server.vla.model import VLA
from protos import admin_pb2, policy_pb2
from protos.codec import encode_tensor
from tests.server.publishing import LORA, NAME, adapter, listed, moved, publication
from tests.server.running import eventually
from tests.server.test_served_vla import observation

LAYER = "base_model.model." + NAME.removesuffix(".weight")


def nan(base: VLA) -> dict[str, torch.Tensor]:
    tensor = moved(base, 0.0)[NAME].clone()
    tensor[1, 2] = float("nan")
    return {NAME: tensor}


NO_WEIGHTS = {
    "no safetensors": (lambda base: b"not safetensors", "not a readable safetensors file"),
    "no tensor": (lambda base: save({}), "at least one tensor"),
    "an unknown tensor": (lambda base: save({"odd.weight": torch.zeros(2)}), "unknown tensor odd.weight"),
    "a wrong shape": (lambda base: save({NAME: torch.zeros(2, 3)}), rf"tensor {NAME} must have shape \(32, 64\), got"),
    "a wrong dtype": (
        lambda base: save({NAME: moved(base, 0)[NAME].to(torch.int32)}),
        rf"tensor {NAME} must be one of",
    ),
    "a number that is none": (
        lambda base: save(nan(base)),
        rf"tensor {NAME} must be finite, got 1 values that are not",
    ),
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_full_weights_that_do_not_fit_are_refused_by_name(admin, base, tmp_path, what):
    make, sentence = NO_WEIGHTS[what]
    refused(admin, publication(weights_fingerprint(base), make(base), set_live=True), "data", sentence)
    nothing_changed(admin, tmp_path)


def edited(data: bytes, folder: Path, edit) -> bytes:
    (folder / "edited.safetensors").write_bytes(data)
    tensors = load_file(folder / "edited.safetensors")
    edit(tensors)
    return save(tensors)


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for matrix in ("lora_A", "lora_B"):
        del tensors[f"{LAYER}.{matrix}.weight"]


NO_ADAPTER = {
    "half a layer": (lambda t: t.pop(f"{LAYER}.lora_B.weight"), {}, rf"tensor {LAYER}.lora_B.weight is missing"),
    "a layer that the config names": (drop_layer, {}, rf"tensor {LAYER}.lora_A.weight is missing"),
    "an unknown layer": (lambda t: t.update({"odd.lora_A.weight": torch.zeros(2, 2)}), {}, "unknown tensor odd.lora_A"),
    "another rank": (lambda t: None, {"r": 3}, r"must have shape \(3, 1?\d+\), got"),
    "a rank no memory holds": (lambda t: None, {"r": 10**12}, "must have shape"),
    "another kind": (lambda t: None, {"use_dora": True}, "use_dora must be False, got True"),
    "no number": (
        lambda t: t[f"{LAYER}.lora_A.weight"].fill_(float("inf")),
        {},
        rf"{LAYER}.lora_A.weight must be finite",
    ),
    "no scale": (lambda t: None, {"lora_alpha": None}, "lora_alpha must be a number"),
}


@pytest.mark.parametrize("what", NO_ADAPTER)
def test_an_adapter_that_does_not_fit_is_refused_by_name(admin, base, tmp_path, what):
    edit, changes, sentence = NO_ADAPTER[what]
    fingerprint = weights_fingerprint(base)
    _, data, config = adapter(base, tmp_path / "adapter")
    changed = json.dumps({**json.loads(config), **changes})
    requests = publication(fingerprint, edited(data, tmp_path, edit), kind=LORA, adapter_config=changed, set_live=True)
    refused(admin, requests, "data", sentence)
    nothing_changed(admin, tmp_path)


@pytest.mark.parametrize("config", ["no json", "[1]", '{"r": 2, "lora_alpha": 1, "target_modules": [[1]]}'])
def test_an_adapter_config_that_is_none_is_refused(admin, base, tmp_path, config):
    fingerprint = weights_fingerprint(base)
    _, data, _ = adapter(base, tmp_path / "adapter")
    refused(admin, publication(fingerprint, data, kind=LORA, adapter_config=config), "data", "adapter|target_modules")
    nothing_changed(admin, tmp_path)


NO_HEADER = {
    "kind": ({"kind": 0}, "must be FULL or LORA, got code 0"),
    "base_fingerprint": ({"base_fingerprint": "e" * 64}, "for another base"),
    "parent": ({"parent": 7}, "there is no version 7"),
    "bytes": ({"bytes": 2**50}, "must be in 1.."),
    "note": ({"note": "n" * 1001}, "at most 1000 characters, got 1001"),
    "adapter_config": ({"kind": LORA}, "must be 1 to"),
}


@pytest.mark.parametrize("field", NO_HEADER)
def test_a_header_that_forbids_the_rest_is_refused_by_field(admin, base, tmp_path, field):
    fields, sentence = NO_HEADER[field]
    requests = publication(weights_fingerprint(base), save(moved(base, 1.0)), **fields)
    refused(admin, requests, f"header.{field}", sentence)
    nothing_changed(admin, tmp_path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sha256": "0" * 64}, "must have the SHA-256 '0000"),
        ({"bytes": 100}, "must be 100 bytes as the header says, got more"),
        ({"bytes": 20_000}, "must be 20000 bytes as the header says, got 8"),
    ],
)
def test_a_file_that_is_not_what_its_header_says_is_refused(admin, base, tmp_path, fields, sentence):
    refused(admin, publication(weights_fingerprint(base), save(moved(base, 1.0)), **fields), "data", sentence)
    nothing_changed(admin, tmp_path)


def test_a_publish_begins_with_one_header(admin, base, tmp_path):
    data = admin_pb2.PublishWeightsRequest(data=b"weights")
    refused(admin, iter([data]), "header", "the first message must be the header")
    refused(admin, iter([]), "header", "the first message must be the header")
    header, *_ = publication(weights_fingerprint(base), b"weights")
    refused(admin, iter([header, header]), "data", "only data may follow the header")
    nothing_changed(admin, tmp_path)


def test_a_publish_that_its_client_gives_up_leaves_nothing(admin, base, tmp_path):
    never = threading.Event()

    def requests():
        whole = list(publication(weights_fingerprint(base), save(moved(base, 1.0))))
        yield from whole[:3]
        never.wait(30)

    with pytest.raises(grpc.RpcError) as error:
        admin.PublishWeights(requests(), timeout=1)
    never.set()
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: not list((tmp_path / "versions").iterdir()))
    nothing_changed(admin, tmp_path)


NO_PROBE = {
    "version": (lambda request: setattr(request, "version", 9), "there is no version 9"),
    "temperature": (lambda request: setattr(request, "temperature", 0), "must be finite and positive"),
    "probes": (lambda request: request.ClearField("probes"), "must be 1 to 64 of them, got 0"),
    "probes[1].observation.instruction": (
        lambda request: setattr(request.probes[1].observation, "instruction", " "),
        "got an empty instruction",
    ),
    "probes[0].observation.images[agentview]": (
        lambda request: request.probes[0].observation.images.clear(),
        "the policy needs this camera",
    ),
    "probes[1].token_ids": (
        lambda request: request.probes[1].token_ids.CopyFrom(encode_tensor(np.full(14, 3, np.int32))),
        "must be action tokens, 512 to 767",
    ),
    "probes[0].token_ids": (
        lambda request: request.probes[0].token_ids.CopyFrom(encode_tensor(np.zeros(3, np.int32))),
        r"shape must be \(14,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize("field", NO_PROBE)
def test_a_probe_that_cannot_be_scored_is_refused_by_field(admin, field):
    spoil, sentence = NO_PROBE[field]
    tokens = encode_tensor(np.full(14, 600, np.int32))
    probes = [admin_pb2.Probe(observation=observation(i), token_ids=tokens) for i in range(2)]
    request = admin_pb2.ScoreProbeRequest(probes=probes, temperature=1.0)
    spoil(request)
    with pytest.raises(grpc.RpcError, match=sentence) as error:
        admin.ScoreProbe(request, timeout=30)
    assert refusal(error.value).field == field


def test_a_live_version_that_is_not_there_is_refused(admin):
    with pytest.raises(grpc.RpcError, match="there is no version 3") as error:
        admin.SetLive(admin_pb2.SetLiveRequest(version=3), timeout=30)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND and refusal(error.value).field == "version"
    assert listed(admin).live == 0


def refusal(error: grpc.RpcError) -> policy_pb2.Refusal:
    metadata = {item.key: item.value for item in error.trailing_metadata()}
    return policy_pb2.Refusal.FromString(metadata[REFUSAL_KEY])


def refused(admin, requests, field: str, sentence: str) -> None:
    with pytest.raises(grpc.RpcError, match=sentence) as error:
        admin.PublishWeights(requests, timeout=60)
    assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert refusal(error.value).field == field
    assert "/tmp" not in error.value.details()


def nothing_changed(admin, tmp_path: Path) -> None:
    versions = listed(admin)
    assert versions.live == 0 and [info.version for info in versions.versions] == [0]
    assert not list((tmp_path / "versions").iterdir())
