"""New weights go to the server, and it has to show that it serves them.

Two proofs after every publish, each of what the other cannot see: the tensors as they lie on the server's device have
the SHA-256 of the learner's, and both sides give the same log-probabilities to the tokens of a probe batch.

Shapes: B probes, N action tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save_file

from policy_server.vla.checkpoint import DTYPES, fingerprint_of, weights_digests
from policy_server.vla.checkpoint import WEIGHTS as TENSORS
from policy_server.vla.derived import as_served
from policy_server.vla.lora import CONFIG as ADAPTER_CONFIG
from policy_server.vla.lora import WEIGHTS as ADAPTER
from policy_server.vla.lora import lora_tensors, save_lora
from policy_server.vla.model import VLA
from policy_server.vla.preprocessing import Prepared, Preprocessor
from policy_server.vla.scoring import score
from policy_server.vla.tokenizer import Tokenizer
from protos import admin_pb2, admin_pb2_grpc, episode_pb2, policy_pb2, policy_pb2_grpc
from protos.channel import DEFAULT_DEADLINE_S, Credentials, dial
from protos.codec import decode_tensor, encode_image, encode_tensor
from rl_trainer.patience import patiently

PART_BYTES = 4 * 2**20
PUBLISH_S = 900.0
"""How long sending and building may take."""
PROBES = 8
WORDS = ("pick", "up", "the", "open", "drawer", "and", "place", "it", "in", "basket", "push", "plate", "stove")
FACTOR = 5.0
"""The tolerance is this many times the gap between the sides when both are known to hold the same weights."""
LEAST_TOLERANCE = 5e-5
"""What batching alone may change in float32."""
WIDEST_GAP = {"float32": 1e-3, "bfloat16": 1.0}
"""A wider one between equal weights is no rounding: the sides prepare their inputs differently."""

T = TypeVar("T")


class PublishMismatch(RuntimeError):
    """The server does not serve what the learner holds.  The message says what differs, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """That a version of the server is the learner's model."""

    version: int
    fingerprint: str
    gap: float
    """largest difference between the two sides' log-probabilities over the probe batch"""
    tolerance: float


