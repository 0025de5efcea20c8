"""Attributes of modules, and containers in them: see what a run changed, and undo it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from revwire._structures import CONSTANTS
from revwire._torch import CALL, REPLICATE

STANDARD = frozenset((*vars(nn.Module()), "forward", "compile", CALL, REPLICATE))
"""Attributes that every module has, or a converted one."""

_TABLES = ("_parameters", "_buffers", "_modules")


_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, tuple, set, frozenset, deque, bytearray)


def container_of(v: Any) -> Any:
    """The built-in container that an object is, or None. What its class makes of that is code of somebody's, which may
    do anything (import what it lists, say): nothing but a model calls it.
    """
    kinds = type(v).__mro__
    return next((kind for kind in _CONTAINERS if kind in kinds), None)


def items_in(v: Any) -> list[Any] | None:
    """The values in a container; None for anything else."""
    kind = container_of(v)
    if kind is None:
        return None
    return [*kind.values(v)] if issubclass(kind, dict) else [*kind.__iter__(v)]


def contents_of(v: Any) -> Any:
    """What a container that can be filled holds; None for anything else."""
    kind = container_of(v)
    if kind in (None, tuple, frozenset):
        return None
    return [*kind.items(v)] if issubclass(kind, dict) else [*kind.__iter__(v)]


def attributes_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a module, with the contents of the containers among them."""
    return {k: (v, contents_of(v)) for k, v in vars(module).items()}


def changed(before: dict[str, tuple[Any, Any]], module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that were assigned, added, removed or filled since `attributes_of`."""
    now = vars(module)
    gone = [k for k in before if k not in now]
    return tuple(gone + [name for k, v in now.items() for name in _differences(k, before.get(k), v)])


def _differences(name: str, before: tuple[Any, Any] | None, v: Any) -> list[str]:
    if before is None or not _same(before[0], v):
        return [name]
    old, new = before[1], contents_of(v)
    if old is None:
        return []
    if name not in _TABLES:
        return [] if len(old) == len(new) and all(map(_same_item, old, new)) else [name]
    tables = dict(old), dict(new)
    return [k for k in {**tables[0], **tables[1]} if tables[0].get(k) is not tables[1].get(k)]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, CONSTANTS) and bool(a == b))


def _same_item(a: Any, b: Any) -> bool:
    return _same(a, b) or (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b)))


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Give every module below ``root`` its attributes back, and the containers among them their contents."""
    kept = [(m, type(m), attributes_of(m)) for m in root.modules()]
    try:
        yield
    finally:
        for module, kind, before in kept:
            if type(module) is kind and changed(before, module):
                restore(module, before)


def restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    """Give a module the attributes back that it had at `attributes_of`."""
    now = vars(module)
    for k in [k for k in now if k not in before]:
        del now[k]
    for k, (v, contents) in before.items():
        now[k] = v
        if contents is not None:
            refill(v, contents)


def refill(container: Any, contents: Any) -> None:
    """Let a container hold what it held."""
    kind = container_of(container)
    kind.clear(container)
    fill = kind.update if issubclass(kind, (dict, set)) else kind.extend
    fill(container, contents)


def slots_of(v: Any) -> dict[str, Any]:
    """What the slots of an object hold."""
    names = (vars(kind).get("__slots__", ()) for kind in type(v).__mro__)
    all_names = (name for n in names for name in ((n,) if isinstance(n, str) else n))
    return {name: getattr(v, name) for name in all_names if not name.startswith("__") and hasattr(v, name)}


def containers_in(structure: Any) -> list[tuple[Any, Any]]:
    """Each list, dict and set in an argument, with its contents."""
    out: list[tuple[Any, Any]] = []
    todo = [structure]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, dict, set)):
            out.append((item, contents_of(item)))
        if isinstance(item, (list, tuple, dict)):
            todo += items_in(item) or ()
    return out


def refilled(before: list[tuple[Any, Any]]) -> bool:
    """Whether any of `containers_in` holds other things now."""
    for container, old in before:
        new = contents_of(container)
        if len(old) != len(new) or not all(map(_same_item, old, new)):
            return True
    return False


MISSING = object()
"""Stands for an attribute that is not there."""
