"""What a step costs when some units are stored or checkpointed, from one measured step in which all are reversible.

Note [Bytes by prefix]
    Backward passes visit units in the reverse order of forward, so at any moment the units whose memory waits are the
    first p of them. A stretch of the step then holds what was measured, plus what those p units keep beyond their
    reversible form. In its own backward a unit has its activations in any mode: kept, or just recomputed.

    Something else may hold part of what a unit saves, whatever its form: autocast its casts of weights until the
    forward pass ends (the *turn*), the output of a model keys and values for a cache, or all hidden states. So much
    less is what a stored unit keeps beyond.

Note [Checkpointing each block]
    What `torch.utils.checkpoint` around each block of the original network that has units would need is estimated from
    the same measurement. A step holds the inputs of the blocks so far (that of the last one is an activation of its
    first unit); in the backward of a block, the activations of all of its units, and one gradient. What was measured
    around a unit holds instead the kept bits of the units so far, two states of its chain, and a gradient of each; in
    its forward, the two states, the third that it makes, and the float tensor that carries the gradient of x_{k-1}.

Note [Forms]
    What a mode keeps depends on the neighbours, since states are shared:

    ===  ============  =============================================================================
    r    reversible    the kept bits: what was measured
    c    checkpointed  one state, and samples; in float streams one state more where the unit before is not
                       checkpointed. Where the branch gives fewer bits than a state has: that result, beside the kept
                       bits, instead of a state
    p    selective     as checkpointed, and the results of its products: measured
    s    stored        its activations; where the run of such units begins, the two states before it
    z    stored        likewise, where the run ends the chain: its two states replace those of the end
    y    stored        the second unit of such a run: until that is over, there is one state besides those before it
    x    stored        the third and those after it: two
    a    stored        likewise, in a chain that is stored as a whole: no states at all
    ===  ============  =============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

from revwire._budget.forms import _STORED_IS_FASTER, MODES, Form, Selective, UnitCost, _kind
from revwire._budget.meter import Measured, Stretch
from revwire._runtime.unit import Mode

_OWN = ("enter", "grad", "complete", "rebuilt", "undone")
"""Marks after which a stretch is a unit's own."""


@dataclass
class _Levels:
    """Bytes of the stretches around one run: the beginning and peak of its forward, its rebuilding, its backward.

    ``again``: by how much its rebuilding, or that of its last chunk, rose above what was there. ``complete``: of its
    rebuilding until
    its gradient had all that it needs. ``undone``: of its backward from when the branch's result has gone. A recompute
    that stops has nothing between these.
    """

    start: int = 0
    forward: int = 0
    grown: int = 0
    rebuild: int = 0
    backward: int = 0
    again: int = 0
    complete: int = 0
    undone: int = 0

    def moved(self, by: int) -> _Levels:
        """Those where so many more bytes lie before the run."""
        return replace(
            self,
            start=self.start + by,
            forward=self.forward + by,
            rebuild=self.rebuild + by,
            backward=self.backward + by,
            complete=self.complete + by,
            undone=self.undone + by,
        )


@dataclass
class _Rebuilding:
    """Seconds that a run is rebuilt, of those the rest when all is there that its gradient needs, and in how many
    chunks.
    """

    seconds: float
    rest: float | None
    chunks: int = 0


def _rebuilding(stretches: Sequence[Stretch]) -> dict[int, _Rebuilding]:
    """Of each run. Only before the first of its chunks does nothing but rebuilding lie between two marks."""
    found: dict[int, _Rebuilding] = {}
    for i, s in enumerate(stretches):
        if s.mark.kind == "rebuilt":
            before = stretches[i - 1]
            complete = before.mark.kind == "complete"
            seconds = before.seconds + (stretches[i - 2].seconds if complete else 0.0)
            found.setdefault(s.mark.run, _Rebuilding(seconds, before.seconds if complete else None)).chunks += 1
    return found


class Peaks(NamedTuple):
    """The most bytes at a time before, and after, the forward pass ended."""

    forward: int
    backward: int

    def over(self, kept: int, early: int) -> int:
        """The peak where so much more is kept, of which ``early`` is in both forms until the forward pass ends."""
        return max(self.forward + kept - early, self.backward + kept)

    def moved(self, by: int) -> Peaks:
        """Those where so many more bytes lie before."""
        return Peaks(self.forward + by, self.backward + by)


