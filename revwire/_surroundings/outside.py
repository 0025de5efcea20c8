"""What the code of modules may change outside of them: globals, enclosed variables, attributes of classes and plain
objects, and the containers, tensors and arrays that it names there. A recompute finds it as its forward did.

Note [What code may change]
    Where a name may be assigned to, or a container filled, is read from the code, once: from that of the modules, of
    their hooks, and of what these call, a few calls deep. Only names that the code has are looked at, so that a large
    configuration costs nothing that is never written to. What is written where no name shows it (by code that was
    compiled, or given as a string) is left for the checks to find.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter, is_
from threading import RLock
from types import CellType, CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from revwire._surroundings.attributes import MISSING, STANDARD, slots_of
from revwire._surroundings.code import (
    assigned_in,
    classes_of,
    code_within,
    functions_among,
    functions_of,
    is_filled,
    is_of_a_model,
    modules_named,
    named,
    names_in,
    package_of,
    packages_of,
)
from revwire._surroundings.generators import draws_from_all, is_generator, sets_back
from revwire._surroundings.noted import held_in, is_plain_object, may_be_written_to

EVERYWHERE = RLock()
"""Held by whoever runs code that may write outside of its modules, and while a recompute exchanges what stands there.
"""

_BY_TEXT = frozenset({"setattr", "delattr", "vars", "globals", "__dict__", "__setattr__"})
"""Names by which code assigns to what it has as text."""

_FILL = frozenset(
    {
        *("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem"),
        *("popleft", "remove", "reverse", "setdefault", "sort", "update", "__setitem__", "__delitem__", "__iadd__"),
        "data",
    }
)
"""Names by which code writes to a container or tensor; and all that end with one underscore."""

_CALLED = frozenset(
    {
        *("__call__", "__enter__", "__exit__", "__getattr__", "__getitem__", "__setitem__", "__delitem__", "__iadd__"),
        *("__ior__", "__iter__", "__next__", "__len__", "__contains__", "__bool__"),
    }
)
"""Methods that code calls without naming them."""

_CODE = (FunctionType, ModuleType, MemberDescriptorType, property, staticmethod, classmethod)


class Cell:
    """A table of one enclosed variable."""

    def __init__(self, owner: CellType) -> None:
        self.owner = owner

    def get(self, _: str, default: Any) -> Any:
        """Its value."""
        try:
            return self.owner.cell_contents
        except ValueError:  # it is empty
            return default

    def __setitem__(self, _: str, value: Any) -> None:
        self.owner.cell_contents = value

    def pop(self, _: str, default: Any) -> None:
        """Empty it."""
        if is_filled(self.owner):
            del self.owner.cell_contents


class Attributes:
    """A table of attributes that are no entries of a dict: those of a class or a function, and slots."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        # the attribute of a name, or a default; a class has none of those that it inherits
        self.get: Callable[[str, Any], Any] = vars(owner).get if isinstance(owner, type) else partial(getattr, owner)

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self.owner, (type, FunctionType)):
            setattr(self.owner, name, value)
        else:
            object.__setattr__(self.owner, name, value)  # the class may be frozen

    def pop(self, name: str, default: Any) -> None:
        """Take it away."""
        if self.get(name, MISSING) is not MISSING:
            delattr(self.owner, name)


class Writes(NamedTuple):
    """What code writes, by its instructions.

    Attributes:
        attributes, scope, cells: the names of attributes, globals and enclosed variables that it assigns to, or
            deletes.
        fills: whether it may write to containers and tensors.
        unseen: whether it may write to tensors behind their version counters.
    """

    attributes: frozenset[str]
    scope: frozenset[str]
    cells: frozenset[str]
    fills: bool
    unseen: bool

    @property
    def anything(self) -> bool:
        """Whether it may change anything that outlives it."""
        return bool(self.attributes or self.scope or self.cells or self.fills)


@lru_cache(maxsize=8192)
def writes_of(code: CodeType) -> Writes:
    """What code writes, with functions within it."""
    names = names_in(code)
    texts = _texts(code) if not _BY_TEXT.isdisjoint(names) else frozenset[str]()
    return Writes(
        assigned_in(code, "ATTR") | texts,
        assigned_in(code, "GLOBAL") | (texts if "globals" in names else frozenset()),
        assigned_in(code, "DEREF") & {*code.co_freevars},
        _fills(code) or not _FILL.isdisjoint(names) or any(n.endswith("_") and not n.endswith("__") for n in names),
        "data" in names,
    )


def _texts(code: CodeType) -> frozenset[str]:
    own = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(own).union(*map(_texts, code_within(code)))


def _fills(code: CodeType) -> bool:
    found = any(
        i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
        or i.opname.startswith("INPLACE_")  # before Python 3.11
        or (i.opname == "BINARY_OP" and i.argrepr.endswith("="))
        for i in dis.get_instructions(code)
    )
    return found or any(map(_fills, code_within(code)))


