"""What a step costs when some units are stored or checkpointed, from one measured step in which all are reversible."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from revwire._budget.forms import Form
from revwire._budget.levels import Levels, Peaks, Reading, Rebuilding
from revwire._budget.measured import Measured, Run
from revwire._budget.unit_cost import STORED_IS_FASTER, ChainSizes, Selective, UnitCost
from revwire._runtime.unit import Mode


class Costs:
    """Bytes and seconds of a step by the forms of its units.

    Args:
        measured: one step with every unit reversible.
        chains: what each chain keeps of its states.
    """

    def __init__(self, measured: Measured, chains: Sequence[ChainSizes]) -> None:
        self.measured, self.chains = measured, chains
        self.seconds = sum(s.seconds for s in measured.stretches)
        reading = Reading.of(measured)
        self.levels, self.waiting = reading.levels, reading.waiting
        self.spent, self.recomputing = reading.spent, reading.recomputing
        self.units = [self._unit(run, reading.rebuilding.get(i)) for i, run in enumerate(measured.runs)]

    def _unit(self, run: Run, rebuilding: Rebuilding | None) -> UnitCost:
        again, sizes = rebuilding or Rebuilding(), self.chains[run.place.chain]
        stops = sizes.exact and again.rest_once is not None
        run = replace(run, result=run.result if sizes.exact else 0, glances=run.glances if stops else 0)
        if stops:
            relief = (0.0 if run.result else run.arithmetic.keep) + again.rest
        else:
            relief = 0.0 if run.result else run.arithmetic.both
        return UnitCost(
            run,
            sizes,
            gain=again.seconds + run.arithmetic.keep,
            relief=relief,
            fixed=rebuilding is None or self.measured.places.count(run.place) > 1,
        )

    @classmethod
    def composed(cls, choices: Sequence[Costs]) -> Costs:
        """Those of a step in which each run goes as in one of several measured steps: ``choices`` has the costs of that
        step for each.

        What lies before a run, and waits for its backward, is that of the runs before it, whichever way those go.
        """
        out = copy(choices[0])
        out.waiting = [*out.waiting]
        starts = [choices[0].starts[0]]
        for run, costs in enumerate(choices):
            starts.append(starts[-1] + costs.starts[run + 1] - costs.starts[run])
        out.levels = [costs.levels[run].moved(starts[run] - costs.starts[run]) for run, costs in enumerate(choices)]
        out.units = [costs.units[run] for run, costs in enumerate(choices)]
        out.spent = [costs.spent[run] for run, costs in enumerate(choices)]
        out.recomputing = [costs.recomputing[run] for run, costs in enumerate(choices)]
        several = {id(c): c for c in choices}.values()
        # what is made once, when a model first runs in chunks, is made outside of units
        out.seconds = sum(out.spent) + min(c.seconds - sum(c.spent) for c in several)
        for p, start in enumerate(starts):
            forward, backward = zip(*(c.waiting[p].moved(start - c.starts[p]) for c in several), strict=True)
            out.waiting[p] = Peaks(max(forward), max(backward))
        return out

    def changed(self, like: Sequence[tuple[Costs, int]]) -> Costs:
        """Those of a step in which each run is changed as one of its kind was in another measured step: ``like`` has
        the costs of that step, and which run.
        """
        out, here = copy(self), self.starts
        starts = [here[0]]
        for run, (there, of) in enumerate(like):
            grown = there.starts[of + 1] - there.starts[of] - here[of + 1] + here[of]
            starts.append(starts[-1] + here[run + 1] - here[run] + grown)
        out.levels = [
            at.moved(start - at.start).changed(
                self.levels[of].moved(start - here[of]), there.levels[of].moved(start - there.starts[of])
            )
            for at, start, (there, of) in zip(self.levels, starts, like, strict=False)
        ]
        out.units = [
            u.changed(self.units[of], there.units[of]) for u, (there, of) in zip(self.units, like, strict=True)
        ]
        out.spent = [s + there.spent[of] - self.spent[of] for s, (there, of) in zip(self.spent, like, strict=True)]
        out.recomputing = [
            s + there.recomputing[of] - self.recomputing[of]
            for s, (there, of) in zip(self.recomputing, like, strict=True)
        ]
        out.seconds = self.seconds + sum(out.spent) - sum(self.spent)
        out.waiting = [at.moved(new - old) for at, new, old in zip(self.waiting, starts, here, strict=True)]
        return out

    def samples(self, size: int) -> list[int]:
        """Runs, one for each kind of unit, of which some may be selective within a budget: as many as one step may try
        together.
        """
        kinds: dict[tuple[int, ...], int] = {}
        peak, _ = self.forecast(self.uniform("reversible"))
        for run, unit in enumerate(self.units):
            if unit.sizes.exact and unit.unit and not unit.fixed:
                kinds[unit.kind] = run
        found = []
        for run in sorted(kinds.values(), key=lambda run: self.units[run].run.saved):
            peak += self.units[run].run.saved + self.units[run].state
            if peak <= size:
                found.append(run)
        return found

    def with_selective(self, runs: Sequence[int], measured: Measured) -> Costs:
        """With what units cost that are of a kind with some runs, by a step in which those were selective."""
        there = Costs(measured, self.chains)
        found, before = dict[tuple[int, ...], Selective](), 0
        here, then = self.starts, there.starts
        for run in sorted(runs):
            at = there.levels[run]
            extra = then[run + 1] - then[run] - here[run + 1] + here[run]
            if run + 1 == len(self.units):
                extra += self.units[run].run.result  # which is there in both, when the last run has just ended
            own = max(at.forward, at.rebuild, at.backward) - before - self.own(run, Form.REVERSIBLE)
            seconds = min(self.recomputing[run] - there.recomputing[run], STORED_IS_FASTER * self.units[run].gain)
            found[self.units[run].kind] = Selective(extra, own, seconds)
            before += extra
        out = copy(self)
        out.units = [replace(u, selective=None if u.fixed or not u.unit else found.get(u.kind)) for u in self.units]
        return out

    @property
    def starts(self) -> list[int]:
        """Bytes alive where each run begins, and where the last one has ended."""
        if not self.levels:
            return [0]
        return [*(at.start for at in self.levels), self.levels[-1].start + self.levels[-1].grown]

    def own(self, run: int, form: Form) -> int:
        """The peak of a unit's own stretches, without what the units before it keep beyond their reversible form."""
        return max(self.peaks(run, form))

    def peaks(self, run: int, form: Form) -> Peaks:
        """Likewise, by the phase of the step."""
        unit, at = self.units[run], self.levels[run]
        if form.stored:
            return _stored(unit, at, form)
        if form is Form.CHECKPOINTED and unit.run.glances:
            return _stopping(unit, at)
        selective = unit.selective.own if form is Form.SELECTIVE and unit.selective else 0
        return Peaks(at.forward, max(at.rebuild, at.backward)).moved(selective)

    def forecast(self, forms: Sequence[Form]) -> tuple[int, float]:
        """(peak bytes of a step above rest, seconds of a step) with these forms of the runs, in forward order."""
        before: dict[int, Form] = {}
        kept, early, peak, seconds = 0, 0, max(self.waiting[0]), self.seconds
        for run, (unit, form) in enumerate(zip(self.units, forms, strict=True)):
            peak = max(peak, self.peaks(run, form).over(kept, early))
            kept += unit.extra(form, before.get(unit.chain) if unit.unit else None)
            early += unit.before_turn(form)
            peak = max(peak, self.waiting[run + 1].over(kept, early))
            seconds -= unit.seconds(form)
            before[unit.chain] = form
        return peak, seconds

    def uniform(self, mode: Mode) -> list[Form]:
        """The forms in which every unit has this mode, as far as it may."""
        if mode == "stored":
            broken = {u.chain for u in self.units if u.fixed}
            return [Form.REVERSIBLE if u.chain in broken else Form.WHOLE_CHAIN for u in self.units]
        wanted = Form.REVERSIBLE if mode == "reversible" else Form.CHECKPOINTED
        return [Form.REVERSIBLE if u.fixed or not u.unit else wanted for u in self.units]


