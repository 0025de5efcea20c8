"""Figures that were measured with several seeds: of which runs they are, and how they stand in a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from benchmarks.harness.record import Row


@dataclass(frozen=True)
class Seeds:
    """One figure, measured with several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; 0 for one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def minus(self, other: Seeds) -> tuple[float, float]:
        """(difference of the means, its standard error)."""
        error = sqrt(sum(s.deviation**2 / len(s.values) for s in (self, other)))
        return self.mean - other.mean, error


def seeds(rows: Iterable[Row], key: str, **chosen: object) -> Seeds | None:
    """The figure ``key`` of the rows in which these columns have these values; None where nothing was measured."""
    found = tuple(row[key] for row in rows if row[key] is not None and all(row[k] == v for k, v in chosen.items()))
    return Seeds(found) if found else None


def deployments(wiring: str) -> list[tuple[str, str]]:
    """(how a network is deployed after fine-tuning, prefix of the columns with its figures) of a wiring."""
    return [("original", "")] if wiring in ("stored", "scratch") else [("rewired", ""), ("reverted", "reverted_")]


def percent(figure: Seeds | None) -> str:
    """A share, and its deviation over the seeds."""
    if figure is None:
        return "–"
    return (
        f"{figure.mean:.1%}" if len(figure.values) == 1 else f"{100 * figure.mean:.1f} ± {100 * figure.deviation:.1f}%"
    )


def nats(figure: Seeds | None) -> str:
    """A loss, and its deviation over the seeds."""
    if figure is None:
        return "–"
    return f"{figure.mean:.4f}" if len(figure.values) == 1 else f"{figure.mean:.4f} ± {figure.deviation:.4f}"
