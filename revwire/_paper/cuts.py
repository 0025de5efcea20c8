"""The peak of a step in which some module calls are checkpointed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from revwire._paper.chain import ChainOnPaper
from revwire._paper.step import Step
from revwire._structures import refs


class Cut(NamedTuple):
    """A module call under activation checkpointing.

    Attributes:
        begin, end: its events.
        inputs: the storages that are kept for it.
        inner: at most alive in its backward, beyond what is there when it begins.
    """

    begin: int
    end: int
    inputs: frozenset[int]
    inner: int


def cut_of(step: Step, call: int) -> Cut:
    """A module call, checkpointed."""
    events, values = step.events, step.values
    end = events[call].end
    inputs = {
        values[r.value].storage
        for e in events[call:end]
        for r in refs((e.args, e.kwargs))
        if 0 <= values[r.value].event < call
    }
    kept = {s for s in inputs if s in step.sizes}
    return Cut(call, end, frozenset(kept), inner_peak(step, range(call, end), kept))


def inner_peak(step: Step, events: range, there: set[int]) -> int:
    """At most alive in the backward of some events that have to run again first, beyond what is there."""
    saved, most, seen = 0, 0, set(there)
    for e in events:
        for s in step.keeps(e):
            if s not in seen:
                seen.add(s)
                saved += step.sizes[s]
        most = max(most, saved + step.gradients[e], saved + step.passing[e] + step.waiting[events.stop])
    return most


def peak(step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper] = ()) -> int:
    """Bytes at the peak of a step with these calls checkpointed and these chains reversible; they do not overlap."""
    book = _Book(step)
    at: dict[int, Cut | ChainOnPaper] = {c.begin: c for c in (*cuts, *chains)}
    event = 0
    while event < len(step.events):
        found = at.get(event)
        if found is None:
            book.store(event)
            event += 1
        else:
            book.skip(found) if isinstance(found, Cut) else book.rebuild(found)
            event = found.end
    return book.most


class _Book:
    """What is kept so far in a forward pass, and the most that its backward will need on top.

    Attributes:
        kept: storages.
        total: bytes.
        most: at the peak.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.kept: set[int] = set()
        self.total = self.most = 0

    def keep(self, storages: Iterable[int]) -> None:
        for s in storages:
            if s not in self.kept:
                self.kept.add(s)
                self.total += self.step.sizes[s]

    def note(self, more: int) -> None:
        """At some time there is so much more than what is kept so far."""
        self.most = max(self.most, self.total + more)

    def store(self, event: int) -> None:
        self.keep(self.step.keeps(event))
        self.note(max(self.step.gradients[event], self.step.passing[event]))

    def skip(self, cut: Cut) -> None:
        self.keep(cut.inputs)
        self.note(cut.inner)

    def rebuild(self, chain: ChainOnPaper) -> None:
        units = iter(chain.units)
        unit = next(units, None)
        for event in range(chain.begin, chain.end):
            if event not in chain.own:
                self.store(event)
            if unit is not None and event + 1 == unit.end:
                self.keep(unit.inputs)
                self.total += unit.bits
                self.note(chain.states + unit.inner)
                unit = next(units, None)
        self.total += chain.states
