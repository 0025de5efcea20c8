"""What the modules of a branch hold besides weights, and may change in a forward: generators, attributes, buffers.

Note [What modules hold]
    A recompute must find all of it as the forward did, and leave no trace. Which attributes may change is looked up
    once, and again when the modules are others or have more or fewer attributes (`Known`); a branch that has none pays
    for one comparison. Of a tensor the version counter tells whether a forward wrote to it; a copy is made beforehand
    if it is small, or was written to before. Arrays and containers are copied; of long lists and dicts, what was added
    since is left out. What is written to by a forward for the first time, is large, and is read by the same branch, is
    left for the checks to find; so are items of long lists and dicts that are replaced, and what plain objects (a
    config) hold, but for generators.
    Buffers in train mode are `buffers`' business, where they are of the kind that is usually written; here are the
    others: those of modules in eval mode, those that are None, and integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revwire._surroundings.attributes import MISSING
from revwire._surroundings.generators import (
    States,
    code_draws_from_all,
    drawn_from,
    generators_at,
    generators_in,
    generators_of_all,
    generators_of_class,
    is_generator,
    set_states,
    states_of,
)
from revwire._surroundings.inventory import Inventory, is_written, size_of
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.noted import again, differs, is_array, leaves, may_change, noted, was_changed
from revwire._torch import ModuleWithStatistics

_STANDARD = frozenset((*vars(nn.Module()), "forward"))
"""Attributes that every module has, or a converted one."""


class Place(NamedTuple):
    """Where something stands that may change.

    Attributes:
        module: the number of its module.
        is_buffer, name: in which table, and by which name.
        draws: whether there are generators in it.
    """

    module: int
    is_buffer: bool
    name: str
    draws: bool


class Found(NamedTuple):
    """What the modules of a branch were found to have.

    Attributes:
        seen, size, length: by which it is known that these are the modules.
        places: where something may change.
        names: all names of attributes and buffers, module by module.
        generators: those of classes, and of the code of their methods.
        draws: whether this code names what draws from the generators of Python and NumPy.
    """

    seen: set[int]
    size: int
    length: int
    places: tuple[Place, ...]
    names: list[frozenset[str]]
    generators: list[Any]
    draws: bool

    @classmethod
    def of(cls, owned: Inventory) -> Found:
        """What these modules have now."""
        numbers = {id(m): i for i, m in reversed([*enumerate(owned.modules)])}
        modules = [(i, m) for i, m in enumerate(owned.modules) if m is not None and numbers[id(m)] == i]
        names = [frozenset[str]() if m is None else frozenset((*vars(m), *m._buffers)) for m in owned.modules]
        classes = _classes(m for _, m in modules)
        return cls(
            owned.seen,
            owned.size,
            len(owned.modules),
            tuple(place for i, m in modules for place in _places(i, m)),
            names,
            [g for kind in classes for g in generators_of_class(kind)],
            any(map(code_draws_from_all, classes)),
        )

    def is_of(self, owned: Inventory) -> bool:
        """Whether these are the modules, with as many attributes."""
        return self.size == owned.size and self.length == len(owned.modules) and self.seen == owned.seen


class Known:
    """What was found in the modules of a branch, as long as these are the same."""

    __slots__ = ("draws", "last")

    def __init__(self) -> None:
        self.last: Found | None = None
        self.draws: list[bool | None] = [None, None]  # from Python's and NumPy's generators, in eval and in train mode

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other modules."""
        return Known, ()

    def found(self, owned: Inventory) -> Found:
        """What these modules have; looked up if they are others."""
        last = self.last
        if last is None or not last.is_of(owned):
            last = self.last = Found.of(owned)
        return last

    def may_draw(self, training: bool) -> bool:
        """Whether a forward may draw from the generators of Python and NumPy: the first of its mode, those whose code
        says so, and all once one was seen to.
        """
        return self.draws[training] is not False


def _classes(modules: Iterator[nn.Module]) -> set[type]:
    """The classes of modules, and those that they inherit from, which are not PyTorch's."""
    classes = {base for m in modules for base in type(m).__mro__ if issubclass(base, nn.Module)}
    return {kind for kind in classes if not _is_of_torch(kind)}


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def _places(number: int, module: nn.Module) -> Iterator[Place]:
    for name, value in () if _is_of_torch(type(module)) else vars(module).items():  # theirs are settings
        if name not in _STANDARD:
            draws = next(generators_in(value), None) is not None
            if draws or may_change(value):
                yield Place(number, False, name, draws)
    for name, buffer in module._buffers.items():
        if not isinstance(module, ModuleWithStatistics) or (buffer is not None and not is_written(buffer)):
            yield Place(number, True, name, False)


Standing = tuple[nn.Module, bool, str, Any]
"""(module, whether it is a buffer, name, value)."""


