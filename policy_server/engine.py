"""The loop between the queue and the model, in a thread for each lane of the model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest, Ticket
from policy_server.errors import EngineGone, InternalFault, Refused, Unavailable

log = logging.getLogger(__name__)

SWITCH_S = 1e-4
"""How soon the engine's thread gets the interpreter back from others; it gives it up in every operation."""

Decode = Callable[[list[DecodeRequest], int], list[DecodeAnswer]]
"""The seam: one batch in, and the lane that is to decode it; one answer for each out."""

Observe = Callable[[Sequence[Ticket], Sequence[DecodeAnswer], float], None]
"""Told of every pass: its tickets, its answers, when it began (time.monotonic)."""


class Engine:
    """Decodes batch after batch until the batcher has stopped and is empty."""

    def __init__(self, batcher: Batcher, decode: Decode, *, lanes: int, observe: Observe):
        self._batcher = batcher
        self._decode = decode
        self._observe = observe
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"engine {lane}", daemon=True)
            for lane in range(lanes)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Returns when everything queued before batcher.stop() is answered."""
        for thread in self._threads:
            thread.join()

    def _run(self, lane: int) -> None:
        while batch := self._batcher.next_batch():
            started_s = time.monotonic()
            try:
                answers = self._decode([ticket.request for ticket in batch], lane)
                self._batcher.resolve(batch, answers, started_s=started_s)
                self._observe(batch, answers, started_s)
            except EngineGone:
                self._batcher.fail(batch, Unavailable("the model is gone; the server stops"))
            except Refused as refused:
                self._batcher.fail(batch, refused)
            except Exception:  # whatever is raised, the others' requests go on
                log.exception("the model failed on a batch of %d", len(batch))
                self._batcher.fail(batch, InternalFault("the model failed on this batch; the server's log says why"))