class Publisher:
    """Publishes one model's weights: its adapter where it has one, else every parameter that is trained.

    server, admin: HOST:PORT of the policy service and of the admin service.
    credentials, admin_credentials: what each of them is shown.
    patience_s: how long the server may be away before ServerGone is raised.
    """

    def __init__(
        self,
        server: str,
        admin: str,
        *,
        model: VLA,
        tokenizer: Tokenizer,
        credentials: Credentials | None = None,
        admin_credentials: Credentials | None = None,
        patience_s: float = 300.0,
    ):
        self.model, self.proof = model, None
        self._tokenizer, self._patience_s, self._address = tokenizer, patience_s, admin
        self._policy_door, self._admin_door = (server, credentials), (admin, admin_credentials)
        self._channels = [dial(server, credentials), dial(admin, admin_credentials)]
        self._policy = policy_pb2_grpc.PolicyStub(self._channels[0])
        self._admin = admin_pb2_grpc.AdminStub(self._channels[1])
        self._dtype, self._tolerance = "", 0.0
        self._frozen: dict[str, str] = {}  # digests of what is not trained

    def begin(self, version: int = 0) -> int:
        """Calibrates on a version of the server that is known to be the learner's model, and gives it.

        Finds what the server computes in, and how far rounding alone sets the sides apart.  Raises PublishMismatch when
        the model is not that version, or sees something else in a probe.
        """
        spec = self._call(
            lambda: self._policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=DEFAULT_DEADLINE_S), self._policy_door
        )
        self._base_fingerprint = spec.base_fingerprint
        self._probes = Probes(self.model, self._tokenizer, spec)
        theirs = self._fingerprint(version)
        digests, ours = dict[str, str](), dict[str, str]()
        for dtype in sorted(DTYPES, key=lambda name: DTYPES[name] != self.model.action_head.dtype):  # its own first
            digests = weights_digests(self.model, dtype)
            ours[dtype] = fingerprint_of(digests.values())
            if ours[dtype] == theirs:
                self._dtype = dtype
                break
        else:
            raise PublishMismatch(
                f"version {version} of {self._address} is not the learner's model: its tensors hash to {theirs[:12]},"
                f" the learner's to {' or '.join(f'{hash[:12]} in {dtype}' for dtype, hash in ours.items())}"
            )
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        self._frozen = {name: digests[name] for name in frozen & digests.keys()}
        gap = self._gap(version, as_served(self.model, self._dtype))
        if gap > WIDEST_GAP[self._dtype]:
            raise PublishMismatch(
                f"version {version} of {self._address} has the learner's weights, but its log-probabilities differ by"
                f" {gap:.2g}, at most {WIDEST_GAP[self._dtype]:g} in {self._dtype}: the sides see different inputs"
            )
        self._tolerance = max(FACTOR * gap, LEAST_TOLERANCE)
        self.proof = Proof(version=version, fingerprint=theirs, gap=gap, tolerance=self._tolerance)
        return version

    def publish(self, parent: int, *, note: str = "", live: bool = True) -> int:
        """Makes the model's weights a new version and gives its number, once it is proved.

        live: it is what the server then answers with where no version is asked for.
        Raises PublishMismatch, and then the version before stays live; ValueError when the server refuses the weights.
        """
        with TemporaryDirectory(prefix="publish-") as folder:
            version = self.send(self._saved(Path(folder)), parent=parent, note=note)
        self.proof = self.prove(version)
        if live:
            self._call(lambda: self._admin.SetLive(admin_pb2.SetLiveRequest(version=version), timeout=PUBLISH_S))
        return version

    def send(self, folder: Path, *, parent: int, note: str = "", set_live: bool = False) -> int:
        """Makes a version of an adapter's folder, or of one with model.safetensors; nothing is proved by that."""
        is_adapter = (folder / ADAPTER).is_file()
        path = folder / (ADAPTER if is_adapter else TENSORS)
        header = admin_pb2.WeightsHeader(
            kind=admin_pb2.WEIGHTS_KIND_LORA if is_adapter else admin_pb2.WEIGHTS_KIND_FULL,
            base_fingerprint=self._base_fingerprint,
            parent=parent,
            sha256=_sha256(path),
            bytes=path.stat().st_size,
            adapter_config=(folder / ADAPTER_CONFIG).read_text(encoding="utf-8") if is_adapter else "",
            note=note,
            set_live=set_live,
        )
        reply = self._call(lambda: self._admin.PublishWeights(_messages(header, path), timeout=PUBLISH_S))
        return reply.version

    def prove(self, version: int) -> Proof:
        """That the version is what the learner holds now.  Raises PublishMismatch."""
        served = as_served(self.model, self._dtype)
        ours = fingerprint_of(weights_digests(served, known=self._frozen).values())
        theirs = self._fingerprint(version)
        if ours != theirs:
            raise PublishMismatch(
                f"version {version} of {self._address} is not what the learner holds: its tensors hash to"
                f" {theirs[:12]}, the learner's in {self._dtype} to {ours[:12]}"
            )
        gap = self._gap(version, served)
        if gap > self._tolerance:
            raise PublishMismatch(
                f"version {version} of {self._address} does not act as the learner: its log-probabilities differ by"
                f" {gap:.2g} on a probe batch, at most {self._tolerance:.2g} is rounding"
            )
        return Proof(version=version, fingerprint=ours, gap=gap, tolerance=self._tolerance)

    @contextmanager
    def server_asleep(self) -> Iterator[None]:
        """The server's weights are off its device while the block lasts, once the episodes at work have ended."""
        request = admin_pb2.SleepRequest(within_s=self._patience_s)
        self._call(lambda: self._admin.Sleep(request, timeout=self._patience_s + PUBLISH_S))
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # room for the weights that come back
            self.wake_server()

    def wake_server(self) -> None:
        """Returns when it serves; one that is awake stays so."""
        self._call(lambda: self._admin.Wake(admin_pb2.WakeRequest(), timeout=PUBLISH_S))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _saved(self, folder: Path) -> Path:
        if lora_tensors(self.model):
            save_lora(self.model, folder)
            return folder
        trained = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / TENSORS, metadata={"format": "pt"})
        return folder

    def _fingerprint(self, version: int) -> str:
        """Of the tensors on the server's device."""
        listed = self._call(
            lambda: self._admin.ListVersions(admin_pb2.ListVersionsRequest(), timeout=DEFAULT_DEADLINE_S)
        )
        for info in listed.versions:
            if info.version == version:
                return info.device_fingerprint
        known = [info.version for info in listed.versions]
        raise PublishMismatch(f"there is no version {version} on {self._address}; there are {known[-8:]}")

    def _gap(self, version: int, served: VLA) -> float:
        """Largest difference between the server's log-probabilities and our model's; infinite when one is no number."""
        request = self._probes.request(version)
        reply = self._call(lambda: self._admin.ScoreProbe(request, timeout=PUBLISH_S))
        ours_BN = self._probes.scored(served)
        theirs_BN = decode_tensor(reply.token_logprobs, "token_logprobs", dtype="float32", shape=ours_BN.shape)
        gap = float(np.abs(ours_BN - theirs_BN).max())
        return gap if np.isfinite(gap) else np.inf

    def _call(self, call: Callable[[], T], door: tuple[str, Credentials | None] | None = None) -> T:
        """door: the admin service's, if not given."""
        address, credentials = door or self._admin_door
        return patiently(call, address=address, credentials=credentials, patience_s=self._patience_s)


