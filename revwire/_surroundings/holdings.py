"""What the modules of a branch hold besides weights, and may change in a forward: generators, attributes, buffers.

Note [What modules hold]
    A recompute must find all of it as the forward did, and leave no trace. Which attributes may change is looked up
    once, and again when the modules are others or have more or fewer attributes (`Known`); a branch that has none pays
    for one comparison. Of a tensor the version counter tells whether a forward wrote to it; a copy is made beforehand
    if it is small, or was written to before. Containers are copied as long as they are short, arrays always. What is
    written to by a forward for the first time, is large, and is read by the same branch, is left for the checks to
    find; so is what plain objects (a config) hold, but for generators.
    Buffers in train mode are `buffers`' business, where they are of the kind that is usually written; here are the
    others: those of modules in eval mode, those that are None, and integers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from revwire._surroundings.attributes import MISSING
from revwire._surroundings.generators import (
    States,
    drawn_from,
    generators_at,
    generators_in,
    generators_of_all,
    generators_of_class,
    set_states,
    states_of,
)
from revwire._surroundings.inventory import Inventory, is_written, size_of, version_of
from revwire._surroundings.modes import NOTHING
from revwire._torch import ModuleWithStatistics

_SMALL = 2**16
"""Elements of a tensor that is copied before a forward that may write to it."""

_SHORT = 256
"""Items of a container that is copied before a forward."""

_DEPTH = 3
"""How many containers may stand in one another."""

_CONTAINERS = (list, dict, set, deque, bytearray)
_STANDARD = frozenset(vars(nn.Module()))


class Place(NamedTuple):
    """Where something stands that may change: the number of its module, whether it is a buffer, and its name."""

    module: int
    is_buffer: bool
    name: str


class Found(NamedTuple):
    """What the modules of a branch were found to have.

    Attributes:
        seen, size: by which it is known that these are the modules, as in `Inventory`.
        places: where something may change.
        names: all names of attributes and buffers, module by module.
        generators: those of classes, and of the code of their methods.
    """

    seen: set[int]
    size: int
    places: tuple[Place, ...]
    names: list[frozenset[str]]
    generators: list[Any]

    @classmethod
    def of(cls, owned: Inventory) -> Found:
        """What these modules have now."""
        numbers = {id(m): i for i, m in reversed([*enumerate(owned.modules)])}
        modules = [(i, m) for i, m in enumerate(owned.modules) if m is not None and numbers[id(m)] == i]
        names = [frozenset[str]() if m is None else frozenset((*vars(m), *m._buffers)) for m in owned.modules]
        classes = {base for _, m in modules for base in type(m).__mro__ if issubclass(base, nn.Module)}
        return cls(
            owned.seen,
            owned.size,
            tuple(place for i, m in modules for place in _places(i, m)),
            names,
            [g for base in classes for g in generators_of_class(base)],
        )


class Known:
    """What was found in the modules of a branch, as long as these are the same."""

    __slots__ = ("draws", "last")

    def __init__(self) -> None:
        self.last: Found | None = None
        self.draws = [True, True]  # from the generators of Python and NumPy, in eval and in train mode

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other modules."""
        return Known, ()

    def found(self, owned: Inventory) -> Found:
        """What these modules have; looked up if they are others."""
        last = self.last
        if last is None or last.size != owned.size or last.seen != owned.seen:
            last = self.last = Found.of(owned)
        return last


def _places(number: int, module: nn.Module) -> Iterator[Place]:
    for name, value in vars(module).items():
        if name not in _STANDARD and _may_change(value):
            yield Place(number, False, name)
    for name, buffer in module._buffers.items():
        if not isinstance(module, ModuleWithStatistics) or (buffer is not None and not is_written(buffer)):
            yield Place(number, True, name)


def _may_change(value: Any) -> bool:
    if value is None or isinstance(value, (Tensor, *_CONTAINERS)) or _is_array(value):
        return not isinstance(value, nn.Parameter)
    return next(generators_in(value), None) is not None


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


class _Quiet(dict[int, Any]):
    """Tensors that a forward did not write to, by identity."""

    def note(self, t: Tensor) -> None:
        number = id(t)
        self[number] = ref(t, lambda _: self.pop(number, None))

    def has(self, t: Tensor) -> bool:
        known = self.get(id(t))
        return known is not None and known() is t


_QUIET = _Quiet()


class HeldTensor:
    """A tensor as a forward found it."""

    __slots__ = ("alias", "clone", "original", "requires_grad", "version")

    def __init__(self, t: Tensor) -> None:
        self.original, self.alias = ref(t), t.detach()  # it owns no graph
        self.requires_grad, self.version = t.requires_grad, version_of(t)
        self.clone = self.alias.clone() if t.numel() <= _SMALL and not _QUIET.has(t) else None

    @property
    def written(self) -> bool:
        """Whether somebody wrote to it since, as far as can be told."""
        return self.version == -1 or version_of(self.alias) != self.version

    def differs(self, now: Any) -> bool:
        """Whether another one stands there now, or this one was written to."""
        if self.written:
            _QUIET.pop(id(now), None)
        elif now is not None and now is self.original():
            _QUIET.note(now)  # type: ignore[arg-type]
            return False
        return True

    def again(self) -> Tensor:
        """A tensor for one recompute; one that the forward wrote to is a copy, which the recompute may write to."""
        now = self.original()
        if self.written:
            return (self.alias if self.clone is None else self.clone).clone().requires_grad_(self.requires_grad)
        return now if now is not None and now.is_leaf else self.alias.detach().requires_grad_(self.requires_grad)


class HeldContainer(NamedTuple):
    """A long container as a forward found it: if it grows or shrinks, that is seen."""

    container: Any
    length: int


