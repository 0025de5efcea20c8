"""What the modules of a branch hold besides weights, and may change in a forward: generators, attributes, buffers.

Note [What modules hold]
    A recompute must find all of it as the forward did, and leave no trace. Which attributes may change is looked up
    once, and again when the modules are others or have more or fewer attributes (`Known`); a branch that has none pays
    for one comparison. Of a tensor the version counter tells whether a forward wrote to it; a copy is made beforehand
    if it is small, or was seen to be written to before, as in the run of an example. Arrays and containers are copied;
    of long lists and dicts, what was added since is left out. What is large, was never written to before, and is read
    by the same branch, is left for the checks to find; so are items of long lists and dicts that are replaced, and what
    plain objects (a config) hold, but for generators.
    Floating-point buffers in train mode, and those of normalisation, are `buffers`' business; here are the others:
    those of modules in eval mode, those that are None, and integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revwire._surroundings.attributes import MISSING, contents_of, refill, refilled, slots_of
from revwire._surroundings.code import classes_of, functions_of, is_of_torch, named, names_kept, packages_of
from revwire._surroundings.generators import (
    States,
    code_draws_from_all,
    code_sets_back,
    drawn_from,
    generators_at,
    generators_in,
    generators_of_all,
    generators_of_class,
    is_generator,
    set_states,
    states_of,
)
from revwire._surroundings.inventory import Inventory, is_written, size_of, version_of
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.noted import (
    SMALL,
    again,
    differs,
    held_in,
    is_array,
    is_container,
    is_object_of,
    is_written_to,
    may_change,
    note_write,
    noted,
    was_changed,
)
from revwire._torch import CALL, REPLICATE, ModuleWithStatistics

_STANDARD = frozenset((*vars(nn.Module()), "forward", "compile", CALL, REPLICATE))
"""Attributes that every module has, or a converted one."""


class Place(NamedTuple):
    """Where something stands that may change.

    Attributes:
        module: the identity of its module.
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
        modules, size: their identities, in order, and their `size_of`, by which they are known again.
        places: where something may change.
        names: all names of attributes and buffers, by the identity of the module.
        generators: those of classes, and of the code of their methods.
        draws: whether this code names what draws from the generators of Python and NumPy.
        sets_back: whether it names what sets torch's generators.
    """

    modules: list[int]
    size: int
    places: tuple[Place, ...]
    names: dict[int, frozenset[str]]
    generators: list[Any]
    draws: bool
    sets_back: bool

    @classmethod
    def of(cls, owned: Inventory) -> Found:
        """What these modules have now."""
        classes = classes_of(owned.modules.values())
        return cls(
            [*owned.modules],
            owned.size,
            tuple(place for m in owned.modules.values() for place in _places(m)),
            {i: frozenset((*vars(m), *_buffers(m))) for i, m in owned.modules.items()},
            [g for kind in classes for g in generators_of_class(kind)],
            any(map(code_draws_from_all, classes)),
            any(map(code_sets_back, classes)),
        )


class Known:
    """What was found in the modules of a branch, as long as these are the same.

    Attributes:
        draws: in eval and in train mode, whether a forward draws from the generators of Python and NumPy: not known
            before the first one; then, where the code says so, or once one was seen to.
    """

    __slots__ = ("draws", "last")

    def __init__(self) -> None:
        self.last: Found | None = None
        self.draws: list[bool | None] = [None, None]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other modules."""
        return Known, ()

    def found(self, owned: Inventory) -> Found:
        """What these modules have; looked up if they are others."""
        last = self.last
        if last is None or last.size != owned.size or last.modules != [*owned.modules]:
            last = self.last = Found.of(owned)
        return last


def _places(module: nn.Module) -> Iterator[Place]:
    for name, value in () if is_of_torch(type(module)) else vars(module).items():  # theirs are settings
        if name not in _STANDARD:
            draws = next(generators_in(value), None) is not None
            if draws or may_change(value):
                yield Place(id(module), False, name, draws)
    for name, buffer in _buffers(module).items():
        if not isinstance(module, ModuleWithStatistics) or (buffer is not None and not is_written(buffer)):
            yield Place(id(module), True, name, False)


def _table(module: nn.Module, is_buffer: bool) -> dict[str, Any]:
    return _buffers(module) if is_buffer else vars(module)


def _buffers(module: nn.Module) -> dict[str, Any]:
    """Its buffers; those of a scripted module, whose table is no dict, are `buffers`' business alone."""
    buffers = module._buffers
    return buffers if isinstance(buffers, dict) else {}


Standing = tuple[nn.Module, bool, str, Any]
"""(module, whether it is a buffer, name, value)."""


