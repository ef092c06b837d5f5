"""What a run measured: TensorBoard scalars, a line per measurement in curve.jsonl, and a picture of the curve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]


class Curve:
    """Scalars by step, kept in `folder`/curve.jsonl.

    first_step: a resumed run drops what was measured at or after it, so that the curve has one value a step.
    """

    def __init__(self, folder: Path, *, first_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "curve.jsonl"
        self.rows: list[dict[str, float]] = []
        if self._path.exists():
            rows = [json.loads(line) for line in self._path.read_text().splitlines()]
            self.rows = [row for row in rows if row["step"] < first_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, step: int, **scalars: float) -> None:
        """A slash in a name makes a group in TensorBoard: `**{"validation/loss": 0.5}`."""
        row = {"step": step} | {name: float(value) for name, value in scalars.items()}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one scalar."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def plot(self, path: Path, panels: dict[str, list[str]]) -> None:
        """A PNG with one panel per entry: title -> names of the scalars drawn in it, those never measured left out."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                steps, values = self.series(name)
                if steps:
                    axis.plot(steps, values, label=name)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize="small")
        figure.savefig(path, dpi=110)

    def close(self) -> None:
        self._file.close()
        self._board.close()
