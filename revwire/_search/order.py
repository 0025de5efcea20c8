"""Whether the skip of a unit keeps its shape and the order of its elements on the way to the unit's output."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from revwire._capture.recording import Event
from revwire._search.dataflow import Flow
from revwire._search.residuals import CLIMB, Candidate
from revwire._structures import Ref, mapped, refs


def keeps_layout(flow: Flow, c: Candidate, out: int, post: tuple[int, ...]) -> bool:
    """Whether ``out`` has the shape of the fork of ``c``, and element i of the skip arrives at place i of it.

    Where a view leads from the fork to ``out``, the views are tried on the numbers of the elements. Other calls are
    taken to keep the order. A value without all the elements (a mean, by which a norm divides) has no numbers, nor has
    one that was written to under another name.
    """
    events, values = flow.recording.events, flow.recording.values
    shape = values[c.fork].shape
    if values[out].shape != shape:
        return False
    skip, post_events = [events[e] for e in _skip(flow, c)], [events[e] for e in post]
    if not any(event.view for event in (*skip, *post_events)):
        return True
    start = torch.arange(torch.Size(shape).numel(), device="cpu").reshape(shape)
    numbers = {c.fork: start}
    for event in skip:
        _carry(flow, event, numbers)
    if skip and not any(r.value in numbers for r in refs((events[c.add].args, events[c.add].kwargs))):
        return False
    if not c.whole:
        _carry(flow, events[c.add], numbers)
    numbers.setdefault(c.result, start)
    for event in post_events:
        _carry(flow, event, numbers)
    return out in numbers and torch.equal(numbers[out], start)  # equal shapes, and equal numbers


def _carry(flow: Flow, event: Event, numbers: dict[int, Tensor]) -> None:
    """Give the results of a call the numbers of what they were made from, or of the latest value (of whose parts they
    were put together), where they have as many elements.
    """
    values, latest = flow.recording.values, next(reversed(numbers.values()))
    given = [r.value for r in refs((event.args, event.kwargs))]
    for result in (r.value for r in refs(event.out)):
        elements = torch.Size(values[result].shape).numel()
        if event.view and given[0] in numbers:
            numbers[result] = _viewed(flow, event, numbers[given[0]])
        elif elements == latest.numel():
            carried = next((numbers[v] for v in given if v in numbers), latest)
            numbers.setdefault(result, carried.reshape(values[result].shape))


def _viewed(flow: Flow, event: Event, numbers: Tensor) -> Tensor:
    """The view of a call, of its first argument's numbers. (They are contiguous: any shape is a view then.)"""
    others = iter([numbers.contiguous(), *map(partial(_shaped, flow), [*refs((event.args, event.kwargs))][1:])])

    def stand_in(leaf: Any) -> Any:
        return next(others) if isinstance(leaf, Ref) else leaf

    out: Tensor = event.target(*mapped(event.args, stand_in), **mapped(event.kwargs or {}, stand_in))
    return out


def _shaped(flow: Flow, r: Ref) -> Tensor:
    """A tensor whose shape is what a view needs of it (``view_as``)."""
    return torch.empty((), device="cpu").expand(flow.recording.values[r.value].shape)


def _skip(flow: Flow, c: Candidate) -> list[int]:
    """The calls from the fork to the addition on the side of the skip (none where the skip is the fork itself)."""
    if c.whole or c.branch is not None:
        return []
    for operand in (r.value for r in refs((flow.recording.events[c.add].args, flow.recording.events[c.add].kwargs))):
        path: list[int] = []
        at = operand
        while at != c.fork and len(path) < CLIMB:
            hop = flow.hop_up(at)
            if hop is None or any(flow.recording.events[flow.recording.values[v].event].is_product for v in hop[1]):
                break  # this side is the branch
            path += [flow.recording.values[v].event for v in hop[1]]
            at = hop[0]
        if at == c.fork:
            return path[::-1]
    return []
