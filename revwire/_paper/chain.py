"""What a chain of reversible units holds at each of its units."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from revwire._paper.step import Bytes, Step, inner_height
from revwire._search.residuals import Candidate
from revwire._structures import refs

_STATE = 4
"""Bytes per element of the value of a state; 8 where the network is in float64."""


class UnitOnPaper(NamedTuple):
    """A reversible unit.

    Attributes:
        end: the event after its last one.
        inputs: the storages that are kept for it, beside the state.
        kept: bytes kept beside.
        inner: at most alive in its backward, beyond what is there when it begins.
    """

    end: int
    inputs: frozenset[int]
    kept: int
    inner: Bytes


class ChainOnPaper(NamedTuple):
    """A chain of reversible units.

    Attributes:
        begin, end: its events.
        own: those of them that are in its units.
        states: bytes of its two states.
        units: in order.
    """

    begin: int
    end: int
    own: frozenset[int]
    states: int
    units: tuple[UnitOnPaper, ...]


def chain_on_paper(step: Step, units: Sequence[Candidate], states: int, kept_bytes: Sequence[int]) -> ChainOnPaper:
    """A chain of these units, of which each keeps so many bytes; ``states``: bytes of its two states.

    In the backward of a unit there are, beside the two states, the gradients of both, where a plain network has one.
    """
    events, values = step.events, step.values
    regions = [events_of(step, c) for c in units]
    found, own = [], frozenset[int]().union(*regions)
    for c, region, kept in zip(units, regions, kept_bytes, strict=True):
        fork = values[c.fork]
        elements = prod(fork.shape)
        state = elements * max(_STATE, fork.dtype.itemsize)
        inputs = {
            values[r.value].storage
            for e in region
            for r in refs((events[e].args, events[e].kwargs))
            if values[r.value].event not in region
        } - {fork.storage}
        given = frozenset(s for s in inputs if s in step.sizes)
        more = elements * fork.dtype.itemsize + states // 2 - state  # wide streams: one more on its way
        inner = inner_height(step, sorted(region), given, whole=True).over(more)
        found.append(UnitOnPaper(max(region) + 1, given, kept, inner))
    return ChainOnPaper(min(own), max(own) + 1, own, states, tuple(found))


def events_of(step: Step, c: Candidate) -> frozenset[int]:
    """The torch calls that are in a unit: with those modules whose results it takes, all that they do."""
    between = range(min(c.region | {c.add}), c.add)
    inner = {e for e in between if step.events[e].parent > c.host}
    return frozenset(e for e in {*inner, *c.region, c.add, *c.post} if not step.events[e].is_module)
