"""What units may come to in chunks, at best, by a step in which they ran in fewer."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from revwire._budget.costs import Costs
from revwire._budget.levels import Levels
from revwire._budget.search import least, search
from revwire._budget.unit_cost import UnitCost

_PAYS = 0.98
"""Chunks are worth a try where they may lower the least peak to this part of it."""


def may_help(costs: Costs, finer: float, size: int | None, smallest: int) -> bool:
    """Whether chunks so many times finer than in the step of these ``costs`` may let a mix fit a budget, or (where
    there is none) need clearly less than the smallest that was found.
    """
    hoped = _in_chunks(costs, finer)
    return least(hoped) <= _PAYS * smallest if size is None else search(hoped, size) is not None


def _in_chunks(costs: Costs, finer: float) -> Costs:
    """No chunks can do better: of what was there in a unit's own stretches, beside what lay around them, each holds its
    share. (The gradients of weights do not shrink.) What lies outside of units stays.
    """
    out = copy(costs)
    out.levels = [_shrunk(at, finer) for at in costs.levels]
    out.units = [_cut(unit, finer) for unit in costs.units]
    return out


def _shrunk(at: Levels, finer: float) -> Levels:
    asked = at.start if at.asked is None else at.asked

    def share(peak: int, there: int) -> int:
        return min(peak, there + int(max(0, peak - there) / finer))

    return replace(
        at,
        forward=max(share(at.forward, at.start), at.start + at.grown),
        stepped=share(at.stepped, at.start),
        rebuild=share(at.rebuild, asked),
        complete=share(at.complete, asked),
        backward=share(at.backward, asked),
        undone=share(at.undone, asked),
        again=int(at.again / finer),
    )


def _cut(unit: UnitCost, finer: float) -> UnitCost:
    return replace(unit, run=replace(unit.run, held=int(unit.run.held / finer)))
