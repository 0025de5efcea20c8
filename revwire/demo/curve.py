"""Peak bytes against seconds: a curve in plain characters, and as a picture."""

from __future__ import annotations

from math import log
from pathlib import Path
from string import ascii_uppercase

from revwire.demo.costs import Cost

MIB = 2**20
ROWS, COLUMNS = 12, 60


def drawn(table: list[Cost]) -> str:
    """A letter for each way: to the right is more memory (logarithmic), up is more time. At most 80 columns wide."""
    across = _scaled([log(cost.peak) for cost in table], COLUMNS - 1)
    up = _scaled([cost.ratio.median for cost in table], ROWS - 1)
    grid = [[" "] * (COLUMNS + len(table)) for _ in range(ROWS)]
    for letter, x, y in zip(ascii_uppercase, across, up, strict=False):
        row = grid[ROWS - 1 - y]
        row[next(i for i in range(x, len(row)) if row[i] == " ")] = letter  # beside one that lies there already
    ratios, peaks = [cost.ratio.median for cost in table], [cost.peak / MIB for cost in table]
    margins = {0: f"{max(ratios):.2f}", ROWS - 1: f"{min(ratios):.2f}"}
    lines = [f"{margins.get(i, ''):>6} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    low, high = f"{min(peaks):.1f}", f"{max(peaks):.1f} MiB"
    axis = [f"{'':>6} +{'-' * COLUMNS}", f"{'':>8}{low}{high:>{COLUMNS - len(low)}}"]
    below = f"{'peak of a step (log)':>{COLUMNS}}"
    return "\n".join(["seconds of a step / those of checkpointing", *lines, *axis, below])


def _scaled(values: list[float], last: int) -> list[int]:
    """To whole numbers from 0 to ``last``."""
    low, span = min(values), max(values) - min(values)
    return [round((value - low) / span * last) if span else 0 for value in values]


def saved(table: list[Cost], title: str, path: Path) -> None:
    """The same as a picture, with the quartiles of the seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", title=title)
    axes.set(xlabel="peak MiB of a step", ylabel="seconds of a step / those of checkpointing")
    for cost in table:
        q = cost.ratio
        spread = [[q.median - q.low], [q.high - q.median]]
        axes.errorbar(cost.peak / MIB, q.median, yerr=spread, marker="o", linestyle="", label=cost.name)
    ticks = sorted(cost.peak / MIB for cost in (min(table, key=_peak), table[1], max(table, key=_peak)))
    axes.set_xticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _peak(cost: Cost) -> int:
    return cost.peak
