"""What the code of modules names outside of them: globals, enclosed variables, attributes of classes."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from revwire._surroundings.attributes import items_in

_NOT_THEIRS = frozenset((*sys.stdlib_module_names, "numpy", "revwire", "torch"))
"""Packages whose code is no model's."""

CACHED: type = type(lru_cache(len))
"""What `functools.lru_cache` makes of a function."""

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
    hooks = (_function_in(hook) for table in tables for hook in dict.values(table))
    return {
        *(package_of(k) for k in (*map(type, modules), *hooks) if isinstance(k, (type, FunctionType)))
    } - _NOT_THEIRS


def classes_of(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of modules, and those that they inherit from, which are not PyTorch's."""
    classes = {base for m in modules for base in type(m).__mro__ if issubclass(base, nn.Module)}
    return {kind for kind in classes if not is_of_torch(kind)}


def is_of_a_model(kind: type) -> bool:
    """Whether a class is neither PyTorch's, NumPy's nor of the standard library."""
    return package_of(kind) not in _NOT_THEIRS


def is_of_torch(kind: type) -> bool:
    """Whether a class is one of PyTorch's modules."""
    return kind.__module__.startswith("torch.nn.modules.")


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The globals and attributes that code names, in functions within it too."""
    return frozenset(code.co_names).union(*map(names_in, code_within(code)))


def named(function: FunctionType) -> Iterator[Any]:
    """The globals and enclosed variables that a function names, the globals of a model's Python modules, and defaults
    of its arguments.
    """
    names, scope = names_in(function.__code__), function.__globals__
    yield from (scope[name] for name in names if name in scope)
    for table in map(vars, modules_named(function)):
        yield from (table[name] for name in names if name in table)
    yield from (cell.cell_contents for cell in function.__closure__ or () if is_filled(cell))
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def functions_of(modules: Iterable[nn.Module]) -> list[FunctionType]:
    """The functions that may run when modules do, PyTorch's apart: methods of their classes, hooks, those among their
    attributes, and those that these name, in tables and classes too, a few calls deep.
    """
    modules = [*modules]
    members = [v for kind in classes_of(modules) for v in vars(kind).values()]
    return functions_among([*members, *(v for m in modules for v in vars(m).values())])


def functions_among(values: list[Any], calls: int = _CALLS) -> list[FunctionType]:
    """As `functions_of`, of these values."""
    found, seen = dict[int, FunctionType](), set[int]()
    for _ in range(calls):
        todo, values = values, []
        while todo:
            value = _function_in(todo.pop())
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, property):
                todo += (value.fget, value.fset, value.fdel)
            elif isinstance(value, (dict, list, tuple)):
                todo += (v for v in items_in(value) or () if callable(v))
            elif isinstance(value, type) and not issubclass(value, nn.Module) and package_of(value) not in _NOT_THEIRS:
                todo += vars(value).values()
            elif isinstance(value, FunctionType) and package_of(value) not in _NOT_THEIRS:
                found[id(value)] = value
                values += named(value)
    return [*found.values()]


def _function_in(value: Any) -> Any:
    """The function in a method, a partial or a cache; anything else as it is."""
    while isinstance(value, (partial, CACHED)):
        value = value.func if isinstance(value, partial) else value.__wrapped__  # type: ignore[attr-defined]
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return value.__func__
    return value


def modules_named(function: FunctionType) -> Iterator[ModuleType]:
    """The Python modules of models that a function names."""
    names, scope = names_in(function.__code__), function.__globals__
    modules = (v for v in map(scope.get, names) if isinstance(v, ModuleType))
    return (m for m in modules if package_of(m) not in _NOT_THEIRS)


@lru_cache(maxsize=8192)
def assigned_in(code: CodeType, what: str) -> frozenset[str]:
    """The globals (GLOBAL), attributes (ATTR) or enclosed variables (DEREF) that code assigns to, or deletes."""
    names = (f"STORE_{what}", f"DELETE_{what}")
    may = any(dis.opmap[name] in code.co_code[::2] for name in names)  # to read instructions takes a while
    own = {i.argval for i in dis.get_instructions(code) if i.opname in names} if may else ()
    return frozenset(own).union(*(assigned_in(c, what) for c in code_within(code)))


def code_within(code: CodeType) -> Iterator[CodeType]:
    """That of the functions within."""
    return (c for c in code.co_consts if isinstance(c, CodeType))


def is_filled(cell: CellType) -> bool:
    """Whether an enclosed variable has a value."""
    try:
        cell.cell_contents  # noqa: B018 - that is how it is asked
    except ValueError:
        return False
    return True