def _noted(value: Any, depth: int = _DEPTH) -> Any:
    """A value as the forward finds it."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else HeldTensor(value)
    if _is_array(value):
        return value.copy()
    if not depth or not isinstance(value, _CONTAINERS):
        return value
    if len(value) > _SHORT:
        return HeldContainer(value, len(value))
    return _filled(value, lambda item: _noted(item, depth - 1))


def _differs(noted: Any, now: Any) -> bool:
    """Whether a recompute must not find, or must not write to, what stands there now."""
    if isinstance(noted, HeldTensor):
        return noted.differs(now)
    if isinstance(noted, HeldContainer):
        return now is not noted.container or len(now) != noted.length
    return now is not noted  # always so for copies


def _was_changed(noted: Any, now: Any) -> bool:
    """As `_differs`, but for containers and arrays that hold the same."""
    if _is_array(noted):
        return type(now) is not type(noted) or now.tobytes() != noted.tobytes()
    if not isinstance(noted, _CONTAINERS):
        return _differs(noted, now)
    if type(now) is not type(noted) or len(now) != len(noted):
        return True
    if isinstance(noted, dict) and isinstance(now, dict):
        return noted.keys() != now.keys() or any(_was_changed(v, now[k]) for k, v in noted.items())
    if isinstance(noted, (list, deque)):
        return any(map(_was_changed, noted, now))
    return bool(noted != now)


def _again(value: Any, depth: int = _DEPTH) -> Any:
    """A value that was noted, for one recompute to find."""
    if isinstance(value, HeldTensor):
        return value.again()
    if isinstance(value, HeldContainer):
        return copy(value.container)
    if _is_array(value):
        return value.copy()
    if not depth or not isinstance(value, _CONTAINERS):
        return value
    return _filled(value, lambda item: _again(item, depth - 1))


def _filled(container: Any, item: Callable[[Any], Any]) -> Any:
    """A container of the same kind with ``item`` of what it holds."""
    out = copy(container)
    if isinstance(out, dict):
        for key, value in out.items():
            dict.__setitem__(out, key, item(value))
    elif isinstance(out, (list, deque)):
        for i, value in enumerate(out):
            out[i] = item(value)
    return out


Standing = tuple[nn.Module, bool, str, Any]
"""(module, whether it is a buffer, name, value)."""


@dataclass(slots=True)
class Held:
    """What a forward found.

    Attributes:
        modules: of the branch.
        size: how many attributes and buffers they had.
        names: of all of them.
        values: what stood where, as `_noted`.
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
        drawing = [*found.generators, *(generators_of_all() if known.draws[training] else ())]
        values = list[Standing]()
        for number, is_buffer, name in found.places:
            module = owned.modules[number]
            assert module is not None
            value = (module._buffers if is_buffer else vars(module)).get(name, MISSING)
            if not isinstance(value, Tensor):
                drawing.extend(generators_in(value))
            elif is_buffer and module.training and is_written(value):
                continue
            values.append((module, is_buffer, name, _noted(value)))
        values += [(m, False, name, _noted(vars(m).get(name, MISSING))) for m, name in assigned]
        return cls(owned.modules, owned.size, found.names, values, states_of(drawing) if drawing else [])

    @property
    def holders(self) -> list[nn.Module]:
        """The modules in which a recompute may exchange something."""
        return [module for module, *_ in self.values]

    def settle(self, known: Known, training: bool) -> None:
        """After the forward: forget the generators that it did not draw from."""
        if self.generators:
            self.generators = drawn_from(self.generators)
        if known.draws[training]:
            shared = generators_of_all()
            known.draws[training] = any(g is s for g, _ in self.generators for s in shared)

    def was_changed(self) -> bool:
        """Whether a run since drew from generators, or wrote to anything."""
        values = (
            (noted, (m._buffers if is_buffer else vars(m)).get(name, MISSING))
            for m, is_buffer, name, noted in self.values
        )
        return bool(drawn_from(self.generators)) or any(_was_changed(noted, now) for noted, now in values)

    @property
    def may_differ(self) -> bool:
        """Whether a recompute might find another state."""
        return bool(self.values or self.generators) or size_of(self.modules) != self.size

    @contextmanager
    def found_again(self) -> Iterator[None]:
        """Let a recompute find all as the forward did, and leave no trace."""
        changed = [
            (module, is_buffer, name, _again(noted))
            for module, is_buffer, name, noted in self.values
            if _differs(noted, (module._buffers if is_buffer else vars(module)).get(name, MISSING))
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
            if name not in names
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
    classes = {base for m in root.modules() for base in type(m).__mro__ if issubclass(base, nn.Module)}
    generators = [g for v in attributes if not isinstance(v, Tensor) for g in generators_in(v)]
    states = states_of([*generators, *(g for base in classes for g in generators_of_class(base))])
    tensors = [t for v in attributes for t in _leaves(v) if isinstance(t, Tensor) and not t.is_inference()]
    copies = [(t, t._version, t.detach().clone()) for t in tensors if not isinstance(t, nn.Parameter)]
    arrays = [(a, a.copy()) for v in attributes for a in _leaves(v) if _is_array(a)]
    try:
        yield
    finally:
        set_states(states)
        with torch.no_grad():
            for t, version, kept in copies:
                if t._version != version:
                    t.copy_(kept)
            for array, kept in arrays:
                array[...] = kept


def _leaves(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    if depth and isinstance(value, dict):
        for item in list(value.values()):
            yield from _leaves(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, deque)):
        for item in list(value):
            yield from _leaves(item, depth - 1)
    else:
        yield value
