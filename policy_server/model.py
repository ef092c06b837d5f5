"""What the server needs of a policy: computed in this process (vla_model.py), or in others (remote_model.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.observation import Observed
from policy_server.version_store import Kind
from protos import policy_pb2


class Model(Protocol):
    """What the server needs of a policy.  `Any` where weights are meant: what first or build() gave."""

    @property
    def first(self) -> Any:
        """The weights it begins with."""
        ...

    @property
    def spec(self) -> policy_pb2.PolicySpec:
        """All of PolicySpec but the versions and whether episodes are stored."""
        ...

    def prepare(self, observed: Observed) -> Any:
        """An observation as decode() wants it; runs in any thread.  Raises BadRequest."""
        ...

    def together(self, weights: Sequence[Any]) -> bool:
        """Whether one pass can use them all, each for its own requests."""
        ...

    @property
    def lanes(self) -> int:
        """How many passes can run beside each other."""
        ...

    def decode(self, requests: Sequence[DecodeRequest], weights: Sequence[Any], lane: int) -> list[DecodeAnswer]:
        """One pass, each request with its own weights; from one thread for each lane.  Raises EngineGone."""
        ...

    def warm_up(self) -> None:
        """Everything that makes the first answers slow.  Raises CannotStart where the device has no room for it."""
        ...

    def watch(self, gone: Callable[[], object]) -> None:
        """From now on gone() is called, once and in any thread, when the model is lost."""
        ...

    def build(self, folder: Path, kind: Kind) -> Any:
        """The weights in a folder, on the device; nothing of others changes.

        Raises BadRequest, and Overloaded where the device has no room.
        """
        ...

    def score(self, prepared: Sequence[Any], token_ids_BN: np.ndarray, temperature: float, weights: Any) -> np.ndarray:
        """float32 log-probabilities (B, N) of given tokens in one pass."""
        ...

    def fingerprint(self, weights: Any) -> str:
        """SHA-256 over the tensors as they lie on the device."""
        ...

    def sleep(self) -> int:
        """All weights off the device, which then has none to decode with; gives how many bytes they are."""
        ...

    def wake(self) -> None:
        """Back on it, as they were.  Raises Overloaded where it has no room, and then they sleep on."""
        ...

    @property
    def max_weights_bytes(self) -> int:
        """The largest file that build() could have a use for."""
        ...


def share_a_pass(weights: Sequence[Any]) -> bool:
    """Whether they are of one `vla`, with adapters of one `layout` ("" without one)."""
    return len({one.vla for one in weights}) == 1 and len({one.layout for one in weights} - {""}) <= 1
