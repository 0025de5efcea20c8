"""Generators of a module's own: torch's, Python's and NumPy's; their states are read, and set."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from revwire._surroundings.attributes import items_in, slots_of
from revwire._surroundings.code import named, names_in

_DEPTH = 4
"""How deep generators are looked for in containers and objects."""

_WITHOUT = (Tensor, nn.Module, ModuleType, FunctionType, type, str, int, float)
"""Values in which none are looked for: modules are visited one by one, code is read by its names."""

States = Sequence[tuple[Any, Any]]
"""Generators, each with its state."""


def is_generator(value: Any) -> bool:
    """Whether this draws random numbers from a state of its own."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def generators_in(value: Any) -> Iterator[Any]:
    """The generators in a value: in lists, tuples, sets and dicts, and in the attributes of objects."""
    yield from _generators_in(value, _DEPTH, set())


def _generators_in(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if is_generator(value):
        yield value
    elif depth and not isinstance(value, _WITHOUT) and id(value) not in seen:
        seen.add(id(value))
        for item in _items(value):
            yield from _generators_in(item, depth - 1, seen)


def draws_from_all(function: FunctionType) -> bool:
    """Whether a function names what draws from the generators of ``random`` or ``numpy.random``."""
    numpy = sys.modules.get("numpy")
    modules = [random, *([] if numpy is None else [numpy.random])]
    shared = generators_of_all()
    for value in named(function):
        if any(value is m for m in modules) or any(getattr(value, "__self__", None) is g for g in shared):
            return True
        if value is numpy is not None and "random" in names_in(function.__code__):
            return True
    return False


_SET_BACK = frozenset({"fork_rng", "set_rng_state", "manual_seed"})


def sets_back(function: FunctionType) -> bool:
    """Whether a function names what sets torch's generators: then it may not show that it drew from them."""
    return not _SET_BACK.isdisjoint(names_in(function.__code__))


def _items(value: Any) -> Iterable[Any]:
    items = items_in(value)
    if items is not None:
        return items
    return [*getattr(value, "__dict__", {}).values(), *slots_of(value).values()]


def states_of(generators: Iterable[Any]) -> States:
    """Each of them, once, with its state."""
    return [(g, _state(g)) for g in {id(g): g for g in generators}.values()]


def drawn_from(before: States) -> States:
    """Those whose state is another now, with the state that they had."""
    return [(g, state) for g, state in before if not _same(state, _state(g))]


@contextmanager
def generators_at(states: States) -> Iterator[None]:
    """Let a recompute draw what the forward drew; afterwards the generators are as they were before it."""
    now = states_of(g for g, _ in states)
    try:
        set_states(states)
        yield
    finally:
        set_states(now)


def set_states(states: States) -> None:
    """The inverse of `states_of`."""
    for generator, state in states:
        if isinstance(generator, random.Random):
            generator.setstate(state)
        elif hasattr(generator, "set_state"):
            generator.set_state(state)
        else:
            source: Any = getattr(generator, "bit_generator", generator)
            source.state = state


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if hasattr(generator, "get_state"):  # a `numpy.random.RandomState`, with half of a pair of normal numbers
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def generators_of_all() -> list[Any]:
    """Those that ``random`` and ``numpy.random`` draw from, which nobody owns."""
    numpy = sys.modules.get("numpy.random")
    functions: list[Any] = [random.getstate, *([] if numpy is None else [numpy.get_state])]
    return [f.__self__ for f in functions]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(v, b[k]) for k, v in a.items())
    return bool((a == b).all()) if hasattr(a, "shape") else bool(a == b)