class Probes:
    """Observations of noise and tokens at random: they ask every tensor, whatever the policy is good at."""

    def __init__(self, model: VLA, tokenizer: Tokenizer, spec: policy_pb2.PolicySpec):
        config, draw = model.config, np.random.default_rng(0)
        preprocessor = Preprocessor(config, tokenizer, unnorm_key=spec.unnorm_key)
        shape = (PROBES, config.action_tokens)
        self._token_ids_BN = draw.integers(config.action_begin, config.vocabulary, shape).astype(np.int32)
        self._observations: list[episode_pb2.Observation] = []
        self._prepared: list[Prepared] = []
        for _ in range(PROBES):
            pixels = draw.integers(0, 256, (spec.images[0].height, spec.images[0].width, 3), dtype=np.uint8)
            state_S = draw.normal(scale=0.3, size=config.state_dim).astype(np.float32)
            instruction = " ".join(draw.choice(WORDS, 5))
            self._prepared.append(preprocessor.prepare(pixels, instruction, state_S))
            self._observations.append(
                episode_pb2.Observation(
                    images={spec.images[0].name: encode_image(pixels)},
                    state=encode_tensor(state_S),
                    instruction=instruction,
                )
            )

    def request(self, version: int) -> admin_pb2.ScoreProbeRequest:
        probes = [
            admin_pb2.Probe(observation=observation, token_ids=encode_tensor(token_ids_N))
            for observation, token_ids_N in zip(self._observations, self._token_ids_BN, strict=True)
        ]
        return admin_pb2.ScoreProbeRequest(version=version, probes=probes, temperature=1.0)

    def scored(self, model: VLA) -> np.ndarray:
        """float32 (B, N): our own model's log-probabilities."""
        return score(model, self._prepared, self._token_ids_BN, 1.0)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


def _messages(header: admin_pb2.WeightsHeader, path: Path) -> Iterator[admin_pb2.PublishWeightsRequest]:
    yield admin_pb2.PublishWeightsRequest(header=header)
    for part in _parts(path):
        yield admin_pb2.PublishWeightsRequest(data=part)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield part
