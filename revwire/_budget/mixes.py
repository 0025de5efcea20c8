"""Mixes of modes along a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from revwire._budget.costs import Costs
from revwire._budget.forms import Form
from revwire._budget.search import least, search

Picks = dict[tuple[int, int], int]
"""Which of the cuttings that were tried each unit goes, in their order; by chain, and place in it."""


def _least(ways: Sequence[Costs]) -> tuple[int, list[list[int]]]:
    """(the smallest budget that some mix fits, choices of a way for each run among which is one that fits it)."""
    lowest = _lowest(ways)
    first = least(_mixed(ways, lowest))
    coarsest = _coarsest(ways, first)  # which may keep less
    return min(first, least(_mixed(ways, coarsest))), [coarsest, lowest]


class _Mix(NamedTuple):
    """The way that each run goes, what a step costs then, and the forms of the units."""

    ways: Sequence[int]
    costs: Costs
    forms: list[Form]


def _found(ways: Sequence[Costs], choices: Sequence[Sequence[int]], size: int) -> _Mix | None:
    """The first of several choices of a way for each run that has forms that fit, with the best of them; see Note [Ways
    to cut] in `fit`.
    """
    for choice in choices:
        costs = _mixed(ways, choice)
        forms = search(costs, size)
        if forms is not None:
            return _Mix(choice, costs, forms)
    return None


def _mixed(ways: Sequence[Costs], choice: Sequence[int]) -> Costs:
    return Costs.mixed([ways[way] for way in choice]) if choice else ways[0]


def _coarsest(ways: Sequence[Costs], size: int) -> list[int]:
    """For each run, the coarsest way with which its unit fits by itself; the finest, where none does."""
    return _picked(ways, lambda peaks: next((way for way, peak in enumerate(peaks) if peak <= size), len(peaks) - 1))


def _lowest(ways: Sequence[Costs]) -> list[int]:
    """For each run, the coarsest way with which its unit needs (within 2 %) least."""
    return _picked(ways, lambda peaks: next(way for way, peak in enumerate(peaks) if peak <= 1.02 * min(peaks)))


def _picked(ways: Sequence[Costs], pick: Callable[[Sequence[int]], int]) -> list[int]:
    """A way for each run, by the peaks of its own stretches when it is reversible, after the runs before it went their
    ways.

    A unit that runs several times goes the finest of them each time.
    """
    units, starts = ways[0].units, [costs.starts for costs in ways]
    picks: dict[tuple[int, int], int] = {}
    for _ in range(2):  # what a later run of a unit asks for counts in its earlier ones
        at = starts[0][0]
        for run, unit in enumerate(units):
            peaks = [costs.own(run, "r") + at - start[run] for costs, start in zip(ways, starts, strict=True)]
            way = picks[unit.chain, unit.unit] = max(pick(peaks), picks.get((unit.chain, unit.unit), 0))
            at += starts[way][run + 1] - starts[way][run]
    return [picks[unit.chain, unit.unit] for unit in units]


def _by_place(ways: Sequence[Costs], choice: Sequence[int]) -> Picks:
    return {(u.chain, u.unit): way for u, way in zip(ways[0].units, choice, strict=True)}
