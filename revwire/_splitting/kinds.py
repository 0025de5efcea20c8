"""Units of one kind: what is found out about one of them holds for all.

Note [Kinds of units]
    What a branch computes is the torch calls that it makes. Units whose calls are the same, one after the other, on
    tensors of the same shapes and layouts, with the same constants, buffers of the same content, and the very same
    tensors from elsewhere (a mask, rotary tables), compute the same function but for their weights. So along which
    dimensions it may be cut is looked at for one unit of each kind. Of a number with a point only counts whether it is
    0 or 1: rates of dropout and of stochastic depth, which often grow from block to block, leave the rest as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revwire._capture.recording import Event, Recording
from revwire._search.residuals import Candidate
from revwire._structures import Ref, is_constant, leaves_of, mapped, refs

Kinds = Sequence[Sequence[int]]
"""The kind of each unit, by chain and place."""


def kinds_of_units(recording: Recording, chains: Sequence[Sequence[Candidate]]) -> list[list[int]]:
    """Units have equal numbers where they are of one kind; see Note [Kinds of units]."""
    numbers: dict[Hashable, int] = {}
    return [[numbers.setdefault(_Description(recording, c).key, len(numbers)) for c in several] for several in chains]


class _Description:
    """What tells a unit from those of another kind."""

    def __init__(self, recording: Recording, c: Candidate) -> None:
        self.recording, self.c = recording, c
        self.own = {*c.region, c.add, *c.post}
        self.locals: dict[int, int] = {}  # values, by their order of appearance
        self.parts: list[Hashable] = []
        self.value(c.fork)
        for number in sorted(self.own):
            self.event(recording.events[number])

    @property
    def key(self) -> Hashable:
        return tuple(self.parts)

    def event(self, event: Event) -> None:
        """A call; one that acts beside, or shows nothing of what it does, is like no other."""
        if event.opaque or event.changes or event.hooked:
            self.parts.append((event.number, event.opaque))
        if event.is_module:
            return
        given = [self.leaf(leaf) for leaf in leaves_of((event.args, event.kwargs))]
        shape = repr(mapped((event.args, event.kwargs), lambda _: None))
        self.parts.append((event.target, shape, *given, event.modes))
        for ref in refs(event.out):
            self.value(ref.value)
        for _, after in event.writes:
            self.value(after)

    def leaf(self, leaf: Any) -> Hashable:
        if isinstance(leaf, Ref):
            return self.value(leaf.value)
        if isinstance(leaf, float):
            return "float", leaf in (0.0, 1.0) and leaf
        return (type(leaf).__name__, repr(leaf)) if is_constant(leaf) else id(leaf)

    def value(self, number: int) -> int:
        """The place of a value in the order of appearance; where it is new, it is described."""
        if number not in self.locals:
            value = self.recording.values[number]
            if value.event not in self.own and number != self.c.fork:
                self.from_elsewhere(number)
            self.locals[number] = len(self.locals)
            self.parts.append((value.shape, value.dtype, value.strides, value.wants))
        return self.locals[number]

    def from_elsewhere(self, number: int) -> None:
        value = self.recording.values[number]
        if value.event > self.c.host:  # made by the host, and not of the state: of its weights and buffers, say
            self.own.add(value.event)
            self.event(self.recording.events[value.event])
        elif isinstance(value.existing, nn.Parameter):
            self.parts.append("weight")
        elif value.existing is not None and value.names:
            self.parts.append(_content(value.existing))
        else:
            self.parts.append(("given", number))


def _content(buffer: Tensor) -> Hashable:
    if buffer.layout is not torch.strided or buffer.is_meta:
        return id(buffer)
    return buffer.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
