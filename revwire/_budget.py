"""The planner: pick, unit by unit, stored, checkpointed or reversible, so that a step fits a memory budget in the least time.

Note [Ways to cut]
    A step is measured with units whole, then with all in 2, 4, ... chunks, until some mix fits. What a unit's own stretches take does not
    depend on how the others are cut, so each unit then goes the coarsest way with which it fits by itself: chunks cost time, and where
    a unit's peak is that of its weights' gradients, they cost memory too.

Note [The search]
    Units are decided in the order of the forward pass. What those before a stretch keep is one number (see Note [Bytes by prefix]
    in `_costs`), so partial choices that keep about as many bytes, and leave the open chains in the same forms, compare by their seconds
    alone: the best of each such class goes on. The classes are 1/`_CLASSES` of the budget wide; bytes themselves are never rounded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from revwire._costs import MODES, Costs, Form
from revwire._errors import BudgetError, ReconstructionError
from revwire._meter import Unsteady, measured
from revwire._module import Chain, Mode
from revwire._plan import Forecast, Plan, PlannedChain, Point

Budget = int | str | None


Picks = dict[tuple[int, int], int]
"""Which of the cuttings that were tried each unit goes, in their order; by chain, and place in it."""


class Cutting(NamedTuple):
    """One of several ways to run a model, such as its units in so many chunks.

    Attributes:
        apply: lets the model run so, on top of the ways that were kept before.
        undo: lets it run as before. Where there is none, it is a way to cut units; the next such is a finer one, and replaces it.
    """

    apply: Callable[[], None]
    undo: Callable[[], None] | None = None


LEAST = "least"

_CLASSES = 256
_UNITS_OF_A_BLOCK = 8
_MOST = 3000  # partial choices that go on; only chains that run side by side make so many
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_budget(budget: Budget) -> int | None:
    """A budget in bytes; None for ``"least"``.

    Raises:
        BudgetError: it is no number of bytes.
    """
    if budget == LEAST:
        return None
    size = budget if type(budget) is int else _parsed(budget) if isinstance(budget, str) else 0
    if size <= 0:
        raise BudgetError(f"memory_budget: got {budget!r}; expected a positive number of bytes, '6GiB', '512MB' or the like, or 'least'")
    return size


def _parsed(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*)\s*(\w*)", text.strip())
    return int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0


class _Choice(NamedTuple):
    """A choice of forms for the first units.

    Attributes:
        kept: bytes beyond those of their reversible forms.
        early: those of them that are there in any form until the forward pass ends.
        gain: seconds.
    """

    kept: int
    early: int
    gain: float
    forms: _Linked


_Linked = Any  # None, or (the newest form, those before it in the same way)
_Open = tuple[tuple[int, Form], ...]


def search(costs: Costs, budget: int) -> list[Form] | None:
    """The fastest forms whose predicted peak is at most ``budget``; None if there are none."""
    width = max(1, budget // _CLASSES)
    states: dict[_Open, list[_Choice]] = {(): [_Choice(0, 0, 0.0, None)]}
    if max(costs.waiting[0]) > budget:
        return None
    for run, unit in enumerate(costs.units):
        own = {form: costs.peaks(run, form) for form in MODES if form != "p" or unit.selective}
        best: dict[tuple[_Open, int], _Choice] = {}
        for open_, choices in states.items():
            others = tuple((c, f) for c, f in open_ if c != unit.chain)
            before = dict(open_).get(unit.chain) if unit.unit else None
            for form in unit.forms(before):
                extra, there, gain = unit.extra(form, before), unit.before_turn(form), unit.seconds(form)
                then: _Open = others if unit.ends else tuple(sorted((*others, (unit.chain, form))))
                for choice in choices:
                    kept, early = choice.kept + extra, choice.early + there
                    if own[form].over(choice.kept, choice.early) > budget or costs.waiting[run + 1].over(kept, early) > budget:
                        continue
                    new = _Choice(kept, early, choice.gain + gain, (form, choice.forms))
                    for key in ((then, kept // width), (then, -(10**12))):  # the second: that which keeps least
                        old = best.get(key)
                        if old is None or _better(new, old, least=key[1] == -(10**12)):
                            best[key] = new
        states = _grouped(best)
        if not states:
            return None
    last = max((c for choices in states.values() for c in choices), key=lambda c: c.gain)
    return _unrolled(last.forms)


def _better(new: _Choice, old: _Choice, *, least: bool) -> bool:
    if least:
        return (new.kept, -new.gain) < (old.kept, -old.gain)
    return (-new.gain, new.kept) < (-old.gain, old.kept)


def _grouped(best: dict[tuple[_Open, int], _Choice]) -> dict[_Open, list[_Choice]]:
    out: dict[_Open, list[_Choice]] = {}
    items = list(best.items())
    if len(items) > _MOST:
        items = sorted(items, key=lambda item: (item[0][1] >= 0, -item[1].gain))[:_MOST]
    for (open_, _), choice in items:
        out.setdefault(open_, []).append(choice)
    return out


def _unrolled(forms: _Linked) -> list[Form]:
    out: list[Form] = []
    while forms is not None:
        form, forms = forms
        out.append(form)
    return out[::-1]


def least(costs: Costs) -> int:
    """The smallest budget, within a thousandth, that some forms fit."""
    high = min(costs.forecast(costs.uniform(mode))[0] for mode in ("reversible", "stored"))
    low = 0
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        forms = search(costs, middle)
        if forms is None:
            low = middle
        else:
            high = min(middle, costs.forecast(forms)[0])
    return high


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

    Each unit has the coarsest chunks with which some mix fits. Without a budget, finer ones are tried while they lower the least
    peak by 2 %.

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
        found = None if size is None else _found(tried, [_coarsest(tried, size), [len(tried) - 1] * len(costs.units)], size)
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


def _with_selective(found: _Mix, chains: Sequence[Chain], step: Callable[[], None], device: torch.device, size: int | None) -> _Mix:
    """The same ways to cut, with the best forms where some units may be selective: measured where a budget leaves something to buy."""
    if size is None or all(unit.fixed or MODES[form] == "stored" for unit, form in zip(found.costs.units, found.forms, strict=True)):
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
        f"{plan.model}: got steps that are not alike, though each drew the same random numbers: units run in one, and not in another; "
        "expected the same ones in each; pass no memory_budget, or switch off what leaves layers out (layer drop) while you convert"
    )


def _too_small(plan: Plan, budget: Budget, size: int, smallest: int, checkpoint: Point | None) -> BudgetError:
    """The error that says that no mix fits."""
    rival = "".join(f"; {line}" for line in _rival(None, Point(smallest, 0.0), checkpoint))
    return BudgetError(
        f"{plan.model}: got a memory budget of {size} bytes for a step above rest ({budget!r}); expected at least {smallest} "
        f"({_rounded_up(smallest)}), which the best mix of stored, checkpointed and reversible units needs on this example; pass "
        f"memory_budget={smallest} or more, a smaller batch, or a coupling that keeps fewer bits ('re2tal' keeps none){rival}",
        smallest,
    )


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
    """The first of several choices of a way for each run that has forms that fit, with the best of them; see Note [Ways to cut]."""
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
    """A way for each run, by the peaks of its own stretches when it is reversible, after the runs before it went their ways.

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


