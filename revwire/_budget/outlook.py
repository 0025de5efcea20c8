"""What no mix can beat: on paper, before a step is measured; and in chunks, by a step in which units ran whole."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from revwire._budget.costs import Costs
from revwire._budget.forms import Form
from revwire._budget.levels import Levels
from revwire._budget.search import fits, least
from revwire._budget.unit_cost import UnitCost
from revwire._errors import BudgetError
from revwire._plan.hints import Hints
from revwire._plan.options import Budget, parse_budget
from revwire._plan.plan import Plan
from revwire.measure.sizes import spelled

_PAYS = 0.98
"""Chunks are worth a try where they may lower the least peak to this part of it."""


_HOPELESS = 0.75
"""Below this part of what nothing beats on paper, a budget is refused unmeasured: paper may be wrong by a little."""


def may_help(costs: Costs, finer: float, size: int | None, smallest: int) -> bool:
    """Whether chunks so many times finer than in the step of these ``costs`` may let a mix fit a budget, or (where
    there is none) need clearly less than the smallest that was found.
    """
    return fits(_in_chunks(costs, finer), int(_PAYS * smallest) if size is None else size)


def too_large_whole(costs: Costs, finest: float, size: int | None) -> list[int]:
    """The runs of units that may have to be cut: those that do not fit whole within a budget, or (where there is none)
    within what nothing beats in chunks so many times finer.
    """
    enough = _PAYS * (least(_in_chunks(costs, finest)) if size is None else size)
    return [run for run in range(len(costs.units)) if costs.own(run, Form.REVERSIBLE) > enough]


def refuse_hopeless(plan: Plan, budget: Budget, hints: Hints) -> None:
    """Raise where a budget is far below what any mix can need, by the layout on paper.

    Raises:
        BudgetError: names what is enough on paper.
    """
    size = None if budget is None else parse_budget(budget)
    if size is None or size >= _HOPELESS * hints.lowest:
        return
    enough = max(hints.reversible, hints.lowest)
    raise BudgetError(
        f"{plan.model}: got a memory budget of {size} bytes for a step above rest ({budget!r}), and by its layout on "
        f"paper no step on this example needs less than about {spelled(hints.lowest)}; expected at least {enough} "
        f"({spelled(enough, up=True)}), which reversible chains need on paper; pass memory_budget={enough} or more, "
        "'least' (which finds the smallest), or a smaller batch",
        enough,
    )


def _in_chunks(costs: Costs, finer: float) -> Costs:
    """No chunks can do better: of what was there in a unit's own stretches, beside what lay around them, each holds its
    share. The gradients of weights do not shrink, and what lies outside of units stays.
    """
    out = copy(costs)
    out.levels = [_shrunk(at, unit.weight, finer) for at, unit in zip(costs.levels, costs.units, strict=True)]
    out.units = [_cut(unit, finer) for unit in costs.units]
    return out


def _shrunk(at: Levels, weight: int, finer: float) -> Levels:
    asked = at.start if at.asked is None else at.asked

    def share(peak: int, there: int) -> int:
        return min(peak, there + int(max(0, peak - there) / finer))

    return replace(
        at,
        forward=max(share(at.forward, at.start), at.start + at.grown),
        stepped=share(at.stepped, at.start),
        rebuild=share(at.rebuild, asked),
        complete=share(at.complete, asked),
        backward=min(at.backward, max(share(at.backward, asked), asked + weight)),
        undone=share(at.undone, asked),
        again=int(at.again / finer),
    )


def _cut(unit: UnitCost, finer: float) -> UnitCost:
    return replace(unit, run=replace(unit.run, held=int(unit.run.held / finer)))