@dataclass(slots=True)
class Held:
    """What a forward found.

    Attributes:
        modules: of the branch.
        size: how many attributes and buffers they had.
        names: of all of them.
        values: what stood where, as `noted`.
        generators: those that may draw, with their states.
    """

    modules: list[nn.Module | None]
    size: int
    names: list[frozenset[str]]
    values: list[Standing]
    generators: States

    @classmethod
    def by(cls, known: Known, owned: Inventory, assigned: Sequence[tuple[nn.Module, str]], training: bool) -> Held:
        """What the modules of a branch hold now; ``assigned``: attributes that it was seen to assign to."""
        found = known.found(owned)
        drawing = [*found.generators, *(generators_of_all() if known.may_draw(training) else ())]
        values = list[Standing]()
        for number, is_buffer, name, draws in found.places:
            module = owned.modules[number]
            if module is None:  # another order of the same modules
                continue
            value = (module._buffers if is_buffer else vars(module)).get(name, MISSING)
            if draws or is_generator(value):
                drawing.extend(generators_in(value))
            elif is_buffer and module.training and isinstance(value, Tensor) and is_written(value):
                continue
            values.append((module, is_buffer, name, noted(value)))
        values += [(m, False, name, noted(vars(m).get(name, MISSING))) for m, name in assigned]
        return cls(owned.modules, owned.size, found.names, values, states_of(drawing) if drawing else [])

    @property
    def holders(self) -> list[nn.Module]:
        """The modules in which a recompute may exchange something."""
        return [module for module, *_ in self.values]

    def settle(self, known: Known, training: bool) -> None:
        """After the forward: forget the generators that it did not draw from."""
        if self.generators:
            self.generators = drawn_from(self.generators)
        if known.draws[training] is None:
            shared = generators_of_all()
            drawn = any(g is s for g, _ in self.generators for s in shared)
            known.draws[training] = drawn or (known.last is not None and known.last.draws)

    def was_changed(self) -> bool:
        """Whether a run since drew from generators, or wrote to anything."""
        values = (
            (then, (m._buffers if is_buffer else vars(m)).get(name, MISSING))
            for m, is_buffer, name, then in self.values
        )
        return bool(drawn_from(self.generators)) or any(was_changed(then, now) for then, now in values)

    @property
    def may_differ(self) -> bool:
        """Whether a recompute might find another state."""
        return bool(self.values or self.generators) or size_of(self.modules) != self.size

    @contextmanager
    def found_again(self) -> Iterator[None]:
        """Let a recompute find all as the forward did, and leave no trace."""
        changed = [
            (module, is_buffer, name, again(then))
            for module, is_buffer, name, then in self.values
            if differs(then, (module._buffers if is_buffer else vars(module)).get(name, MISSING))
        ]
        with (
            generators_at(self.generators) if self.generators else NOTHING,
            _standing([*changed, *self._new()]) if changed or size_of(self.modules) != self.size else NOTHING,
        ):
            yield

    def _new(self) -> list[Standing]:
        """What was not there in forward, as missing."""
        pairs = [(m, names) for m, names in zip(self.modules, self.names, strict=True) if m is not None]
        return [
            (module, is_buffer, name, MISSING)
            for module, names in {id(m): (m, names) for m, names in pairs}.values()
            for is_buffer in (False, True)
            for name in (module._buffers if is_buffer else vars(module))
            if name not in names and name not in _STANDARD
        ]


@contextmanager
def _standing(values: Sequence[Standing]) -> Iterator[None]:
    """Let values stand at their places, and put back what stood there."""
    tables = [(m._buffers if is_buffer else vars(m), name, value) for m, is_buffer, name, value in values]
    now = [(table, name, table.get(name, MISSING)) for table, name, _ in tables]
    try:
        for table, name, value in tables:
            _put(table, name, value)
        yield
    finally:
        for table, name, value in reversed(now):
            _put(table, name, value)


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is MISSING:
        table.pop(name, None)
    else:
        table[name] = value


@contextmanager
def holdings_kept(root: nn.Module) -> Iterator[None]:
    """Undo what a run does to what modules hold: generators of their own, tensors and arrays among their attributes.
    (Assignments, and what containers are filled with, are undone by `attributes_kept`.)
    """
    attributes = [v for m in root.modules() for k, v in vars(m).items() if k not in _STANDARD]
    of_classes = [g for kind in _classes(root.modules()) for g in generators_of_class(kind)]
    states = states_of([*chain.from_iterable(map(generators_in, attributes)), *of_classes])
    with _written_undone([leaf for v in attributes for leaf in leaves(v)]):
        try:
            yield
        finally:
            set_states(states)


@contextmanager
def _written_undone(values: list[Any]) -> Iterator[None]:
    tensors = [t for t in values if isinstance(t, Tensor) and not (isinstance(t, nn.Parameter) or t.is_inference())]
    copies = [(t, t._version, t.detach().clone()) for t in tensors]
    arrays = [(a, a.copy()) for a in values if is_array(a) and a.flags.writeable]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, version, kept in copies:
                if t._version != version:
                    t.copy_(kept)
        for array, kept in arrays:
            array[...] = kept