def _stopping(unit: UnitCost, at: Levels) -> Peaks:
    """Of a checkpointed unit whose recompute stops.

    x_{k-1} is kept meanwhile; in forward it (or the result) is there anyway, but for the last unit.
    """
    run = unit.run
    share = min(1.0, run.held / run.rebuilt) if run.rebuilt else 1.0  # of its largest chunk
    part = int(unit.state * share) if run.result and share < 1 else 0  # of x_{k-1}, which comes before its recompute
    behind = unit.state if unit.ends and not run.result else 0
    forward = max(at.forward, at.stepped + behind) + int(run.result * (1 - share))
    return Peaks(forward, max(at.complete, at.undone or at.backward) + part).moved(run.glances)


def _stored(unit: UnitCost, at: Levels, form: Form) -> Peaks:
    run = unit.run
    waits = run.saved - run.held  # of other chunks
    stored = at.start + run.saved + max(0, at.grown - unit.kept - run.early)
    meanwhile = at.start + waits + at.again  # as in its rebuilding
    forward = min(max(at.forward, meanwhile), at.forward + run.saved - run.early)
    states = {Form.SECOND_TO_END: 1, Form.LATER_TO_END: 2}.get(form, 0)
    if states and run.saves_state:  # as the unit before it did, whose float value of the state is there in any form
        states -= 1
    gone = 2 * unit.state if form is Form.WHOLE_CHAIN else 0
    return Peaks(max(forward, stored) + states * unit.state, at.backward + waits - run.lasting - gone)
