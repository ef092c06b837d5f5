"""How far each reader of the episodes has safely read, in one small file that is replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from policy_server.errors import CannotStart
from protos.episode_file import sync


class Cursors:
    """Sequence numbers by reader, as they lie at path.  Raises CannotStart when that file says something else."""

    def __init__(self, path: Path):
        self._path = path
        self.by_reader = _read(path) if path.exists() else {}

    def laggard(self, sequence: int) -> str | None:
        """The reader that is furthest behind, when it has yet to read that episode."""
        slowest = min(self.by_reader, key=self.by_reader.__getitem__, default=None)
        return slowest if slowest is not None and self.by_reader[slowest] < sequence else None

    def write(self, by_reader: Mapping[str, int]) -> None:
        """Survives a power cut once it returns.  Raises OSError."""
        if by_reader == self.by_reader:
            return
        new = self._path.with_suffix(".new")
        with open(new, "w") as file:
            json.dump(by_reader, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
        sync(self._path.parent)
        self.by_reader = dict(by_reader)


def _read(path: Path) -> dict[str, int]:
    try:
        cursors = json.loads(path.read_text())
    except ValueError as error:
        cursors = error
    if isinstance(cursors, dict) and all(isinstance(cursor, int) for cursor in cursors.values()):
        return cursors
    raise CannotStart(f"{path.name} must say how far each reader has read; delete it to start anew; got {cursors!r}")
