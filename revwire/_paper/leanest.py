"""The layout of a step that needs least: which chains are rewired, and which module calls are checkpointed.

Note [The leanest layout]
    In the order of a forward pass, what is to come adds to what is kept so far, and nothing else of the past matters.
    So for a bound on the peak, the least that can be kept up to each event is found from the front: an event is stored,
    a module call that begins there is checkpointed, or a chain that begins there is rewired, whichever keeps less among
    those whose own peak stays below the bound. The lowest bound that can be kept is found by bisection. No part runs
    more than twice, so a step costs one more forward at most.

    The gradients of weights do not grow with the input, and may hide all else where the example is small. So among the
    layouts of the lowest peak, the one is taken that has the lowest peak without them.

    A chain that is rewired is another function, if only by a little. It has to pay: without it, either peak would be
    higher by `PAYS`. A call at the end of the step is checkpointed only if its activations raised the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from revwire._paper.chain import ChainOnPaper
from revwire._paper.cuts import Book, Cut, cut_of, peak
from revwire._paper.step import Bytes, Step

PAYS = 1.03
"""A chain that lowers the peak by less than this factor is not rewired."""

_SMALLEST = 1 / 200
"""A call that saves less than this part of the whole is not worth a checkpoint."""

_ROUNDS = 12
"""Bisections: a bound is found to within a part of 2^12 of the stored step."""

_ENDLESS = 1 << 62


class Layout(NamedTuple):
    """What is checkpointed, which chains are rewired (by their places among those that could be), and the peak."""

    cuts: tuple[Cut, ...]
    chains: tuple[int, ...]
    peak: Bytes

    def is_clearly_below(self, other: Layout) -> bool:
        """Whether this one pays, beside another."""
        lower = [a * PAYS <= b for a, b in zip(self.peak, other.peak, strict=True)]
        return self.peak.all <= other.peak.all and any(lower)


def cuts_of(step: Step, calls: Iterable[int]) -> list[Cut]:
    """Those of some module calls that are worth a checkpoint, each as one."""
    before = [0]
    for event in step.events:
        before.append(before[-1] + event.saved)
    least = before[-1] * _SMALLEST
    return [cut_of(step, c) for c in calls if before[step.events[c].end] - before[c] > least]


def leanest(
    step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper], bars: Callable[[int, Cut], bool]
) -> Layout:
    """The layout with the lowest peak; see Note [The leanest layout].

    Args:
        step: the step.
        cuts: what may be checkpointed.
        chains: what may be rewired.
        bars: whether the chain at a place, if it is rewired, bars a cut.
    """
    paths = _Paths(step, cuts, chains, bars)
    chosen, plain = paths.best(range(len(chains))), paths.best(())
    if not chosen.is_clearly_below(plain):
        chosen = plain
    for chain in reversed(chosen.chains):
        without = paths.best([c for c in chosen.chains if c != chain])
        if not chosen.is_clearly_below(without):
            chosen = without
    return _shortened(step, chains, chosen)


def lowest(step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper]) -> int:
    """The lowest peak that any layout has; see Note [The leanest layout]."""
    return _Paths(step, cuts, chains, lambda *_: False).best(range(len(chains))).peak.all


def _shortened(step: Step, chains: Sequence[ChainOnPaper], found: Layout) -> Layout:
    """Without the checkpoints at the end of the step that do not lower its peak."""
    rewired = [chains[c] for c in found.chains]
    few, many = 0, len(found.cuts)
    while few < many:
        half = (few + many) // 2
        tried = peak(step, found.cuts[:half], rewired)
        if tried.all <= found.peak.all and tried.growing <= found.peak.growing:
            many = half
        else:
            few = half + 1
    return found._replace(cuts=found.cuts[:many])


class _Jump(NamedTuple):
    """Some events that go as one: stored, checkpointed, or as a chain.

    Attributes:
        end: the event after them.
        kept: the storages that are kept for them, as bits of a number.
        more: bytes that are kept beside.
        height: at most alive in their backward, beyond what was kept before.
        cut, chain: what it is, if it is not stored.
    """

    end: int
    kept: int
    more: int
    height: Bytes
    cut: Cut | None = None
    chain: int | None = None


class _Reached(NamedTuple):
    """How an event was reached: what is kept, and by which jump from where."""

    total: int
    kept: int
    before: int
    jump: _Jump | None


class _Paths:
    """The ways through a step."""

    def __init__(
        self, step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper], bars: Callable[[int, Cut], bool]
    ) -> None:
        self.step, self.chains = step, chains
        self.sizes: list[int] = []  # of storages, by bit
        self.bits: dict[int, int] = {}
        self.jumps: dict[int, list[_Jump]] = {}
        self.barred = [{cut.begin for cut in cuts if bars(number, cut)} for number in range(len(chains))]
        for number, chain in enumerate(chains):
            book = Book(step)
            book.rewire(chain)
            self.add(chain.begin, chain.end, book, chain=number)
        for cut in cuts:
            book = Book(step)
            book.checkpoint(cut)
            self.add(cut.begin, cut.end, book, cut=cut)
        self.marks = sorted({0, len(step.events), *self.jumps, *(j.end for many in self.jumps.values() for j in many)})
        for a, b in zip(self.marks, self.marks[1:], strict=False):
            book = Book(step)
            for event in range(a, b):
                book.store(event)
            self.add(a, b, book)

    def add(self, begin: int, end: int, book: Book, cut: Cut | None = None, chain: int | None = None) -> None:
        mask, size = 0, 0
        for s in book.kept:
            if s not in self.bits:
                self.bits[s] = len(self.sizes)
                self.sizes.append(self.step.sizes[s])
            mask |= 1 << self.bits[s]
            size += self.step.sizes[s]
        self.jumps.setdefault(begin, []).append(_Jump(end, mask, book.total - size, book.most, cut, chain))

    def size(self, mask: int) -> int:
        """Bytes of some storages."""
        total = 0
        while mask:
            low = mask & -mask
            total += self.sizes[low.bit_length() - 1]
            mask ^= low
        return total

    def best(self, rewired: Iterable[int]) -> Layout:
        """The layout of the lowest peak in which no other chains are rewired."""
        allowed = frozenset(rewired)
        lowest = peak(self.step, ())
        found = self.lowered(Layout((), (), lowest), lambda bound: Bytes(bound, _ENDLESS), 0, allowed)
        return self.lowered(found, lambda bound: Bytes(found.peak.all, bound), 1, allowed)

    def lowered(self, found: Layout, bounds: Callable[[int], Bytes], kind: int, allowed: frozenset[int]) -> Layout:
        """The layout within the lowest of some bounds, or ``found``, if that has a lower peak (of this kind)."""
        low, high = 0, found.peak[kind]
        for _ in range(_ROUNDS):
            if low >= high:
                break
            bound = (low + high) // 2
            tried = self.within(bounds(bound), allowed)
            if tried is None:
                low = bound + 1
            else:
                found, high = tried, min(bound, tried.peak[kind])
        return found

    def within(self, bound: Bytes, allowed: frozenset[int]) -> Layout | None:
        """A layout whose peak stays within a bound, or None."""
        barred = set[int]().union(*(self.barred[c] for c in allowed))
        reached = {0: _Reached(0, 0, 0, None)}
        for mark in self.marks[:-1]:
            here = reached.get(mark)
            if here is None:
                continue
            for jump in self.jumps.get(mark, ()):
                high = jump.height.over(here.total)
                if high.all > bound.all or high.growing > bound.growing:
                    continue
                if jump.chain not in allowed if jump.chain is not None else jump.cut and jump.cut.begin in barred:
                    continue
                new = jump.kept & ~here.kept
                total = here.total + self.size(new) + jump.more
                there = reached.get(jump.end)
                if there is None or total < there.total:
                    reached[jump.end] = _Reached(total, here.kept | new, mark, jump)
        if self.marks[-1] not in reached:
            return None
        jumps = [*self.traced(reached)]
        cuts = tuple(j.cut for j in reversed(jumps) if j.cut is not None)
        rewired = tuple(j.chain for j in reversed(jumps) if j.chain is not None)
        return Layout(cuts, rewired, peak(self.step, cuts, [self.chains[c] for c in rewired]))

    def traced(self, reached: dict[int, _Reached]) -> Iterator[_Jump]:
        """The jumps of the way to the end, from the last."""
        at = self.marks[-1]
        while at:
            _, _, at, jump = reached[at]
            assert jump is not None
            yield jump