class Costs:
    """Bytes and seconds of a step by the forms of its units.

    Args:
        measured: one step with every unit reversible.
        kept, state, exact: by chain (and place), as in `UnitCost`.
    """

    def __init__(
        self, measured: Measured, kept: Sequence[Sequence[int]], state: Sequence[int], exact: Sequence[bool]
    ) -> None:
        self.measured = measured
        self._sizes = kept, state, exact
        self.seconds = sum(s.seconds for s in measured.stretches)
        self.levels = [_Levels() for _ in measured.places]
        self.spent = [0.0] * len(measured.places)  # seconds of each run's own stretches
        self.recomputing = [0.0] * len(
            measured.places
        )  # those of them that depend on the form: of its forward, and of rebuilding it
        self.waiting = [Peaks(0, 0)] * (len(measured.places) + 1)  # of stretches in which the first p units wait
        self._read()
        rebuilt = _rebuilding(measured.stretches)
        held, again_saved = measured.held or measured.saved, measured.rebuilt or measured.saved
        self.units = []
        for run, ((c, u), arithmetic) in enumerate(zip(measured.places, measured.arithmetic, strict=True)):
            again = rebuilt.get(run, _Rebuilding(0.0, None))
            self.recomputing[run] += again.seconds * again.chunks
            both = arithmetic.keep + arithmetic.undo
            stops = exact[c] and again.rest is not None
            result = measured.results[run] if measured.results and exact[c] else 0
            rest = (again.rest or 0.0) * again.chunks
            unit = UnitCost(
                chain=c,
                unit=u,
                saved=measured.saved[run],
                rebuilt=again_saved[run],
                held=held[run],
                kept=kept[c][u],
                state=state[c],
                exact=exact[c],
                looks=measured.looks[run] if measured.looks and stops else 0,
                early=max(measured.early[run], measured.lasting[run]) if measured.early else 0,
                lasting=measured.lasting[run] if measured.lasting else 0,
                saves_state=bool(measured.saves_state and measured.saves_state[run]),
                result=result,
                gain=again.seconds * again.chunks + arithmetic.keep,
                relief=(0.0 if result else arithmetic.keep) + rest if stops else 0.0 if result else both,
                arithmetic=both,
                ends=u == len(kept[c]) - 1,
                fixed=run not in rebuilt or measured.places.count((c, u)) > 1,
            )
            self.units.append(unit)

    @classmethod
    def mixed(cls, choices: Sequence[Costs]) -> Costs:
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
        out.seconds += sum(out.spent) - sum(choices[0].spent)
        several = {id(c): c for c in choices}.values()
        for p, start in enumerate(starts):
            forward, backward = zip(*(c.waiting[p].moved(start - c.starts[p]) for c in several), strict=True)
            out.waiting[p] = Peaks(max(forward), max(backward))
        return out

    def samples(self, size: int) -> list[int]:
        """Runs, one for each kind of unit, of which some may be selective within a budget: as many as one step may try
        together.
        """
        kinds: dict[tuple[int, ...], int] = {}
        peak, _ = self.forecast(self.uniform("reversible"))
        for run, unit in enumerate(self.units):
            if unit.exact and unit.unit and not unit.fixed:
                kinds[_kind(unit)] = run
        found = []
        for run in sorted(kinds.values(), key=lambda run: self.units[run].saved):
            peak += self.units[run].saved + self.units[run].state
            if peak <= size:
                found.append(run)
        return found

    def with_selective(self, runs: Sequence[int], measured: Measured) -> Costs:
        """With what units cost that are of a kind with some runs, by a step in which those were selective."""
        there = Costs(measured, *self._sizes)
        found, before = dict[tuple[int, ...], Selective](), 0
        here, then = self.starts, there.starts
        for run in sorted(runs):
            at = there.levels[run]
            extra = then[run + 1] - then[run] - here[run + 1] + here[run]
            if run + 1 == len(self.units):
                extra += self.units[run].result  # which is there in both, when the last run has just ended
            own = max(at.forward, at.rebuild, at.backward) - before - self.own(run, "r")
            seconds = min(self.recomputing[run] - there.recomputing[run], _STORED_IS_FASTER * self.units[run].gain)
            found[_kind(self.units[run])] = Selective(extra, own, seconds)
            before += extra
        out = copy(self)
        out.units = [replace(u, selective=None if u.fixed or not u.unit else found.get(_kind(u))) for u in self.units]
        return out

    @property
    def starts(self) -> list[int]:
        """Bytes alive where each run begins, and where the last one has ended."""
        return (
            [*(at.start for at in self.levels), self.levels[-1].start + self.levels[-1].grown] if self.levels else [0]
        )

    def _read(self) -> None:
        """Sort the stretches of the step; see Note [Bytes by prefix]."""
        alive: set[int] = set()
        rebuilding = dict[int, int]()  # bytes alive where the gradient came for which a run is rebuilt
        turned = all(stretch.mark.kind != "turn" for stretch in self.measured.stretches)
        for stretch in self.measured.stretches:
            kind, run = stretch.mark
            if kind in _OWN:
                self.spent[run] += stretch.seconds
            if kind == "enter":
                self.recomputing[run] += stretch.seconds
            if kind == "enter":
                self.levels[run].start, self.levels[run].forward = stretch.level, stretch.peak
                continue
            if kind == "turn":
                turned = True
            elif kind == "leave":
                alive.add(run)
                self.levels[run].grown = stretch.level - self.levels[run].start
            elif kind in ("grad", "complete"):
                alive.discard(run)
                self.levels[run].rebuild = max(self.levels[run].rebuild, stretch.peak)
                before = rebuilding.setdefault(run, stretch.level)
                self.levels[run].again = max(self.levels[run].again, stretch.peak - before)
                if kind == "grad":
                    self.levels[run].complete = max(self.levels[run].complete, stretch.peak)
                continue
            elif kind in ("rebuilt", "undone"):
                self.levels[run].backward = max(self.levels[run].backward, stretch.peak)
                if kind == "undone":
                    self.levels[run].undone = max(self.levels[run].undone, stretch.peak)
                continue
            p = max(alive, default=-1) + 1
            forward, backward = self.waiting[p]
            self.waiting[p] = (
                Peaks(forward, max(backward, stretch.peak)) if turned else Peaks(max(forward, stretch.peak), backward)
            )

    def own(self, run: int, form: Form) -> int:
        """The peak of a unit's own stretches, without what the units before it keep beyond their reversible form."""
        return max(self.peaks(run, form))

    def peaks(self, run: int, form: Form) -> Peaks:
        """Likewise, by the phase of the step."""
        unit, at = self.units[run], self.levels[run]
        if form == "p":
            return self.peaks(run, "r").moved(unit.selective.own if unit.selective else 0)
        if (
            form == "c" and unit.looks
        ):  # x_{k-1} is kept meanwhile; in forward it (or the result) is there anyway, but for the last unit
            share = min(1.0, unit.held / unit.rebuilt) if unit.rebuilt else 1.0  # of its largest chunk
            part = (
                int(unit.state * share) if unit.result and share < 1 else 0
            )  # of x_{k-1}, which comes before its recompute
            forward = at.forward + (int(unit.result * (1 - share)) if unit.result else unit.state if unit.ends else 0)
            return Peaks(forward, max(at.complete, at.undone or at.backward) + part).moved(unit.looks)
        if MODES[form] != "stored":
            return Peaks(at.forward, max(at.rebuild, at.backward))
        waits = unit.saved - unit.held  # of other chunks
        stored = at.start + unit.saved + max(0, at.grown - unit.kept - unit.early)
        meanwhile = at.start + waits + at.again  # as in its rebuilding
        forward = min(max(at.forward, meanwhile), at.forward + unit.saved - unit.early)
        besides = {"y": 1, "x": 2}.get(form, 0) * unit.state
        if (
            besides and unit.saves_state
        ):  # as the unit before it did, whose float value of the state is there in any form
            besides -= unit.state
        return Peaks(
            max(forward, stored) + besides, at.backward + waits - unit.lasting - (2 * unit.state if form == "a" else 0)
        )

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

    def checkpointed(self, blocks: Sequence[int]) -> tuple[int, float]:
        """What checkpointing around each block would cost, estimated; ``blocks`` numbers the block of each run,
        ascending.

        See Note [Checkpointing each block].
        """
        peak, bits, inputs, seconds = max(self.waiting[0]), 0, 0, self.seconds
        chains: dict[tuple[int, int], int] = {}  # two states of each chain so far, each time that it ran
        times, place = dict[int, int](), dict[int, int]()
        inside = 0  # activations of the units of the same block that ran before
        for run, (unit, at) in enumerate(zip(self.units, self.levels, strict=True)):
            first = run == 0 or blocks[run] != blocks[run - 1]
            inside = 0 if first else inside
            inputs += unit.state if first else 0
            if unit.unit <= place.get(unit.chain, -1):
                times[unit.chain] = times.get(unit.chain, 0) + 1
            place[unit.chain] = unit.unit
            key = unit.chain, times.get(unit.chain, 0)
            others = sum(chains.values()) - chains.get(key, 0)  # of chains that wait, the states are there too
            around = inputs - bits - others
            whole = unit.saved - unit.held  # where it was measured in chunks
            peak = max(
                peak, at.forward - 4 * unit.state + around, at.backward - 4 * unit.state + around + inside + whole
            )
            chains[key] = 2 * unit.state
            bits += unit.kept
            inside += unit.saved
            peak = max(peak, max(self.waiting[run + 1]) + inputs - bits - sum(chains.values()))
            last = run + 1 == len(self.units) or blocks[run + 1] != blocks[run]
            seconds -= unit.relief if last else unit.arithmetic  # it, too, stops early, once for each block
        return peak, seconds

    def uniform(self, mode: Mode) -> list[Form]:
        """The forms in which every unit has this mode, as far as it may."""
        broken = {u.chain for u in self.units if u.fixed}
        if mode == "stored":
            return ["r" if u.chain in broken else "a" for u in self.units]
        return ["r" if mode == "reversible" or u.fixed or not u.unit else "c" for u in self.units]
