"""The layout of a step that needs least: which chains are rewired, and which module calls are checkpointed.

Note [The leanest layout]
    In the order of a forward pass, what is to come adds to what is kept so far, and nothing else of the past matters.
    So for a bound on the peak, the least that can be kept up to each event is found from the front: an event is stored,
    a module call that begins there is checkpointed, or a chain that begins there is rewired, whichever keeps less among
    those whose own peak stays below the bound. The lowest bound that can be kept is found by bisection. No part runs
    more than twice, so a step costs one more forward at most.

    A chain that is rewired is another function, if only by a little. It has to pay: without it, the peak would be
    higher by `PAYS`. And a call at the end of the step is checkpointed only if its activations raised the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from revwire._paper.chain import ChainOnPaper
from revwire._paper.cuts import Cut, cut_of, peak
from revwire._paper.step import Step

PAYS = 1.03
"""A chain that lowers the peak by less than this factor is not rewired."""

_SMALLEST = 1 / 200
"""A call that saves less than this part of the whole is not worth a checkpoint."""

_ROUNDS = 14
"""Bisections: the bound is found to within a part of 2^14 of the stored step."""


class Layout(NamedTuple):
    """What is checkpointed, which chains are rewired (by their places among those that could be), and the peak."""

    cuts: tuple[Cut, ...]
    chains: tuple[int, ...]
    peak: int


class _Jump(NamedTuple):
    """Some events that go as one: stored, checkpointed, or a chain. Storages are bits of a number.

    Attributes:
        end: the event after them.
        kept: the storages that are kept for them.
        more: bytes that are kept beside.
        peak: at most alive in their backward, beyond what was kept before.
    """

    end: int
    kept: int
    more: int
    peak: int
    cut: Cut | None = None
    chain: int | None = None


def cuts_of(step: Step, calls: Sequence[int]) -> list[Cut]:
    """Those of some module calls that are worth a checkpoint, each as one."""
    before = [0]
    for event in step.events:
        before.append(before[-1] + event.saved)
    least = before[-1] * _SMALLEST
    large = [c for c in calls if before[step.events[c].end] - before[c] > least]
    return [cut_of(step, c) for c in large]


def leanest(step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper], must: Sequence[int] = ()) -> Layout:
    """The layout with the lowest peak; see Note [The leanest layout].

    Args:
        step: the step.
        cuts: what may be checkpointed.
        chains: what may be rewired.
        must: places of the chains that have to be.
    """
    paths = _Paths(step, cuts, chains, frozenset(must))
    chosen = paths.best(frozenset(range(len(chains))))
    for chain in sorted(set(chosen.chains) - set(must), reverse=True):
        without = paths.best(frozenset(chosen.chains) - {chain})
        if without.peak < chosen.peak * PAYS:
            chosen = without
    return _shortened(step, chains, chosen)


def _shortened(step: Step, chains: Sequence[ChainOnPaper], found: Layout) -> Layout:
    """Without the checkpoints at the end of the step that do not lower its peak."""
    rewired = [chains[c] for c in found.chains]
    few, many = 0, len(found.cuts)
    while few < many:
        half = (few + many) // 2
        if peak(step, found.cuts[:half], rewired) <= found.peak:
            many = half
        else:
            few = half + 1
    return Layout(found.cuts[:many], found.chains, found.peak)


class _Paths:
    """The ways through a step."""

    def __init__(
        self, step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper], must: frozenset[int]
    ) -> None:
        self.step, self.chains, self.must = step, chains, must
        self.sizes: list[int] = []
        self.places: dict[int, int] = {}
        self.stop = len(step.events)
        self.cuts: dict[int, list[_Jump]] = {}
        for cut in cuts:
            jump = _Jump(cut.end, self.mask(cut.inputs), 0, self.size(self.mask(cut.inputs)) + cut.inner, cut=cut)
            self.cuts.setdefault(cut.begin, []).append(jump)
        self.rewired: dict[int, list[_Jump]] = {}
        for number, chain in enumerate(chains):
            self.rewired.setdefault(chain.begin, []).append(self.chain(number, chain))
        ends = {c.end for c in (*cuts, *chains)}
        self.marks = sorted({0, self.stop, *self.cuts, *self.rewired, *ends})
        self.stored = {a: self.run(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)}

    def mask(self, storages: frozenset[int] | set[int]) -> int:
        out = 0
        for s in storages:
            if s not in self.places:
                self.places[s] = len(self.sizes)
                self.sizes.append(self.step.sizes[s])
            out |= 1 << self.places[s]
        return out

    def size(self, mask: int) -> int:
        total = 0
        while mask:
            low = mask & -mask
            total += self.sizes[low.bit_length() - 1]
            mask ^= low
        return total

    def run(self, begin: int, end: int) -> _Jump:
        """Events that are stored."""
        kept: set[int] = set()
        total = most = 0
        for event in range(begin, end):
            for s in self.step.keeps(event):
                if s not in kept:
                    kept.add(s)
                    total += self.step.sizes[s]
            most = max(most, total + self.step.gradients[event], total + self.step.passing[event])
        return _Jump(end, self.mask(kept), 0, most)

    def chain(self, number: int, chain: ChainOnPaper) -> _Jump:
        """A chain that is rewired."""
        kept: set[int] = set()
        total = most = 0
        units = iter(chain.units)
        unit = next(units, None)
        for event in range(chain.begin, chain.end):
            new = [] if event in chain.own else [*self.step.keeps(event)]
            ends = unit is not None and event + 1 == unit.end
            for s in (*new, *(unit.inputs if ends and unit is not None else ())):
                if s not in kept:
                    kept.add(s)
                    total += self.step.sizes[s]
            if new:
                most = max(most, total + self.step.gradients[event])
            if ends and unit is not None:
                total += unit.bits
                most = max(most, total + chain.states + unit.inner)
                unit = next(units, None)
        return _Jump(chain.end, self.mask(kept), sum(u.bits for u in chain.units) + chain.states, most, chain=number)

    def best(self, allowed: frozenset[int]) -> Layout:
        """The layout of the lowest peak in which no other chains are rewired."""
        cuts: tuple[Cut, ...] = ()
        high = max(peak(self.step, ()), 1)
        low, found = 0, self.within(None, allowed)
        assert found is not None
        high = max(high, found.peak)
        for _ in range(_ROUNDS):
            bound = (low + high) // 2
            tried = self.within(bound, allowed)
            if tried is None:
                low = bound + 1
            else:
                high, found = min(bound, tried.peak), tried
            if low >= high:
                break
        rewired = [self.chains[c] for c in found.chains]
        cuts = found.cuts
        return Layout(cuts, found.chains, peak(self.step, cuts, rewired))

    def within(self, bound: int | None, allowed: frozenset[int]) -> Layout | None:
        """A layout whose peak stays within a bound, or None; without a bound, what keeps least."""
        # position: (bytes kept, their storages, peak, the position before, the jump from there)
        reached: dict[int, tuple[int, int, int, int, _Jump | None]] = {0: (0, 0, 0, 0, None)}
        inside = [(self.chains[c].begin, self.chains[c].end) for c in self.must]
        for mark in self.marks:
            here = reached.get(mark)
            if here is None or mark == self.stop:
                continue
            total, kept, most, _, _ = here
            for jump in self.jumps(mark, allowed):
                if jump.chain not in self.must and any(a <= mark < b or mark < a < jump.end for a, b in inside):
                    continue
                high = total + jump.peak
                if bound is not None and high > bound:
                    continue
                new = jump.kept & ~kept
                after = total + self.size(new) + jump.more
                there = reached.get(jump.end)
                if there is None or after < there[0]:
                    reached[jump.end] = (after, kept | new, max(most, high), mark, jump)
        return self.traced(reached) if self.stop in reached else None

    def jumps(self, mark: int, allowed: frozenset[int]) -> list[_Jump]:
        """What may go as one from here."""
        chains = [j for j in self.rewired.get(mark, ()) if j.chain in allowed]
        return [*chains, *self.cuts.get(mark, ()), self.stored[mark]]

    def traced(self, reached: dict[int, tuple[int, int, int, int, _Jump | None]]) -> Layout:
        cuts, chains = list[Cut](), list[int]()
        at = self.stop
        while at:
            _, _, _, before, jump = reached[at]
            assert jump is not None
            if jump.cut is not None:
                cuts.append(jump.cut)
            if jump.chain is not None:
                chains.append(jump.chain)
            at = before
        return Layout(tuple(reversed(cuts)), tuple(reversed(chains)), reached[self.stop][2])
