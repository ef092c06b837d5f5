"""Pictures of a curve: panels in one figure, each drawn by a function of its own.  No screen is needed."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_trainer.metrics import Row

Axes = Any
"""matplotlib's; it takes half a second to import, and only who draws should wait for that."""
Draw = Callable[[Axes], None]

BLUE, PALE, DARK, GREY, ORANGE = "#33658a", "#86bbd8", "#22223b", "#b8b8c0", "#d1603d"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a94",
    "axes.grid": True,
    "grid.color": "#e4e4e8",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "vla-rl",
}
LEFT_IN, RIGHT_IN, BOTTOM_IN, TOP_IN = 0.7, 0.35, 0.5, 0.35
"""Around a panel, for its labels: to measure them would double the time of a picture."""
FEW = 30
"""Points that are still told apart when each is marked."""


def picture(panels: Mapping[str, Draw], *, columns: int = 2, size_in: tuple[float, float] = (5.0, 2.8)) -> Any:
    """A figure with a panel for each title, `columns` in a row, each of that width and height."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width_in, height_in = size_in
    with rc_context(STYLE):
        figure = Figure(figsize=(width_in * columns, height_in * rows))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=LEFT_IN / (width_in * columns),
            right=1 - RIGHT_IN / (width_in * columns),
            bottom=BOTTOM_IN / (height_in * rows),
            top=1 - TOP_IN / (height_in * rows),
            wspace=(LEFT_IN + RIGHT_IN) / (width_in - LEFT_IN - RIGHT_IN),
            hspace=(BOTTOM_IN + TOP_IN) / (height_in - BOTTOM_IN - TOP_IN),
        )
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (title, draw) in zip(axes, panels.items(), strict=False):
            axis.set_title(title)
            draw(axis)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
    return figure


def write_png(path: Path, figure: Any) -> None:
    figure.savefig(path, dpi=110)


def as_svg(figure: Any) -> str:
    """An element for a page, with its text as text."""
    from matplotlib import rc_context

    page = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(page, format="svg", metadata={"Date": None})
    svg = page.getvalue()
    return svg[svg.index("<svg") :]


def series(rows: Sequence[Row], name: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """float64 each: where a scalar was measured, and its values."""
    measured = [row for row in rows if name in row]
    return np.array([row.get(x, 0.0) for row in measured]), np.array([row[name] for row in measured])


def lines(
    rows: Sequence[Row], names: Mapping[str, str] | Sequence[str], *, xlabel: str = "step", legend: bool = True, **axis
) -> Draw:
    """Scalars (name -> what the legend calls it); those never measured are left out.  axis: goes to Axes.set()."""
    labels = names if isinstance(names, Mapping) else {name: name for name in names}

    def draw(axes: Axes) -> None:
        colours = _colours(len(labels))
        for (name, label), colour in zip(labels.items(), colours, strict=True):
            steps, values = series(rows, name)
            if len(steps):
                axes.plot(steps, values, label=label, color=colour, linewidth=1.3, **_marked(steps))
        axes.set(xlabel=xlabel, **axis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if legend and axes.lines:
            axes.legend(ncols=-(-len(axes.lines) // 5))

    return draw


def stacked(rows: Sequence[Row], names: Mapping[str, str], *, xlabel: str, ylabel: str) -> Draw:
    """Scalars of each step on top of each other (name -> what the legend calls it)."""

    def draw(axes: Axes) -> None:
        steps = np.arange(min(row["step"] for row in rows), max(row["step"] for row in rows) + 1)
        edges, below = np.append(steps, steps[-1] + 1) - 0.5, np.zeros(len(steps))
        for (name, label), colour in zip(names.items(), _colours(len(names)), strict=True):
            where, values = series(rows, name)
            above = below.copy()
            above[(where - steps[0]).astype(int)] += values
            axes.stairs(above, edges, baseline=below, fill=True, label=label, color=colour)
            below = above
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.25 * below.max()))  # the legend lies above
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper left", ncols=len(names))

    return draw


def _marked(steps: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) <= FEW else {}


def _colours(count: int) -> list[Any]:
    """Few in the house's colours, many from a scale."""
    house = [BLUE, PALE, DARK, GREY, ORANGE]
    if count <= len(house):
        return house[:count]
    from matplotlib import colormaps

    table = colormaps["tab10" if count <= 10 else "viridis"]
    return [table(i if count <= 10 else i / (count - 1)) for i in range(count)]
