"""The planner: pick, unit by unit, stored, checkpointed or reversible, so that a step fits a memory budget in the least
time.

Note [Ways to cut]
    A step is measured with units whole, then with all in 2, 4, ... chunks, until some mix fits. What a unit's own
    stretches take does not depend on how the others are cut, so each unit then goes the coarsest way with which it fits
    by itself: chunks cost time, and where a unit's peak is that of its weights' gradients, they cost memory too.

Note [The search]
    Units are decided in the order of the forward pass. What those before a stretch keep is one number (see Note [Bytes
    by prefix] in `costs`), so partial choices that keep about as many bytes, and leave the open chains in the same
    forms, compare by their seconds alone: the best of each such class goes on. The classes are 1/`_CLASSES` of the
    budget wide; bytes themselves are never rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from revwire._budget.advice import _blocks, _idle, _rival, _rounded_up
from revwire._budget.costs import Costs
from revwire._budget.forms import MODES, Form
from revwire._budget.meter import Unsteady, measured
from revwire._budget.mixes import Picks, _by_place, _coarsest, _found, _least, _Mix
from revwire._budget.search import search
from revwire._budget.ways import Cutting
from revwire._errors import BudgetError, ReconstructionError
from revwire._plan.options import Budget, parse_budget
from revwire._plan.plan import Forecast, Plan, PlannedChain, Point
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Mode


def fit(
    plan: Plan,
    chains: Sequence[Chain],
    step: Callable[[], None],
    device: torch.device,
    budget: Budget,
    cuttings: Iterable[Cutting] = (Cutting(lambda: None),),
    mix: Callable[[Picks], None] = lambda _: None,
) -> Plan:
    """Measure a step, give each unit of ``chains`` its mode, and return the plan with the modes and the forecast.

    Each unit has the coarsest chunks with which some mix fits. Without a budget, finer ones are tried while they lower
    the least peak by 2 %.

    Args:
        plan, chains: of a converted model.
        step: forward and backward on the example.
        device: where it runs.
        budget: bytes of a step above rest, or "least".
        cuttings: ways to run the model, the coarsest first.
        mix: lets each unit go one of those to cut units that were tried.

    Raises:
        BudgetError: no mix fits; names the smallest budget that one does.
    """
    size = parse_budget(budget)
    best: int | None = None
    ways: list[Costs] = []  # to cut units, the coarsest first
    checkpoint: Point | None = None
    stored: Point | None = None  # of the first way, in which nothing is given up for memory
    found: _Mix | None = None
    for cut in cuttings:
        cut.apply()
        costs = _costs(plan, chains, step, device)
        if ways and costs.measured.places != ways[0].measured.places:
            raise _unsteady(plan)
        tried = [*(ways if cut.undo is None else ways[:-1]), costs]
        blocks = _blocks(plan, costs) if best is None else None
        checkpoint = Point(*costs.checkpointed(blocks)) if blocks else checkpoint
        stored = stored or Point(*costs.forecast(costs.uniform("stored")))
        found = (
            None if size is None else _found(tried, [_coarsest(tried, size), [len(tried) - 1] * len(costs.units)], size)
        )
        smallest = size if found and size else _least(tried)[0]
        if size is not None and smallest <= size:
            best, ways = smallest, tried
            break
        if best is not None and smallest > 0.98 * best:
            if cut.undo is None:
                break
            cut.undo()
            continue
        best, ways = smallest, tried
    assert best is not None
    assert stored is not None
    if size is not None and best > size:
        raise _too_small(plan, budget, size, best, checkpoint)
    found = found or _found(ways, _least(ways)[1], best if size is None else size)
    assert found is not None
    mix(_by_place(ways, found.ways))
    found = _with_selective(found, chains, step, device, size)
    return _applied(plan, chains, found.costs, found.forms, size, stored, checkpoint)


def _costs(plan: Plan, chains: Sequence[Chain], step: Callable[[], None], device: torch.device) -> Costs:
    """Measure a step of the model as it is cut now."""
    kept = [[u.kept_bytes if i else 0 for i, u in enumerate(c.units)] for c in plan.chains]
    try:
        found = measured(chains, step, device)
    except Unsteady:
        raise _unsteady(plan) from None
    return Costs(found, kept, [c.stream_bytes // 2 for c in plan.chains], [c.exact for c in plan.chains])


def _with_selective(
    found: _Mix, chains: Sequence[Chain], step: Callable[[], None], device: torch.device, size: int | None
) -> _Mix:
    """The same ways to cut, with the best forms where some units may be selective: measured where a budget leaves
    something to buy.
    """
    if size is None or all(
        unit.fixed or MODES[form] == "stored" for unit, form in zip(found.costs.units, found.forms, strict=True)
    ):
        return found
    runs = found.costs.samples(size)
    if not runs:
        return found
    modes: list[list[Mode]] = [["reversible"] * chain.length for chain in chains]
    for run in runs:
        modes[found.costs.units[run].chain][found.costs.units[run].unit] = "selective"
    try:
        there = measured(chains, step, device, modes=[tuple(mine) for mine in modes])
    except (Unsteady, ReconstructionError):  # what cannot be measured so is not among the choices
        return found
    if there.places != found.costs.measured.places:
        return found
    costs = found.costs.with_selective(runs, there)
    forms = search(costs, size)
    return found if forms is None else _Mix(found.ways, costs, forms)


def _unsteady(plan: Plan) -> BudgetError:
    """The error that says that steps cannot be compared."""
    return BudgetError(
        f"{plan.model}: got steps that are not alike, though each drew the same random numbers: units run in one, "
        "and not in another; "
        "expected the same ones in each; pass no memory_budget, or switch off what leaves layers out (layer drop) "
        "while you convert"
    )


def _too_small(plan: Plan, budget: Budget, size: int, smallest: int, checkpoint: Point | None) -> BudgetError:
    """The error that says that no mix fits."""
    rival = "".join(f"; {line}" for line in _rival(None, Point(smallest, 0.0), checkpoint))
    return BudgetError(
        f"{plan.model}: got a memory budget of {size} bytes for a step above rest ({budget!r}); expected at least "
        f"{smallest} "
        f"({_rounded_up(smallest)}), which the best mix of stored, checkpointed and reversible units needs on this "
        "example; pass "
        f"memory_budget={smallest} or more, a smaller batch, or a coupling that keeps fewer bits ('re2tal' keeps "
        f"none){rival}",
        smallest,
    )


def serves_better(a: Forecast, b: Forecast) -> bool:
    """Whether ``a`` is clearly the better plan for the same budget: faster; or, where the least memory was asked for,
    smaller.
    """
    if a.budget is not None:
        return a.seconds < 0.98 * b.seconds
    return a.peak_bytes < 0.98 * b.peak_bytes or (a.peak_bytes <= b.peak_bytes and a.seconds < 0.98 * b.seconds)


def _applied(
    plan: Plan,
    chains: Sequence[Chain],
    costs: Costs,
    forms: Sequence[Form],
    size: int | None,
    stored: Point,
    checkpoint: Point | None,
) -> Plan:
    modes: list[list[Mode]] = [["reversible"] * chain.length for chain in chains]
    for unit, form in zip(costs.units, forms, strict=True):
        modes[unit.chain][unit.unit] = MODES[form]
    for chain, mine in zip(chains, modes, strict=True):
        chain.modes, chain.keeps_last = tuple(mine), False
    planned = tuple(_with_modes(c, mine) for c, mine in zip(plan.chains, modes, strict=True))
    reversible = Point(*costs.forecast(costs.uniform("reversible")))
    point = Point(*costs.forecast(forms))
    advice = (*_idle(plan, costs), *_rival(size, point, checkpoint))
    forecast = Forecast(size, point, stored, reversible, advice, checkpoint)
    return replace(plan, chains=planned, forecast=forecast)


def _with_modes(planned: PlannedChain, modes: Sequence[Mode]) -> PlannedChain:
    return replace(planned, units=tuple(replace(u, mode=mode) for u, mode in zip(planned.units, modes, strict=True)))