def serves_better(a: Forecast, b: Forecast) -> bool:
    """Whether ``a`` is clearly the better plan for the same budget: faster; or, where the least memory was asked for, smaller."""
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


def _blocks(plan: Plan, costs: Costs) -> list[int] | None:
    """The block of each run: a host's units that run one after the other. None where a host holds too many to be a block."""
    units = [plan.chains[u.chain].units[u.unit] for u in costs.units]
    if max(Counter(u.host for u in plan.units).values()) > _UNITS_OF_A_BLOCK:
        return None
    numbers: list[int] = []
    here: set[str] = set()  # the units of the block so far
    for i, (run, unit) in enumerate(zip(costs.units, units, strict=True)):
        goes_on = i > 0 and costs.units[i - 1].chain == run.chain and units[i - 1].host == unit.host and unit.path not in here
        here = {*here, unit.path} if goes_on else {unit.path}
        numbers.append((numbers[-1] if numbers else -1) + (0 if goes_on else 1))
    return numbers


def _rival(size: int | None, planned: Point, checkpoint: Point | None) -> tuple[str, ...]:
    """Where plain checkpointing is estimated to be clearly better than what was planned: smaller, or within a budget faster."""
    if checkpoint is None:
        return ()
    name = "torch.utils.checkpoint around the same blocks of the original network"
    if size is None and checkpoint.peak_bytes < 0.97 * planned.peak_bytes:
        return (
            f"{name} would need less, about {checkpoint.peak_bytes / 1e6:.1f} MB: where the peak is a wide stage of few blocks, the two "
            "states of its chain cost more than the few inputs that checkpointing keeps; consider that instead, or chunks",
        )
    if size is not None and checkpoint.peak_bytes <= size and checkpoint.seconds < 0.97 * planned.seconds:
        return (f"{name} would fit as well, in about {checkpoint.seconds / planned.seconds:.0%} of the time; consider that instead",)
    return ()


def _with_modes(planned: PlannedChain, modes: Sequence[Mode]) -> PlannedChain:
    return replace(planned, units=tuple(replace(u, mode=mode) for u, mode in zip(planned.units, modes, strict=True)))


def _idle(plan: Plan, costs: Costs) -> tuple[str, ...]:
    """Chains that may as well be stored: where all others are reversible, the peak stays within 2 % of the least."""
    forms = costs.uniform("reversible")
    peak, seconds = costs.forecast(forms)
    out = []
    for number, chain in enumerate(plan.chains):
        stored = [s if u.chain == number else r for u, r, s in zip(costs.units, forms, costs.uniform("stored"), strict=True)]
        if stored == forms:
            continue
        other, faster = costs.forecast(stored)
        if other <= peak * 1.02:
            out.append(
                f"{chain.name}: reversible gains nothing here: stored, the peak of a step is {other / 1e6:.1f} MB instead of "
                f"{peak / 1e6:.1f} MB, in {faster / seconds:.0%} of the time"
            )
    return tuple(out)


def _rounded_up(size: int) -> str:
    mebibyte = 2**20
    return f"{-(-size * 10 // mebibyte) / 10} MiB"
