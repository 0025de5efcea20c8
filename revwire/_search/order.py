"""Whether the skip of a unit keeps its shape and the order of its elements on the way to the unit's output."""

from __future__ import annotations

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
    taken to keep the order.
    """
    events, values = flow.recording.events, flow.recording.values
    shape = values[c.fork].shape
    if values[out].shape != shape:
        return False
    path = [events[e] for e in (*_skip(flow, c), *post)]
    if not any(event.view for event in path):
        return True
    start = index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for event in path:
        if event.view:
            index = _viewed(event, index)
    return torch.equal(index, start)


def _viewed(event: Event, index: Tensor) -> Tensor:
    def stand_in(leaf: Any) -> Any:
        return index if isinstance(leaf, Ref) else leaf

    out: Tensor = event.target(*mapped(event.args, stand_in), **mapped(event.kwargs or {}, stand_in))
    return out


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
