"""Mixes: a way for each run of a unit, and a form.

Note [A way for each run]
    A step is measured with units whole, then with all in 2, 4, ... chunks, until some mix fits. What a unit's own
    stretches take does not depend on how the others are cut, so each unit then goes the coarsest way with which it fits
    by itself: chunks cost time, and where a unit's peak is that of its weights' gradients, they cost memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from revwire._budget.costs import Costs
from revwire._budget.forms import Form
from revwire._budget.search import least, search

Picks = dict[tuple[int, int], int]
"""Which of the ways to cut units that were tried each unit goes, in their order; by chain, and place in it."""


class Mix(NamedTuple):
    """The way that each run goes, what a step costs then, and the forms of the runs."""

    ways: Sequence[int]
    costs: Costs
    forms: list[Form]


def least_of(by_way: Sequence[Costs]) -> tuple[int, list[list[int]]]:
    """(the smallest budget that some mix fits, choices of a way for each run among which is one that fits it)."""
    lowest = _lowest(by_way)
    first = least(_composed(by_way, lowest))
    coarse = coarsest(by_way, first)  # which may keep less
    return min(first, least(_composed(by_way, coarse))), [coarse, lowest]


def fitting(by_way: Sequence[Costs], choices: Sequence[Sequence[int]], size: int) -> Mix | None:
    """The first of several choices of a way for each run that has forms that fit, with the best of them; see Note [A
    way for each run].
    """
    for choice in choices:
        costs = _composed(by_way, choice)
        forms = search(costs, size)
        if forms is not None:
            return Mix(choice, costs, forms)
    return None


def coarsest(by_way: Sequence[Costs], size: int) -> list[int]:
    """For each run, the coarsest way with which its unit fits by itself; the finest, where none does."""
    return _picked(by_way, lambda peaks: next((way for way, peak in enumerate(peaks) if peak <= size), len(peaks) - 1))


def by_place(by_way: Sequence[Costs], choice: Sequence[int]) -> Picks:
    """A choice of a way for each run, by the units."""
    return {(u.chain, u.unit): way for u, way in zip(by_way[0].units, choice, strict=True)}


def _composed(by_way: Sequence[Costs], choice: Sequence[int]) -> Costs:
    return Costs.composed([by_way[way] for way in choice]) if choice else by_way[0]


def _lowest(by_way: Sequence[Costs]) -> list[int]:
    """For each run, the coarsest way with which its unit needs (within 2 %) least."""
    return _picked(by_way, lambda peaks: next(way for way, peak in enumerate(peaks) if peak <= 1.02 * min(peaks)))


def _picked(by_way: Sequence[Costs], pick: Callable[[Sequence[int]], int]) -> list[int]:
    """A way for each run, by the peaks of its own stretches when it is reversible, after the runs before it went their
    ways.

    A unit that runs several times goes the finest of them each time.
    """
    units, starts = by_way[0].units, [costs.starts for costs in by_way]
    picks: Picks = {}
    for _ in range(2):  # what a later run of a unit asks for counts in its earlier ones
        at = starts[0][0]
        for run, unit in enumerate(units):
            own = [costs.own(run, Form.REVERSIBLE) for costs in by_way]
            peaks = [peak + at - start[run] for peak, start in zip(own, starts, strict=True)]
            way = picks[unit.chain, unit.unit] = max(pick(peaks), picks.get((unit.chain, unit.unit), 0))
            at += starts[way][run + 1] - starts[way][run]
    return [picks[unit.chain, unit.unit] for unit in units]
