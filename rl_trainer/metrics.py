"""What a run measured: TensorBoard scalars, and a line per measurement in curve.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]

Row = Mapping[str, float]
"""A line of the curve, with its `step`."""


class Curve:
    """Scalars by step, kept in `folder`/curve.jsonl.

    first_step: a resumed run drops what was measured at or after it, so that the curve has one value a step; and rows
    of which `but` is true.
    """

    def __init__(
        self, folder: Path, *, first_step: int = 0, but: Callable[[Mapping[str, float]], bool] = lambda row: False
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "curve.jsonl"
        self.rows: list[dict[str, float]] = []
        if self._path.exists():
            self.rows = [row for row in read_curve(self._path) if row["step"] < first_step and not but(row)]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, step: int, **scalars: float) -> dict[str, float]:
        """The row that it makes.  A slash in a name makes a group in TensorBoard: `**{"validation/loss": 0.5}`."""
        row = {"step": step} | {name: float(value) for name, value in scalars.items()}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_curve(path: Path) -> list[dict[str, float]]:
    """The rows of a curve.jsonl; a last line that a full disk or a kill cut short is none."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
