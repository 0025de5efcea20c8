"""Nested arguments: tensors, constants and containers of them."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


IDENTITIES = (type, Enum, FunctionType, BuiltinFunctionType, MethodType, nn.Module, torch.Generator)
"""Objects that Python decides on by what they are, not by what they hold."""


class ByIdentity:
    """Compares by identity, and keeps what it stands for alive, so that no other object takes its id."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.obj is self.obj


@dataclass(frozen=True)
class Ref:
    """In a recorded argument or result: the tensor with this value number."""

    value: int


@dataclass(frozen=True, eq=False)
class Opaque:
    """In a recorded argument or result: an object that is neither a tensor nor a plain constant (a cache, a config).

    ``fields`` are the recorded fields of a dataclass instance, from which an equal one can be made; else None.
    """

    obj: Any
    fields: dict[str, Any] | None = None


_ATOMS = frozenset({int, float, bool, str, type(None)})

_SINGLE = _ATOMS | {Ref}


def is_constant(leaf: Any) -> bool:
    """Whether a leaf is a plain constant, or one of NumPy's scalars, which count as such."""
    numpy = sys.modules.get("numpy")
    return isinstance(leaf, CONSTANTS) or (numpy is not None and isinstance(leaf, numpy.generic))


def plain(leaf: Any) -> Any:
    """A constant of a subclass (NumPy's scalars, an int enum) as the plain one that a graph can spell."""
    if not isinstance(leaf, CONSTANTS):
        return leaf.item()
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(leaf, kind):
            return leaf if type(leaf) is kind else kind(leaf)
    return leaf


def is_named_tuple(structure: Any) -> bool:
    """Whether this is a ``NamedTuple`` (made from its items one by one)."""
    return isinstance(structure, tuple) and hasattr(structure, "_fields")


def is_sequence(structure: Any) -> bool:
    """Lists and tuples whose items say all about them: the plain ones, named tuples, ``torch.Size`` and torch's
    results.
    """
    if type(structure) in (list, tuple, torch.Size) or is_named_tuple(structure):
        return True
    return isinstance(structure, tuple) and type(structure).__module__.startswith("torch.return_types")


def is_mapping(structure: Any) -> bool:
    """Dicts whose items say all about them."""
    return type(structure) in (dict, OrderedDict)


def mapped(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """A structure with ``leaf`` applied to all that is no list, tuple, dict or slice (nor such an `Opaque` with
    fields).
    """
    if type(structure) in _SINGLE:
        return leaf(structure)
    if is_sequence(structure):
        items = [mapped(s, leaf) for s in structure]
        if isinstance(structure, list):
            return items
        if is_named_tuple(structure):
            return type(structure)._make(items)
        return tuple(items) if type(structure) is torch.Size else type(structure)(items)
    if is_mapping(structure):
        return type(structure)((k, mapped(v, leaf)) for k, v in structure.items())
    if isinstance(structure, slice):
        return slice(*(mapped(s, leaf) for s in (structure.start, structure.stop, structure.step)))
    if isinstance(structure, Opaque) and structure.fields is not None:
        return Opaque(structure.obj, {k: mapped(v, leaf) for k, v in structure.fields.items()})
    return leaf(structure)


def leaves_of(structure: Any, into_objects: bool = True) -> Iterator[Any]:
    """What `mapped` would apply its function to, in order; or an `Opaque` as one leaf, even if it has fields."""
    out: list[Any] = []
    _gather(structure, into_objects, out)
    return iter(out)


def _gather(structure: Any, into_objects: bool, out: list[Any]) -> None:
    """Add the leaves of a structure to a list. A plan asks so often that generators, one for each level, would show."""
    kind = type(structure)
    if kind in _SINGLE:
        out.append(structure)
    elif kind is tuple or kind is list or is_sequence(structure):
        for item in structure:
            _gather(item, into_objects, out)
    elif is_mapping(structure):
        for item in structure.values():
            _gather(item, into_objects, out)
    elif isinstance(structure, slice):
        _gather((structure.start, structure.stop, structure.step), into_objects, out)
    elif isinstance(structure, Opaque) and structure.fields is not None and into_objects:
        _gather(structure.fields, into_objects, out)
    else:
        out.append(structure)


def renumbered(structure: Any, numbers: dict[int, int]) -> Any:
    """A recorded structure with its values renumbered."""
    return mapped(structure, lambda s: Ref(numbers[s.value]) if isinstance(s, Ref) else s)


def refs(structure: Any) -> Iterator[Ref]:
    """The `Ref`s in a recorded structure, in order."""
    return (leaf for leaf in leaves_of(structure) if isinstance(leaf, Ref))


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[Tensor]:
    """As `tensors_in`, for the arguments of a call: quick where they are tensors themselves."""
    out: list[Tensor] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            out.append(a)
        elif type(a) not in _ATOMS:
            out.extend(tensors_in(a))
    return out


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts, slices and dataclasses of any kind, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from tensors_in(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from tensors_in(item)
    elif isinstance(structure, slice):
        yield from tensors_in((structure.start, structure.stop, structure.step))
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        yield from tensors_in(list(vars(structure).values()) if hasattr(structure, "__dict__") else [])
