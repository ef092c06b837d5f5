"""The model in processes of its own, one for each lane, behind the interface of a model in this one.

Each process loads the whole model.  A pass goes to the process of its lane; new weights are built by all of them,
beside the passes.  What this process holds of weights is a key: when that is dropped, so are the weights.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from policy_server.batcher import DecodeAnswer, DecodeRequest
from policy_server.config import ServeConfig
from policy_server.engine import SWITCH_S
from policy_server.errors import EngineGone, InternalFault, PolicyServerError
from policy_server.logs import configure as configure_log
from policy_server.model import share_a_pass
from policy_server.preparer import Preparer
from policy_server.version_store import Kind
from protos import policy_pb2

log = logging.getLogger(__name__)

FIRST = 0
CLOSE_S = 10.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Key:
    """Weights that the processes hold."""

    number: int
    vla: int
    """Whose passes they use: the number of those that brought this model."""
    layout: str
    """Of their adapter; "" without one."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What this process must know of a model that another one has loaded."""

    spec: bytes
    prepare: Preparer
    max_weights_bytes: int
    first: Key


class RemoteModel:
    """Starts the processes, and returns when they have loaded the model.  Raises CannotStart.

    devices: of the lanes; one may be there more than once.  Whatever a process is asked raises EngineGone when it died.
    """

    def __init__(self, config: ServeConfig, devices: Sequence[str]):
        self._closing = False
        self._processes = [_Process(replace(config, device=device, devices=())) for device in devices]
        self.lanes = len(devices)
        try:
            loaded: Loaded = self._each(lambda process: process.change("load"))[0]
        except BaseException:
            self.close()
            raise
        self.spec = policy_pb2.PolicySpec.FromString(loaded.spec)
        self.prepare, self.max_weights_bytes, self.first = loaded.prepare, loaded.max_weights_bytes, loaded.first
        self._numbers = itertools.count(FIRST + 1)

    def warm_up(self) -> None:
        self._each(lambda process: process.compute("warm_up"))

    def together(self, weights: Sequence[Key]) -> bool:
        return share_a_pass(weights)

    def decode(self, requests: Sequence[DecodeRequest], weights: Sequence[Key], lane: int = 0) -> list[DecodeAnswer]:
        return self._processes[lane].compute("decode", list(requests), [key.number for key in weights])

    def score(self, prepared: Sequence[Any], token_ids_BN: np.ndarray, temperature: float, weights: Key) -> np.ndarray:
        return self._processes[0].compute("score", list(prepared), token_ids_BN, temperature, weights.number)

    def build(self, folder: Path, kind: Kind) -> Key:
        number = next(self._numbers)
        try:
            key: Key = self._each(lambda process: process.change("build", number, folder, kind))[0]
        except BaseException:  # one may have them already
            self._drop(number)
            raise
        weakref.finalize(key, self._drop, number).atexit = False
        return key

    def fingerprint(self, weights: Key) -> str:
        """Of the tensors on every device.  Raises InternalFault where they differ."""
        first, *others = self._each(lambda process: process.change("fingerprint", weights.number))
        if any(other != first for other in others):
            raise InternalFault("the devices hold different weights for one version")
        return first

    def sleep(self) -> int:
        return sum(self._all_or_none("sleep", "wake"))

    def wake(self) -> None:
        self._all_or_none("wake", "sleep")

    def watch(self, gone: Callable[[], object]) -> None:
        threading.Thread(target=self._watch, args=(gone,), name="watch", daemon=True).start()

    def close(self) -> None:
        """Ends the processes."""
        self._closing = True
        for process in self._processes:
            process.close()

    def _watch(self, gone: Callable[[], object]) -> None:
        multiprocessing.connection.wait([process.sentinel for process in self._processes])
        if not self._closing:
            gone()

    def _each(self, ask: Callable[[_Process], Any]) -> list[Any]:
        """Asks all at once."""
        with ThreadPoolExecutor(len(self._processes)) as pool:
            return list(pool.map(ask, self._processes))

    def _all_or_none(self, what: str, back: str) -> list[Any]:
        """None of them is left in another state than the others."""
        try:
            return self._each(lambda process: process.change(what))
        except PolicyServerError:
            with contextlib.suppress(PolicyServerError):
                self._each(lambda process: process.change(back))
            raise

    def _drop(self, number: int) -> None:
        with contextlib.suppress(EngineGone):
            self._each(lambda process: process.change("drop", number))


