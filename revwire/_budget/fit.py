"""The planner: pick, unit by unit, stored, checkpointed or reversible, so that a step fits a memory budget in the least
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from revwire._budget.advice import idle, reserved
from revwire._budget.by_kind import costs_of, survey
from revwire._budget.costs import Costs
from revwire._budget.forms import Form
from revwire._budget.measured import Measured
from revwire._budget.meter import Modes, Unsteady, measured
from revwire._budget.mixes import Mix, by_place, coarsest, fitting, least_of
from revwire._budget.outlook import may_help, too_large_whole
from revwire._budget.progress import Progress
from revwire._budget.rival import blocks_of, checkpointing, rival
from revwire._budget.search import search
from revwire._budget.unit_cost import ChainSizes
from revwire._budget.ways import COUNTS, Ways
from revwire._errors import BudgetError, ReconstructionError
from revwire._plan.options import Budget, parse_budget
from revwire._plan.plan import Forecast, Plan, PlannedChain, Point
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Mode
from revwire._splitting.kinds import Kinds
from revwire.measure.sizes import spelled

MOST_STEPS = 8
"""A plan measures no more steps. Beside them, the model runs forward a few times."""


@dataclass(frozen=True)
class Trial:
    """A converted model whose steps are measured.

    Attributes:
        plan, chains: of the model.
        step: forward and backward on the example.
        make_once: a forward, in which is made what a first step makes, such as programs of units that are cut.
        device: where it runs.
        progress: counts steps.
        weights: bytes of the largest weight that is trained, of each unit of each chain.
    """

    plan: Plan
    chains: Sequence[Chain]
    step: Callable[[], None]
    make_once: Callable[[], None]
    device: torch.device
    progress: Progress
    weights: Sequence[Sequence[int]]

    def costs(self, *, fresh: bool) -> Costs:
        """Measure a step of the model as it is cut now.

        Raises:
            BudgetError: steps are not alike.
        """
        try:
            found = self.measured(fresh=fresh)
        except Unsteady:
            raise self.unsteady() from None
        return Costs(found, [*map(_sizes, self.plan.chains, self.weights)])

    def measured(self, modes: Sequence[Modes] | None = None, *, fresh: bool) -> Measured:
        """One step with every unit reversible, or in these modes."""

        def step() -> None:
            self.progress.advance()
            self.step()

        return measured(self.chains, step, self.device, modes=modes, fresh=fresh)

    def unsteady(self) -> BudgetError:
        """The error that says that steps cannot be compared."""
        return BudgetError(
            f"{self.plan.model}: got steps that are not alike, though each drew the same random numbers: units run in "
            "one, and not in another; expected the same ones in each; pass no memory_budget, or switch off what leaves "
            "layers out (layer drop) while you convert"
        )


def _sizes(planned: PlannedChain, weights: Sequence[int]) -> ChainSizes:
    kept = tuple(u.kept_bytes if i else 0 for i, u in enumerate(planned.units))
    return ChainSizes(kept, planned.stream_bytes // 2, planned.exact, tuple(weights))


def fit(trial: Trial, budget: Budget, ways: Ways) -> Plan:
    """Measure steps, give each unit its mode and its chunks, and return the plan with the modes and the forecast.

    Each unit has the coarsest chunks with which some mix fits. Without a budget, finer ones are tried while they lower
    the least peak by 2 %.

    Args:
        trial: the model; its chains are given their modes.
        budget: bytes of a step above rest, or "least".
        ways: to run the model, the coarsest first.

    Raises:
        BudgetError: no mix fits; names the smallest budget that one does.
    """
    size = parse_budget(budget)
    tried = _tried(trial, ways, size)
    blocks = blocks_of(trial.plan, tried.first)
    checkpoint = checkpointing(tried.first, blocks) if blocks else None
    if size is not None and tried.smallest > size:
        raise _too_small(trial.plan, budget, size, tried.smallest, checkpoint)
    mix = tried.mix or fitting(tried.by_way, least_of(tried.by_way)[1], tried.smallest if size is None else size)
    assert mix is not None
    ways.pick(by_place(tried.by_way, mix.ways))
    mix = _with_selective(trial, mix, size)
    modes = _apply(trial.chains, mix)
    planned = tuple(_with_modes(c, mine) for c, mine in zip(trial.plan.chains, modes, strict=True))
    forecast = _forecast(trial.plan, tried.first, mix, size, checkpoint, trial.device)
    peaks = trial.plan.peaks and replace(trial.plan.peaks, planned=forecast.peak_bytes)
    return replace(trial.plan, chains=planned, forecast=forecast, peaks=peaks)


@dataclass(frozen=True)
class _Tried:
    """The ways that were tried so far.

    Attributes:
        first: costs of the first way, in which nothing is given up for memory.
        by_way: costs of the ways to cut units, the coarsest first.
        smallest: bytes of a budget that some mix of them fits: the one asked for, or the smallest.
        mix: one that fits the budget that was asked for.
    """

    first: Costs
    by_way: Sequence[Costs]
    smallest: int
    mix: Mix | None

    @classmethod
    def of(cls, first: Costs, by_way: Sequence[Costs], size: int | None) -> _Tried:
        if size is None:
            return cls(first, by_way, least_of(by_way)[0], None)
        finest = [len(by_way) - 1] * len(first.units)
        mix = fitting(by_way, [coarsest(by_way, size), finest], size)
        return cls(first, by_way, size if mix else least_of(by_way)[0], mix)

    def may_get_better(self, count: int, size: int | None) -> bool:
        """Whether units in so many chunks may let a mix fit, or (without a budget) need clearly less."""
        if size is None and count not in COUNTS[1:]:
            return False  # the finer ones tell nearly all
        return may_help(self.by_way[0], count, size, self.smallest)

    def kinds_to_cut(self, kinds: Kinds, size: int | None) -> frozenset[int]:
        """The kinds of units of which some do not fit whole."""
        units = [self.by_way[0].units[run] for run in too_large_whole(self.by_way[0], COUNTS[-1], size)]
        return frozenset(kinds[unit.chain][unit.unit] for unit in units)


def _tried(trial: Trial, ways: Ways, size: int | None) -> _Tried:
    """Measure one way after another, until some mix fits, or the next is no better; then finer cuts, if need be."""
    best: _Tried | None = None
    for way in ways:
        way.apply()
        costs = trial.costs(fresh=best is None)
        if best is not None and costs.measured.places != best.first.measured.places:
            raise trial.unsteady()
        new = _Tried.of(costs if best is None else best.first, [costs], size)
        if size is not None and new.smallest <= size:
            return new
        if best is None or new.smallest <= 0.98 * best.smallest:
            best = new
        elif way.undo is not None:
            way.undo()
    assert best is not None
    finer = ways.finer(partial(best.may_get_better, size=size), partial(best.kinds_to_cut, size=size))
    return _in_finer_cuts(trial, ways, best, finer, size) if finer else best


def _in_finer_cuts(trial: Trial, ways: Ways, best: _Tried, finer: Sequence[int], size: int | None) -> _Tried:
    """Measure what finer cuts cost; see Note [One of each kind] in `by_kind`."""
    base = best.by_way[0]
    found = survey(base.measured.places, ways.kinds, finer, ways.cut_of, trial.progress.left)
    steps: list[Costs] = []
    for picks in found.steps:
        ways.pick(picks)
        trial.make_once()
        steps.append(trial.costs(fresh=False))
        if steps[-1].measured.places != base.measured.places:
            raise trial.unsteady()
    finest = [costs_of(base, steps, found, ways.kinds, way, ways.cut_of) for way in found.ways]
    ways.keep([0, *found.ways])
    return _Tried.of(best.first, [base, *finest], size)


def _with_selective(trial: Trial, mix: Mix, size: int | None) -> Mix:
    """The same ways to cut, with the best forms where some units may be selective: measured where a budget leaves
    something to buy.
    """
    units = mix.costs.units
    if size is None or all(unit.fixed or form.stored for unit, form in zip(units, mix.forms, strict=True)):
        return mix
    runs = mix.costs.samples(size)
    if not runs or trial.progress.left < 1:
        return mix
    modes = _reversible(trial.chains)
    for run in runs:
        modes[units[run].chain][units[run].unit] = "selective"
    try:
        there = trial.measured([tuple(mine) for mine in modes], fresh=False)
    except (Unsteady, ReconstructionError):  # what cannot be measured so is not among the choices
        return mix
    if there.places != mix.costs.measured.places:
        return mix
    costs = mix.costs.with_selective(runs, there)
    forms = search(costs, size)
    return mix if forms is None else Mix(mix.ways, costs, forms)


def _reversible(chains: Sequence[Chain]) -> list[list[Mode]]:
    return [["reversible"] * chain.length for chain in chains]


def _apply(chains: Sequence[Chain], mix: Mix) -> list[list[Mode]]:
    """Give each unit the mode of its form."""
    modes = _reversible(chains)
    for unit, form in zip(mix.costs.units, mix.forms, strict=True):
        modes[unit.chain][unit.unit] = form.mode
    for chain, mine in zip(chains, modes, strict=True):
        chain.modes, chain.keeps_last = tuple(mine), False
    return modes


def _with_modes(planned: PlannedChain, modes: Sequence[Mode]) -> PlannedChain:
    return replace(planned, units=tuple(replace(u, mode=mode) for u, mode in zip(planned.units, modes, strict=True)))


def _forecast(
    plan: Plan, first: Costs, mix: Mix, size: int | None, checkpoint: Point | None, device: torch.device
) -> Forecast:
    def point(costs: Costs, forms: Sequence[Form]) -> Point:
        return Point(*costs.forecast(forms))

    planned = point(mix.costs, mix.forms)
    return Forecast(
        budget=size,
        planned=planned,
        stored=point(first, first.uniform("stored")),
        reversible=point(mix.costs, mix.costs.uniform("reversible")),
        advice=(*idle(plan, mix.costs), *rival(size, planned, checkpoint), *reserved(device)),
        checkpoint=checkpoint,
    )


def _too_small(plan: Plan, budget: Budget, size: int, smallest: int, checkpoint: Point | None) -> BudgetError:
    """The error that says that no mix fits."""
    other = "".join(f"; {line}" for line in rival(None, Point(smallest, 0.0), checkpoint))
    return BudgetError(
        f"{plan.model}: got a memory budget of {size} bytes for a step above rest ({budget!r}); expected at least "
        f"{smallest} ({spelled(smallest, up=True)}), which the best mix of stored, checkpointed and reversible units "
        f"needs on this example; pass memory_budget={smallest} or more, a smaller batch, or a coupling that keeps "
        f"fewer bits ('re2tal' keeps none){other}",
        smallest,
    )
