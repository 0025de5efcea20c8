"""What a chain of reversible units holds at each of its units."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from revwire._paper.step import Step
from revwire._search.residuals import Candidate
from revwire._structures import refs

_STATE = 4
"""Bytes per element of a state, of its float value and of its gradient; 8 where the network is in float64."""


class UnitOnPaper(NamedTuple):
    """A reversible unit.

    Attributes:
        end: the event after its last one.
        inputs: the storages that are kept for it, beside the state.
        bits: bytes kept of its state.
        inner: at most alive in its backward, beyond what is there when it begins.
    """

    end: int
    inputs: frozenset[int]
    bits: int
    inner: int


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


def chain_on_paper(step: Step, units: Sequence[Candidate], bits: Sequence[int]) -> ChainOnPaper:
    """A chain of these units, of which each keeps so many bits per element."""
    events, values = step.events, step.values
    regions = [events_of(step, c) for c in units]
    found, own = [], frozenset[int]().union(*regions)
    for c, region, kept in zip(units, regions, bits, strict=True):
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
        inner = _inner(step, sorted(region), {*given}, state, elements * fork.dtype.itemsize)
        found.append(UnitOnPaper(max(region) + 1, given, elements * kept // 8, inner))
    fork = values[units[0].fork]
    states = 2 * prod(fork.shape) * max(_STATE, fork.dtype.itemsize)
    return ChainOnPaper(min(own), max(own) + 1, own, states, tuple(found))


def events_of(step: Step, c: Candidate) -> frozenset[int]:
    """The torch calls that are in a unit."""
    return frozenset(e for e in {*c.region, c.add, *c.post} if not step.events[e].is_module)


def _inner(step: Step, region: list[int], there: set[int], state: int, plain: int) -> int:
    """As `inner_peak`, of a unit: beside the two states there are the gradients of both, where a plain network has
    one, and the float value of x_k.
    """
    saved, most, seen = 0, 0, set(there)
    for e in region:
        for s in step.keeps(e):
            if s not in seen:
                seen.add(s)
                saved += step.sizes[s]
        most = max(most, saved + step.gradients[e], saved + step.passing[e] + step.waiting[region[-1] + 1])
    return most + 2 * state - plain
