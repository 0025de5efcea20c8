"""What the code of modules names outside of them: globals, enclosed variables, attributes of classes."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from revwire._surroundings.attributes import MISSING


def classes_of(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of modules, and those that they inherit from, which are not PyTorch's."""
    classes = {base for m in modules for base in type(m).__mro__ if issubclass(base, nn.Module)}
    return {kind for kind in classes if not is_of_torch(kind)}


def is_of_torch(kind: type) -> bool:
    """Whether a class is one of PyTorch's modules."""
    return kind.__module__.startswith("torch.nn.modules.")


def named(function: FunctionType) -> Iterator[Any]:
    """The globals and enclosed variables that a function names."""
    names = function.__globals__
    yield from (names[name] for name in function.__code__.co_names if name in names)
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))


def named_by(classes: Iterable[type]) -> Iterator[Any]:
    """What stands in classes, and what their methods, and functions that these call, name."""
    for kind in classes:
        yield from vars(kind).values()
    for function in _functions(classes):
        yield from named(function)


@contextmanager
def names_kept(classes: Iterable[type]) -> Iterator[None]:
    """Undo what a run assigns to globals, to enclosed variables, and to attributes of classes."""
    functions = [*_functions(classes)]
    cells = [(c, c.cell_contents) for f in functions for c in f.__closure__ or () if _is_filled(c)]
    names = [(f.__globals__, n, f.__globals__.get(n, MISSING)) for f in functions for n in _stored(f.__code__)]
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


def _functions(classes: Iterable[type]) -> Iterator[FunctionType]:
    """The methods of classes, and the functions that they name."""
    seen = set[int]()
    methods = [v for kind in classes for v in vars(kind).values() if isinstance(v, FunctionType)]
    for function in (*methods, *(v for m in methods for v in named(m) if isinstance(v, FunctionType))):
        if id(function) not in seen and not (function.__module__ or "").startswith("torch."):
            seen.add(id(function))
            yield function


@lru_cache(maxsize=4096)
def _stored(code: CodeType) -> tuple[str, ...]:
    """The globals that code assigns to, or deletes."""
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")})


def _plain_attributes(kind: type) -> dict[str, Any]:
    return {n: v for n, v in vars(kind).items() if not n.startswith("__") and not isinstance(v, FunctionType)}


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - that is how it is asked
    except ValueError:
        return False
    return True