def put(values: Iterable[tuple[Any, Any, Any]]) -> None:
    """Let values stand at their places: (table, name, value)."""
    for table, name, value in values:
        if table.get(name, MISSING) is value:  # some cannot be assigned to
            continue
        if value is MISSING:
            table.pop(name, None)
        else:
            table[name] = value


Place = tuple[Any, Any]
"""(table, name) of what may change."""

_CONTENTS = attrgetter("cell_contents")


class Reads:
    """What stands at some places, read in one go: each branch of each forward does, and each recompute."""

    __slots__ = ("_cells", "_getters", "_names", "_places")

    def __init__(self, places: Iterable[Place]) -> None:
        cells, others = list[Place](), list[Place]()
        for table, name in places:
            (cells if isinstance(table, Cell) else others).append((table, name))
        self._places = [*cells, *others]
        self._cells = [cell.owner for cell, _ in cells]
        self._getters, self._names = [table.get for table, _ in others], [name for _, name in others]

    def now(self) -> list[Any]:
        """What stands there."""
        try:
            found = [*map(_CONTENTS, self._cells)]
        except ValueError:  # one is empty
            found = [table.get(name, MISSING) for table, name in self._places[: len(self._cells)]]
        found += [get(name, MISSING) for get, name in zip(self._getters, self._names, strict=True)]
        return found

    def differing(self, then: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """(table, name, what `now` gave then) where something else stands."""
        now = self.now()
        if all(map(is_, now, then)):
            return []
        found = zip(self._places, then, now, strict=True)
        return [(table, name, v) for (table, name), v, w in found if v is not w]


class Reached(NamedTuple):
    """What code may change.

    Attributes:
        places: where something stands outside of modules.
        reads: where something else stands that it names, which others may exchange, if it does.
        changes: whether it may change anything, modules and what they hold included.
        unseen: whether it may write to tensors behind their version counters.
        generators: those that it names, or that are in what it names.
        draws: whether it names what draws from the generators of Python and NumPy.
        sets_back: whether it names what sets torch's generators.
    """

    places: list[Place]
    reads: Reads | None
    changes: bool
    unseen: bool
    generators: list[Any]
    draws: bool
    sets_back: bool


NOTHING_REACHED = Reached([], None, False, False, [], False, False)
"""By code that changes nothing, and draws nothing."""


def reached(modules: Sequence[nn.Module]) -> Reached:
    """What the code of these modules, and what it calls, may change, and draw from."""
    functions, objects, held = _named_by(modules)
    running = [f for f in functions if f.__name__ != "__init__"]  # which writes to what is new
    writes = [writes_of(f.__code__) for f in running]
    changes = any(w.anything for w in writes)
    kinds = chain((v for f in functions for v in named(f) if isinstance(v, type)), map(type, (*modules, *objects)))
    classes = {base for kind in {*kinds} for base in kind.__mro__ if is_of_a_model(base)}
    places = _places(classes, functions, objects, writes) if changes else {}
    reads = [place for at, place in _by_identity(_reads(classes, running, objects)).items() if at not in places]
    return Reached(
        [*places.values()],
        Reads(reads) if reads else None,
        changes,
        any(w.unseen for w in writes),
        [*filter(is_generator, held)],
        any(map(draws_from_all, functions)),
        any(map(sets_back, functions)),
    )


def _by_identity(places: Iterable[Place]) -> dict[tuple[int, str], Place]:
    return {(id(getattr(table, "owner", table)), name): (table, name) for table, name in places}


def _places(
    classes: Iterable[type], functions: list[FunctionType], objects: list[Any], writes: list[Writes]
) -> dict[tuple[int, str], Place]:
    """Where these functions may change something outside of modules."""
    stored = frozenset[str]().union(*(w.attributes for w in writes))
    names = frozenset[str]().union(*(names_in(f.__code__) for f in functions))
    look = _Look(stored, names, any(w.fills for w in writes))
    found = [(Attributes(kind), n) for kind in classes for n in look.at(vars(kind))]
    for f in functions:
        found += [*_globals_of(f, look), *_own_of(f, look)]
    found += _of_objects(objects, look, {*map(id, functions)})
    return _by_identity(found)


def _reads(classes: Iterable[type], functions: list[FunctionType], objects: list[Any]) -> Iterator[Place]:
    """Where something stands that these functions name: settings, globals, enclosed variables."""
    names = frozenset[str]().union(*(names_in(f.__code__) for f in functions))
    for kind in classes:
        yield from ((Attributes(kind), n) for n, v in vars(kind).items() if n in names and _is_setting(n, v))
    for f in functions:
        scope = f.__globals__
        yield from ((scope, n) for n in names_in(f.__code__) if n in scope and _is_setting(n, scope[n]))
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if is_filled(cell) and _is_setting(name, cell.cell_contents):
                yield Cell(cell), name
    for v in objects:
        own: dict[str, Any] = getattr(v, "__dict__", {})
        yield from ((own, n) for n in names.intersection(own) if _is_setting(n, own[n]))
        yield from ((Attributes(v), n) for n, value in slots_of(v).items() if n in names and _is_setting(n, value))


def _is_setting(name: str, value: Any) -> bool:
    """Whether this may be exchanged while a model trains: no code, nor a tensor, which may be of a graph."""
    return name[:2] != "__" and not (callable(value) or isinstance(value, (*_CODE, Tensor)))


class _Look(NamedTuple):
    """Which names are looked at: those that are ``stored`` to, and those ``named`` of what may be filled."""

    stored: frozenset[str]
    named: frozenset[str]
    fills: bool

    def at(self, table: Mapping[str, Any], missing: frozenset[str] = frozenset()) -> list[str]:
        """The names of a table; those ``missing`` in it too."""
        found = [n for n, v in table.items() if n[:2] != "__" and self.takes(n, v)]
        return [*found, *(n for n in missing if n not in table)]

    def takes(self, name: str, value: Any) -> bool:
        """Whether this is looked at by the name that it has."""
        if isinstance(value, _CODE):
            return False
        return name in self.stored or (self.fills and name in self.named and may_be_written_to(value))


def _of_objects(objects: Iterable[Any], look: _Look, called: set[int]) -> list[Place]:
    """Attributes of plain objects, also those that methods which are ``called`` add to them."""
    added, found = dict[type, frozenset[str]](), list[Place]()
    for v in objects:
        if type(v) not in added:
            added[type(v)] = _stored_by(type(v), called)
        if hasattr(v, "__dict__"):
            found += [(vars(v), n) for n in look.at(vars(v), missing=added[type(v)])]
        found += [(Attributes(v), n) for n in look.at(slots_of(v))]
    return found


def _stored_by(kind: type, called: set[int]) -> frozenset[str]:
    members = [v for base in kind.__mro__ if is_of_a_model(base) for v in vars(base).values()]
    methods = (m for m in functions_among(members, calls=1) if id(m) in called and m.__name__ != "__init__")
    stored = frozenset[str]().union(*(writes_of(m.__code__).attributes for m in methods))
    return frozenset(n for n in stored if not hasattr(kind, n))  # such as have a setter


def _globals_of(function: FunctionType, look: _Look) -> Iterator[Place]:
    """What a function may change by its globals, and in Python modules that it names."""
    code, scope = function.__code__, function.__globals__
    yield from ((scope, name) for name in writes_of(code).scope)
    if look.fills:
        yield from ((scope, n) for n in names_in(code) if may_be_written_to(scope.get(n)))
    for module in modules_named(function):
        yield from ((vars(module), name) for name in look.at(vars(module)))


def _own_of(function: FunctionType, look: _Look) -> Iterator[Place]:
    """What a function may change by its enclosed variables, by defaults of its arguments, and of its attributes."""
    stored = writes_of(function.__code__).cells
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name in stored or (look.fills and is_filled(cell) and may_be_written_to(cell.cell_contents)):
            yield Cell(cell), name
    yield from ((vars(function), name) for name in look.at(vars(function)))
    if look.fills:
        if may_be_written_to(function.__defaults__):
            yield Attributes(function), "__defaults__"
        table = function.__kwdefaults__ or {}
        yield from ((table, name) for name, value in table.items() if may_be_written_to(value))


def _named_by(modules: Sequence[nn.Module]) -> tuple[list[FunctionType], list[Any], list[Any]]:
    """The functions that may run when modules do; the plain objects that these may name, or that modules have, with
    those of their methods that the functions name; and all else that they name.
    """
    functions = functions_of(modules)
    packages = {*packages_of(modules), *map(package_of, functions)}
    values = [
        *(v for m in modules for k, v in vars(m).items() if k not in STANDARD),
        *chain.from_iterable(map(named, functions)),
        *chain.from_iterable(vars(kind).values() for kind in classes_of(modules)),
    ]
    objects = [v for v in held_in(values, packages) if is_plain_object(v, packages)]
    names = _CALLED.union(*(names_in(f.__code__) for f in functions))
    kinds = {base for kind in {*map(type, objects)} for base in kind.__mro__ if is_of_a_model(base)}
    methods = functions_among([m for kind in kinds for n, m in vars(kind).items() if n in names], calls=1)
    held = held_in([*values, *chain.from_iterable(map(named, methods))], packages)
    return [*{id(f): f for f in (*functions, *methods)}.values()], objects, held
