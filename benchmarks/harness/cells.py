"""How figures stand in the cells of a table."""

from __future__ import annotations

from benchmarks.harness.record import Row

Table = list[list[str]]
"""The head, and the rows below it."""

MIB = 2**20


def mib(count: int | None, digits: int = 1) -> str:
    """A number of bytes in MiB; a dash where there is none."""
    return "–" if count is None else f"{count / MIB:.{digits}f}"


def quartiles(found: Row, digits: int) -> str:
    """The median, and the lower and the upper quartile."""
    low, median, high = (f"{found[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}–{high})"
