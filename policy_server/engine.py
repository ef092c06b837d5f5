"""The loop between the queue and the model, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from policy_server.batcher import Batcher, DecodeAnswer, DecodeRequest
from policy_server.errors import InternalFault

log = logging.getLogger(__name__)

Decode = Callable[[list[DecodeRequest]], list[DecodeAnswer]]
"""The seam: one batch of one version in, one answer for each out.  It may as well be another process."""


class Engine:
    """Decodes batch after batch until the batcher has stopped and is empty."""

    def __init__(self, batcher: Batcher, decode: Decode):
        self._batcher = batcher
        self._decode = decode
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Returns when everything queued before batcher.stop() is answered."""
        self._thread.join()

    def _run(self) -> None:
        while batch := self._batcher.next_batch():
            started_s = time.monotonic()
            try:
                answers = self._decode([ticket.request for ticket in batch])
            except Exception:  # whatever a model raises, the others' requests go on
                log.exception("the model failed on a batch of %d", len(batch))
                self._batcher.fail(batch, InternalFault("the model failed on this batch; the server's log says why"))
            else:
                self._batcher.resolve(batch, answers, started_s=started_s)
