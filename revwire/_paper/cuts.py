"""The peak of a step in which some module calls are checkpointed, and some chains rewired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from revwire._paper.chain import ChainOnPaper
from revwire._paper.step import NONE, Bytes, Step, inner_height
from revwire._structures import refs

RANDOM_STATE = 5056
"""Bytes of the random state (of the CPU) that `torch.utils.checkpoint` keeps for each call."""


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
    inner: Bytes


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
    kept = frozenset(s for s in inputs if s in step.sizes)
    return Cut(call, end, kept, inner_height(step, range(call, end), kept, whole=False))


class Book:
    """What is kept so far in a forward pass, and the most that its backward will need.

    Attributes:
        kept: storages.
        total: bytes.
        most: at the peak.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.kept: set[int] = set()
        self.total = 0
        self.most = NONE

    def keep(self, storages: Iterable[int], more: int = 0) -> None:
        """Keep these, and so many bytes besides."""
        for s in storages:
            if s not in self.kept:
                self.kept.add(s)
                self.total += self.step.sizes[s]
        self.total += more

    def store(self, event: int) -> None:
        """Keep all that autograd does for an event."""
        self.keep(self.step.keeps(event))
        self.most = self.most.or_more(self.step.height(event, self.total))

    def checkpoint(self, cut: Cut) -> None:
        """Keep what is kept for a checkpointed call."""
        self.keep(cut.inputs, RANDOM_STATE)
        self.most = self.most.or_more(cut.inner.over(self.total))

    def rewire(self, chain: ChainOnPaper) -> None:
        """Keep what is kept for a chain."""
        units = iter(chain.units)
        unit = next(units, None)
        for event in range(chain.begin, chain.end):
            if event not in chain.own:
                self.store(event)
            if unit is not None and event + 1 == unit.end:
                self.keep(unit.inputs, unit.kept)
                self.most = self.most.or_more(unit.inner.over(self.total + chain.states))
                unit = next(units, None)
        self.total += chain.states


def peak(step: Step, cuts: Sequence[Cut], chains: Sequence[ChainOnPaper] = ()) -> Bytes:
    """At the peak of a step with these calls checkpointed and these chains rewired; they do not overlap."""
    book = Book(step)
    at: dict[int, Cut | ChainOnPaper] = {cut.begin: cut for cut in cuts}
    at.update({chain.begin: chain for chain in chains})
    event = 0
    while event < len(step.events):
        found = at.get(event)
        if found is None:
            book.store(event)
            event += 1
            continue
        if isinstance(found, Cut):
            book.checkpoint(found)
        else:
            book.rewire(found)
        event = found.end
    return book.most
