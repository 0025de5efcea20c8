"""What a host's own code did with a state, call by call, and how it is done again.

Note [Replays]
    A recompute does not run the host's code again: it makes the torch calls and module calls again that this very
    forward made between a state and the residual add, on the rebuilt state. What else they were given (masks, tables,
    numbers, what another part of the host computed) is what the forward gave them: tensors are kept, detached; other
    objects as they were before the call. So whatever Python decided, read, counted or drew in between is that of the
    forward, and happens once. Values have numbers: 0 is the state.

Note [Random numbers of a replay]
    Other code of the host may draw between two of these calls. So the state of the generators is looked at before each
    call, and kept with those between which it moved. A unit that was seen to draw nothing is looked at only before and
    after from then on; if it draws all the same, its activations are kept that once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revwire._structures import is_mapping, is_named_tuple, is_sequence, tensors_in
from revwire._surroundings.context import run_again
from revwire._surroundings.copies import recalled
from revwire._surroundings.holdings import Held
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.randomness import RandomStates, set_random_states
from revwire._surroundings.settings import Settings, settings_restored

CallModes = tuple[bool, bool, list[tuple[str, bool, torch.dtype]], Settings]
"""(gradients enabled, inference mode, (device type, autocast enabled, its dtype) ..., settings) around a call."""


class Made:
    """In the recorded arguments of a call: the tensor with this number; ``carried``: attributes that code gave it."""

    __slots__ = ("carried", "number")

    def __init__(self, number: int, carried: dict[str, Any] | None = None) -> None:
        self.number, self.carried = number, carried


class Given:
    """In the recorded arguments of a call: an object, as it was before the call."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Drawing:
    """In the recorded arguments of a call: a generator, as it was before the call."""

    __slots__ = ("generator",)

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator


class Remade:
    """In the recorded arguments of a call: a dataclass instance that holds tensors."""

    __slots__ = ("like", "values")

    def __init__(self, like: Any, values: dict[str, Any]) -> None:
        self.like, self.values = like, values


class Call:
    """One call.

    Attributes:
        function: a torch function, or a module.
        args, kwargs: with tensors as `Made`.
        needs: the numbers of the tensors among them.
        makes: the numbers of the tensors in its result, in order.
        randomness: the generators' states before it, where they must be set.
        modes: those around it, where they are not those of the unit.
        held: what the module that is called, and those below it, held before it.
        context: context variables around it, where they are not those of the unit.
        copies: numbers of the tensors among its arguments that it writes to and that outlive it (batch statistics).
    """

    __slots__ = ("args", "context", "copies", "function", "held", "kwargs", "makes", "modes", "needs", "randomness")

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, needs: list[int]) -> None:
        self.function, self.args, self.kwargs, self.needs = function, args, kwargs, needs
        self.makes: Sequence[int] = ()
        self.randomness: RandomStates | None = None
        self.modes: CallModes | None = None
        self.copies: Sequence[int] = ()
        self.held: Held | None = None
        self.context: Context | None = None

    def again(self, values: list[Any]) -> None:
        """Make the call again, on the values so far, and put down what it gives."""
        if self.randomness is not None:
            set_random_states(self.randomness)
        args = [  # most are plain `Made`
            values[a.number] if type(a) is Made and a.carried is None else filled(a, values) for a in self.args
        ]
        kwargs = {k: filled(a, values) for k, a in self.kwargs.items()} if self.kwargs else {}
        with (
            NOTHING if self.modes is None else _under(self.modes),
            NOTHING if self.held is None else self.held.found_again(),
        ):
            if self.context is None:
                out = self.function(*args, **kwargs)
            else:
                out = run_again(self.context, partial(self.function, *args, **kwargs))
        makes = self.makes
        if type(out) is Tensor and len(makes) == 1:
            values[makes[0]] = out
            return
        for number, t in zip(makes, tensors_in(out), strict=True):
            values[number] = t


def filled(recorded: Any, values: list[Any]) -> Any:
    """A recorded argument with the tensors in it."""
    kind = type(recorded)
    if kind is Made:
        if recorded.carried:
            vars(values[recorded.number]).update(recalled(recorded.carried))
        return values[recorded.number]
    if kind in (int, float, bool, str) or recorded is None:
        return recorded
    if kind is Given:
        return recalled(recorded.value)
    if kind is Drawing:
        return recorded.generator.clone_state()
    if kind is Remade:
        out = copy.copy(recorded.like)
        for name, value in recorded.values.items():
            object.__setattr__(out, name, filled(value, values))
        return out
    if is_sequence(recorded):
        items = [filled(r, values) for r in recorded]
        if kind is list:
            return items
        return kind._make(items) if is_named_tuple(recorded) else kind(items)
    if is_mapping(recorded):
        return kind((k, filled(r, values)) for k, r in recorded.items())
    if kind is slice:
        return slice(*(filled(r, values) for r in (recorded.start, recorded.stop, recorded.step)))
    return recorded


def recorded_dataclass(value: Any, leaf: Callable[[Any], Any]) -> Remade | None:
    """A dataclass instance that holds tensors, with ``leaf`` applied to its fields; None for anything else."""
    if not is_dataclass(value) or isinstance(value, type) or next(tensors_in(value), None) is None:
        return None
    return Remade(copy.copy(value), {f.name: leaf(getattr(value, f.name, None)) for f in fields(value)})


def _under(modes: CallModes) -> ExitStack:
    stack = ExitStack()
    with stack:
        if modes[1]:
            stack.enter_context(torch.inference_mode())
        else:
            stack.enter_context(torch.set_grad_enabled(modes[0]))
        for kind, enabled, dtype in modes[2]:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        stack.enter_context(settings_restored(modes[3], len(modes[2]) > 1))
        return stack.pop_all()


class Replay:
    """The calls from a state to what its branch gave.

    Args:
        calls: in order.
        held: by their numbers, the tensors that they are given and that do not come from the state.
        size: how many numbers there are.
        out: the number of what the branch gave.
    """

    __slots__ = ("calls", "held", "out", "size")

    def __init__(self, calls: Sequence[Call], held: dict[int, Tensor], size: int, out: int) -> None:
        self.calls, self.held, self.size, self.out = calls, held, size, out

    def __call__(self, x: Tensor) -> Tensor:
        """The branch on the state ``x``."""
        values: list[Any] = [None] * self.size
        for number, t in self.held.items():
            values[number] = t
        values[0] = x
        del x
        ends = self._ends()
        for call, gone in zip(self.calls, ends, strict=True):
            for number in call.copies:
                values[number] = values[number].clone()
            call.again(values)
            for number in gone:
                values[number] = None
        return values[self.out]  # type: ignore[no-any-return]

    def _ends(self) -> list[list[int]]:
        """After each call, the numbers that no later one needs."""
        seen = {self.out}
        ends: list[list[int]] = []
        for call in reversed(self.calls):
            numbers = {*call.needs, *call.makes} - seen
            seen |= numbers
            ends.append([*numbers])
        return ends[::-1]
