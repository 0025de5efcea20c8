"""Which of several ways to choose chains, where residual blocks nest, keeps the least."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from revwire._search.dataflow import Flow
from revwire._search.residuals import Candidate

STREAMS = 2 * 4
"""Bytes per element that a chain keeps: its two ends, in 32 bits."""

BITS_PER_BYTE = 8

KEPT_BITS = 4
"""Per element and unit, as the default coupling keeps them."""


def leanest(flow: Flow, ways: Sequence[list[list[Candidate]]]) -> list[list[Candidate]]:
    """The chains that keep least at the peak of a step by their own sizes; the first of equals.

    Where the units of the first way save nothing, as inside of a model's own checkpointing, sizes tell nothing.
    """
    first, *others = ways
    if not any(_saved(flow, c) for chain in first for c in chain):
        return first
    return min([first, *filter(None, others)], key=lambda chains: peak_bytes(flow, chains))


def peak_bytes(flow: Flow, chains: list[list[Candidate]]) -> float:
    """What is there when the largest unit is rebuilt: its activations, all that is outside of chains, and what these
    keep.
    """
    events, values = flow.recording.events, flow.recording.values
    units = [c for chain in chains for c in chain]
    saved = [_saved(flow, c) for c in units]
    elements = [[prod(values[c.fork].shape) for c in chain] for chain in chains]
    kept = sum(STREAMS * sizes[0] + sum(sizes) * KEPT_BITS / BITS_PER_BYTE for sizes in elements)
    given = _extra_inputs(flow, units)
    kept += sum(prod(values[v].shape) * values[v].dtype.itemsize for v in given)
    outside = sum(e.saved for e in events) - sum(saved)
    return outside + kept + max(saved, default=0)


def _saved(flow: Flow, c: Candidate) -> int:
    """Bytes that autograd keeps for a unit."""
    return sum(flow.recording.events[e].saved for e in {*c.region, c.add, *c.post})


def _extra_inputs(flow: Flow, units: Sequence[Candidate]) -> set[int]:
    """The activations that units are given besides their forks; they are kept until these are rebuilt."""
    values, given = flow.recording.values, set[int]()
    made: dict[int, list[int]] = {}
    for v in values:
        made.setdefault(v.event, []).append(v.number)
    for c in units:
        own = {*c.region, c.add, *c.post}
        used = {a for e in own for v in made.get(e, ()) for a in flow.activations(v)}
        given |= {a for a in used if values[a].event not in own} - {c.fork}
    return given


def levels(units: Sequence[Candidate]) -> dict[int, int]:
    """How deep other units are nested in the region of each, by its add."""
    deep: dict[int, int] = {}
    for c in sorted(units, key=lambda c: len(c.region)):
        inside = [deep[d.add] for d in units if d.add in deep and d is not c and d.add in c.region]
        deep[c.add] = 1 + max(inside) if inside else 0
    return deep