@dataclass(slots=True)
class Held:
    """What a forward found.

    Attributes:
        owned: the modules of the branch.
        names: of all that they had.
        values: what stood where, as `noted`.
        generators: those that may draw, with their states.
        sets_back: whether it may set torch's generators back, so that it does not show what it drew from them.
    """

    owned: Inventory
    names: dict[int, frozenset[str]]
    values: Sequence[Standing]
    generators: States
    sets_back: bool = False

    @classmethod
    def by(cls, known: Known, owned: Inventory, assigned: Sequence[tuple[nn.Module, str]], training: bool) -> Held:
        """What the modules of a branch hold now; ``assigned``: attributes that it was seen to assign to."""
        found, drawn = known.found(owned), known.draws[training]
        if drawn is False and not (found.generators or found.places or assigned):  # the usual case
            return cls(owned, found.names, (), (), found.sets_back)
        drawing = [*found.generators, *(() if drawn is False else generators_of_all())]
        values = list[Standing]()
        for number, is_buffer, name, draws in found.places:
            module = owned.modules[number]
            value = _table(module, is_buffer).get(name, MISSING)
            if draws or is_generator(value):
                drawing.extend(generators_in(value))
            elif is_buffer and module.training and isinstance(value, Tensor) and value.is_floating_point():
                continue
            values.append((module, is_buffer, name, noted(value)))
        values += [(m, False, name, noted(vars(m).get(name, MISSING))) for m, name in assigned]
        return cls(owned, found.names, values, states_of(drawing) if drawing else [], found.sets_back)

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
        values = ((then, _table(m, is_buffer).get(name, MISSING)) for m, is_buffer, name, then in self.values)
        return bool(drawn_from(self.generators)) or any(was_changed(then, now) for then, now in values)

    @property
    def may_differ(self) -> bool:
        """Whether a recompute might find another state."""
        return bool(self.values or self.generators) or size_of(self.owned.modules.values()) != self.owned.size

    @contextmanager
    def found_again(self) -> Iterator[None]:
        """Let a recompute find all as the forward did, and leave no trace."""
        changed = [
            (module, is_buffer, name, again(then))
            for module, is_buffer, name, then in self.values
            if differs(then, _table(module, is_buffer).get(name, MISSING))
        ]
        with (
            generators_at(self.generators) if self.generators else NOTHING,
            _standing([*changed, *self._new()]),
        ):
            yield

    def _new(self) -> list[Standing]:
        """What was not there in forward, as missing."""
        return [
            (module, is_buffer, name, MISSING)
            for number, module in self.owned.modules.items()
            for is_buffer in (False, True)
            for name in _table(module, is_buffer)
            if name not in self.names[number] and name not in _STANDARD
        ]


NO_HOLDINGS = Held(Inventory.of(()), {}, (), ())
"""Those of no modules."""


@contextmanager
def _standing(values: Sequence[Standing]) -> Iterator[None]:
    """Let values stand at their places, and put back what stood there."""
    tables = [(_table(m, is_buffer), name, value) for m, is_buffer, name, value in values]
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
def holdings_kept(root: nn.Module, *, filled: bool = True) -> Iterator[None]:
    """Undo what a run does to what modules hold: generators of their own, tensors and arrays among their attributes,
    and what containers and plain objects, theirs and those that their code names, are ``filled`` with; and what their
    code, hooks included, assigns to globals and classes. (Assignments to modules are undone by `attributes_kept`.)
    """
    modules = [*root.modules()]
    classes, functions, packages = classes_of(modules), functions_of(modules), packages_of(modules)
    attributes = [v for m in modules for k, v in vars(m).items() if k not in _STANDARD]
    of_classes = [g for kind in classes for g in generators_of_class(kind)]
    states = states_of([*chain.from_iterable(map(generators_in, attributes)), *of_classes])
    buffers = [(b, version_of(b)) for b in root.buffers()]
    values = held_in(attributes, packages)
    outside = held_in(chain(*map(named, functions), *(vars(kind).values() for kind in classes)), packages)
    fillable = [*values, *outside] if filled else []
    containers = [(v, contents_of(v)) for v in fillable if is_container(v)]
    objects = [v for v in fillable if is_object_of(v, packages)]
    small = [v for v in outside if not isinstance(v, Tensor) or v.numel() <= SMALL]
    with (
        _written_undone([*values, *small]),
        _weights_kept([*root.parameters()]),
        names_kept(functions, classes),
        _slots_kept(objects),
    ):
        try:
            yield
        finally:
            set_states(states)
            for b, version in buffers:
                if version_of(b) != version:
                    note_write(b)
            for container, contents in containers:
                if refilled([(container, contents)]):
                    refill(container, contents)


@contextmanager
def _weights_kept(weights: Sequence[Tensor]) -> Iterator[None]:
    """Undo what is assigned to ``weight.data``, and what is written to those that a run was seen to write to. (Of the
    run that sees it, the recorder undoes that.)
    """
    plain = [p for p in weights if type(p) is nn.Parameter and p.layout == torch.strided]  # others belong to sharding
    kept = [(p, p.detach(), p.detach().clone() if is_written_to(p) else None) for p in plain]
    try:
        yield
    finally:
        for p, then, copy in kept:
            if p.data_ptr() != then.data_ptr() and then.untyped_storage().size():
                note_write(p)
                p.data = then
            if copy is not None:
                p.data.copy_(copy)


@contextmanager
def _slots_kept(objects: Iterable[Any]) -> Iterator[None]:
    kept = [(v, slots_of(v)) for v in objects]
    try:
        yield
    finally:
        for v, fields in kept:
            for name in slots_of(v).keys() - fields.keys():
                object.__delattr__(v, name)  # the class may be frozen
            for name, value in fields.items():
                object.__setattr__(v, name, value)


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
                    note_write(t)
                    t.copy_(kept)
        for array, kept in arrays:
            array[...] = kept
