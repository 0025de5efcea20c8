"""What the code of modules names outside of them: globals, enclosed variables, attributes of classes."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from revwire._surroundings.attributes import MISSING

_NOT_THEIRS = frozenset((*sys.stdlib_module_names, "numpy", "revwire", "torch"))
"""Packages whose code is no model's."""

_CALLS = 3
"""How deep functions that functions name are looked for."""


def package_of(kind: type | FunctionType | ModuleType) -> str:
    """The package that a class, a function or a module belongs to."""
    name = kind.__name__ if isinstance(kind, ModuleType) else kind.__module__
    return (name or "").partition(".")[0]


def packages_of(modules: Iterable[nn.Module]) -> set[str]:
    """Those of the classes of modules and of their hooks, PyTorch's apart."""
    modules = [*modules]
    tables = (t for m in modules for t in vars(m).values() if isinstance(t, dict))
    hooks = (_function_in(hook) for table in tables for hook in table.values())
    return {
        *(package_of(k) for k in (*map(type, modules), *hooks) if isinstance(k, (type, FunctionType)))
    } - _NOT_THEIRS


def classes_of(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of modules, and those that they inherit from, which are not PyTorch's."""
    classes = {base for m in modules for base in type(m).__mro__ if issubclass(base, nn.Module)}
    return {kind for kind in classes if not is_of_torch(kind)}


def is_of_torch(kind: type) -> bool:
    """Whether a class is one of PyTorch's modules."""
    return kind.__module__.startswith("torch.nn.modules.")


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The globals and attributes that code names, in functions within it too."""
    return frozenset(code.co_names).union(*map(names_in, _inner(code)))


def named(function: FunctionType) -> Iterator[Any]:
    """The globals and enclosed variables that a function names, and the globals of a model's Python modules."""
    names, scope = names_in(function.__code__), function.__globals__
    yield from (scope[name] for name in names if name in scope)
    for table in map(vars, _modules_named(function)):
        yield from (table[name] for name in names if name in table)
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))


def functions_of(modules: Iterable[nn.Module]) -> list[FunctionType]:
    """The functions that may run when modules do, PyTorch's apart: methods of their classes, hooks, those among their
    attributes, and those that these name, in tables and classes too, a few calls deep.
    """
    modules = [*modules]
    found, seen = dict[int, FunctionType](), set[int]()
    named_now = [v for kind in classes_of(modules) for v in vars(kind).values()]
    for m in modules:
        named_now += vars(m).values()
    for _ in range(_CALLS):
        todo, named_now = named_now, []
        while todo:
            value = _function_in(todo.pop())
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, (dict, list, tuple)):
                todo += (v for v in (value.values() if isinstance(value, dict) else value) if callable(v))
            elif isinstance(value, type) and not issubclass(value, nn.Module) and package_of(value) not in _NOT_THEIRS:
                todo += vars(value).values()
            elif isinstance(value, FunctionType) and package_of(value) not in _NOT_THEIRS:
                found[id(value)] = value
                named_now += named(value)
    return [*found.values()]


@contextmanager
def names_kept(functions: Iterable[FunctionType], classes: Iterable[type]) -> Iterator[None]:
    """Undo what a run assigns to globals, to enclosed variables, and to attributes of classes."""
    cells = [(c, c.cell_contents) for f in functions for c in f.__closure__ or () if _is_filled(c)]
    names = [(table, n, table.get(n, MISSING)) for f in functions for table, n in _stored(f)]
    attributes = {kind: _plain_attributes(kind) for kind in classes}
    try:
        yield
    finally:
        for cell, value in cells:
            if not _is_filled(cell) or cell.cell_contents is not value:
                cell.cell_contents = value
        for table, name, value in names:
            if value is MISSING:
                table.pop(name, None)
            else:
                table[name] = value
        for kind, before in attributes.items():
            now = _plain_attributes(kind)
            for name in now.keys() - before.keys():
                delattr(kind, name)
            for name, value in before.items():
                if now.get(name, MISSING) is not value:
                    setattr(kind, name, value)


def _function_in(value: Any) -> Any:
    """The function in a method, a property or a partial; anything else as it is."""
    while isinstance(value, partial):
        value = value.func
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _modules_named(function: FunctionType) -> Iterator[ModuleType]:
    names, scope = names_in(function.__code__), function.__globals__
    modules = (v for v in map(scope.get, names) if isinstance(v, ModuleType))
    return (m for m in modules if package_of(m) not in _NOT_THEIRS)


def _stored(function: FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """The globals that a function may assign to, or delete: those of its statements, and any, where it asks for all."""
    scope = function.__globals__
    every = "globals" in names_in(function.__code__)
    names = [n for n in scope if not n.startswith("__")] if every else _assigned(function.__code__, "GLOBAL")
    yield from ((scope, name) for name in names)
    for module in _modules_named(function):
        yield from ((vars(module), name) for name in _assigned(function.__code__, "ATTR"))


@lru_cache(maxsize=8192)
def _assigned(code: CodeType, what: str) -> frozenset[str]:
    """The globals, or the attributes, that code assigns to, or deletes."""
    names = (f"STORE_{what}", f"DELETE_{what}")
    may = any(dis.opmap[name] in code.co_code[::2] for name in names)  # to read instructions takes a while
    own = {i.argval for i in dis.get_instructions(code) if i.opname in names} if may else ()
    return frozenset(own).union(*(_assigned(c, what) for c in _inner(code)))


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (c for c in code.co_consts if isinstance(c, CodeType))


def _plain_attributes(kind: type) -> dict[str, Any]:
    return {n: v for n, v in vars(kind).items() if not n.startswith("__") and not isinstance(v, FunctionType)}


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - that is how it is asked
    except ValueError:
        return False
    return True
