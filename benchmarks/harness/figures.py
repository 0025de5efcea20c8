"""Pictures, made so that the same record gives the same file. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_NO_DATES = {".svg": {"Date": None}, ".png": {"Software": None}}


def drawing(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of so many inches, and its axes; it belongs to no window and no global state."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def saved(figure: Figure, axes: Axes, path: Path, legend: int | None = 8) -> Path:
    """Write it, with a grid, and a legend in letters of this size, or none."""
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "revwire"}):
        figure.savefig(path, dpi=150, metadata=_NO_DATES[path.suffix])
    return path
