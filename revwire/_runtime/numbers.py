"""The tensors of a branch, by numbers: 0 is the state, the others are results of calls, or come from elsewhere."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from revwire._runtime.replay import Drawing, Given, Made, recorded_dataclass
from revwire._structures import CONSTANTS, is_mapping, is_sequence
from revwire._surroundings.copies import OURS, carried_by, snapshot
from revwire._surroundings.inventory import version_of

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, type(Ellipsis)})


class Numbers:
    """Numbers of tensors, which are held as long as somebody else holds them.

    Attributes:
        size: how many there are.
        held: by number, those that come from elsewhere, with their version counters.
    """

    __slots__ = ("_given", "_made", "held", "size")

    def __init__(self, x: Tensor) -> None:
        self._made: dict[int, tuple[ReferenceType[Tensor], int]] = {id(x): (ref(x), 0)}
        self._given: dict[int, int] = {}  # the numbers of those that are held
        self.size = 1
        self.held: dict[int, tuple[Tensor, int]] = {}

    def is_state(self, x: Tensor) -> None:
        """Another tensor stands for the state, too."""
        self._made[id(x)] = ref(x), 0

    def forget(self) -> None:
        """Hold nothing any more."""
        self.held.clear()
        self._given.clear()
        self._made.clear()

    def number(self, t: Tensor) -> int | None:
        """The number of a tensor that comes from the state (0: the state), or None."""
        found = self._made.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _given_number(self, t: Tensor) -> int:
        """The number of an argument that comes from elsewhere."""
        number, version = self._given.get(id(t)), version_of(t)
        if number is None or self.held[number][1] != version:
            number = self._given[id(t)] = self.size
            self.size += 1
            self.held[number] = t, version
        return number

    def made(self, t: Tensor) -> int:
        """The number of a result: its own, where a call hands back what it was given."""
        found = self._made.get(id(t))
        if found is not None and found[0]() is t:
            return found[1]
        number = self.size
        self._made[id(t)] = ref(t), number
        self.size += 1
        return number

    def noted(self, value: Any, needs: list[int]) -> Any:
        """A value as a recorded argument."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            found = self._made.get(id(value))
            number = found[1] if found is not None and found[0]() is value else self._given_number(value)
            needs.append(number)
            return Made(number, carried_by(value) if value.__dict__.keys() - OURS else None)
        if isinstance(value, torch.Generator):
            return Drawing(value.clone_state())
        if isinstance(value, (*CONSTANTS, nn.Module)):
            return value
        if is_sequence(value):
            items = [self.noted(v, needs) for v in value]
            return items if kind is list else kind._make(items) if hasattr(value, "_fields") else tuple(items)
        if is_mapping(value):
            return kind((k, self.noted(v, needs)) for k, v in value.items())
        if kind is slice:
            return slice(*(self.noted(v, needs) for v in (value.start, value.stop, value.step)))
        remade = recorded_dataclass(value, lambda v: self.noted(v, needs))
        return Given(snapshot(value)) if remade is None else remade