class _Process:
    """One process and two links to it: passes do not wait for weights that are being built."""

    def __init__(self, config: ServeConfig):
        context = multiprocessing.get_context("spawn")
        (self._compute, compute), (self._change, change) = context.Pipe(), context.Pipe()
        self._process = context.Process(target=_serve, args=(compute, change, config), name="engine", daemon=True)
        self._process.start()
        self.sentinel = self._process.sentinel
        compute.close()
        change.close()
        self._computing, self._changing = threading.Lock(), threading.Lock()

    def compute(self, what: str, *args: Any) -> Any:
        with self._computing:
            return _ask(self._compute, what, *args)

    def change(self, what: str, *args: Any) -> Any:
        with self._changing:
            return _ask(self._change, what, *args)

    def close(self) -> None:
        self._compute.close()
        self._change.close()
        self._process.join(CLOSE_S)
        self._process.kill()


def _ask(link: Connection, what: str, *args: Any) -> Any:
    try:
        link.send((what, args))
        raised, said = link.recv()
    except (EOFError, OSError) as error:
        raise EngineGone("the process that runs the model is gone") from error
    if raised:
        raise said
    return said


def _serve(compute: Connection, change: Connection, config: ServeConfig) -> None:
    """What the process does, until its links are closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # its parent says when
    configure_log(config.log_format)
    sys.setswitchinterval(SWITCH_S)
    engine = _Engine(config)
    threading.Thread(target=_answer, args=(change, engine), daemon=True).start()
    _answer(compute, engine)


def _answer(link: Connection, engine: _Engine) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, args = link.recv()
            try:
                said = (False, getattr(engine, what)(*args))
            except PolicyServerError as error:
                said = (True, error)
            except Exception:  # whatever a model raises, and perhaps cannot be sent
                log.exception("the model failed to %s", what)
                said = (True, InternalFault(f"the model failed to {what}; the server's log says why"))
            link.send(said)


class _Engine:
    """The model on its side of the links, and the weights by the numbers of their keys."""

    def __init__(self, config: ServeConfig):
        self._config = config
        self._weights: dict[int, Any] = {}

    def load(self) -> Loaded:
        from policy_server.loading import load

        self._model = model = load(self._config)
        self._weights[FIRST] = model.first
        return Loaded(
            spec=model.spec.SerializeToString(),
            prepare=model.prepare,
            max_weights_bytes=model.max_weights_bytes,
            first=self._key(FIRST),
        )

    def warm_up(self) -> None:
        self._model.warm_up()

    def decode(self, requests: list[DecodeRequest], numbers: list[int]) -> list[DecodeAnswer]:
        return self._model.decode(requests, [self._weights[number] for number in numbers])

    def score(self, prepared: list[Any], token_ids_BN: np.ndarray, temperature: float, number: int) -> np.ndarray:
        return self._model.score(prepared, token_ids_BN, temperature, self._weights[number])

    def build(self, number: int, folder: Path, kind: Kind) -> Key:
        self._weights[number] = self._model.build(folder, kind)
        return self._key(number)

    def fingerprint(self, number: int) -> str:
        return self._model.fingerprint(self._weights[number])

    def sleep(self) -> int:
        return self._model.sleep()

    def wake(self) -> None:
        self._model.wake()

    def drop(self, number: int) -> None:
        self._weights.pop(number, None)

    def _key(self, number: int) -> Key:
        weights = self._weights[number]
        base = self._weights[FIRST].vla
        return Key(
            number=number,
            vla=FIRST if weights.vla is base else number,
            layout=weights.layout,
        )
