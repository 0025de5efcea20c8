"""A value among the attributes or buffers of a module, as a forward found it: told from another, and given back."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from copy import copy
from functools import lru_cache
from itertools import islice
from random import Random
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import ref

from torch import Generator, Tensor, nn

from revwire._structures import is_named_tuple
from revwire._surroundings.attributes import items_in, slots_of
from revwire._surroundings.code import package_of
from revwire._surroundings.generators import is_generator
from revwire._surroundings.inventory import version_of

SMALL = 2**16
"""Elements of a tensor that is copied before a forward that may write to it."""

_SHORT = 256
"""Items of a list or dict that is copied before a forward."""

_DEPTH = 3
"""How many containers may stand in one another."""

_SEEN_ELSEWHERE = (Tensor, nn.Module, type)
"""What is no plain object, though its class may be a model's."""

_PLAIN = frozenset({int, float, str, bool, bytes, type(None), FunctionType, type})
"""Types of which nothing changes in place."""

_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = frozenset((*_DICTS, list, set, deque, bytearray))  # exact types: what others do when copied is unknown


def is_array(value: Any) -> bool:
    """Whether this is one of NumPy's arrays."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def may_be_written_to(value: Any) -> bool:
    """Whether a forward may change it in place: a tensor, an array or a container, or a tuple of such."""
    if isinstance(value, tuple):
        return any(map(may_be_written_to, value))
    return (
        type(value) in _CONTAINERS
        or is_array(value)
        or (isinstance(value, Tensor) and not isinstance(value, nn.Parameter))
    )


@lru_cache(maxsize=2)
def kinds_noted(with_numpy: bool) -> frozenset[type]:
    """The types of values that are `noted`, and of generators; classes that are derived from them are found by a slower
    look.
    """
    kinds = {*_CONTAINERS, tuple, Tensor, Generator, Random}
    if with_numpy:
        numpy, made = sys.modules["numpy"], sys.modules["numpy.random"]
        kinds |= {numpy.ndarray, made.Generator, made.RandomState}
    return frozenset(kinds)


class _Writes(dict[int, tuple["ref[Tensor]", bool]]):
    """Tensors that were seen, by identity: whether any forward wrote to them."""

    def note(self, t: Tensor, written: bool) -> None:
        number = id(t)
        if self.of(t) is None or written:  # one write is enough
            self[number] = ref(t, lambda _: self.pop(number, None)), written

    def of(self, t: Tensor) -> bool | None:
        known = self.get(id(t))
        return known[1] if known and known[0]() is t else None


_WRITES = _Writes()


def note_write(t: Tensor) -> None:
    """A forward was seen to write to this tensor."""
    _WRITES.note(t, True)


def is_written_to(t: Tensor) -> bool:
    """Whether a forward was seen to write to this tensor."""
    return bool(_WRITES.of(t))


class HeldTensor:
    """A tensor as a forward found it."""

    __slots__ = ("alias", "clone", "original", "requires_grad", "version")

    def __init__(self, t: Tensor, *, unseen: bool = False) -> None:
        self.original, self.alias = ref(t), t.detach()  # it owns no graph
        self.requires_grad, self.version = t.requires_grad, -1 if unseen else version_of(t)
        written = _WRITES.of(t)
        copied = t.numel() <= SMALL if written is None else written
        self.clone = self.alias.clone() if copied else None

    @property
    def written(self) -> bool:
        """Whether somebody wrote to it since, as far as can be told."""
        return self.version == -1 or version_of(self.alias) != self.version

    def differs(self, now: Any) -> bool:
        """Whether another one stands there now, or this one was written to."""
        original, written = self.original(), self.written
        if original is not None:
            _WRITES.note(original, written)
        return written or now is None or now is not original

    def again(self) -> Tensor:
        """A tensor for one recompute; one that the forward wrote to is a copy, which the recompute may write to."""
        now = self.original()
        if self.written:
            return (self.alias if self.clone is None else self.clone).clone().requires_grad_(self.requires_grad)
        return now if now is not None and now.is_leaf else self.alias.detach().requires_grad_(self.requires_grad)


class HeldContainer(NamedTuple):
    """A long list or dict as a forward found it: what was added since stands at its end."""

    container: Any
    length: int

    def again(self) -> Any:
        """A copy without what was added."""
        if isinstance(self.container, list):
            return self.container[: self.length]
        out = copy(self.container)
        for key in [*islice(out, self.length, None)]:
            del out[key]
        return out


def noted(value: Any, drawing: list[Any], depth: int = _DEPTH, *, unseen: bool = False) -> Any:
    """A value as the forward finds it; generators in it are put into ``drawing``. ``unseen``: tensors may be written to
    behind their version counters.
    """
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else HeldTensor(value, unseen=unseen)
    if not (type(value) in _CONTAINERS or isinstance(value, tuple)):
        if is_array(value):
            return value.copy()
        if is_generator(value):
            drawing.append(value)
        return value
    if not depth:
        return value
    if len(value) > _SHORT and type(value) in (list, *_DICTS):
        return HeldContainer(value, len(value))
    return _filled(value, lambda item: noted(item, drawing, depth - 1, unseen=unseen))


def differs(then: Any, now: Any) -> bool:
    """Whether a recompute must not find, or must not write to, what stands there now."""
    if isinstance(then, HeldTensor):
        return then.differs(now)
    if isinstance(then, HeldContainer):
        return now is not then.container or len(now) != then.length
    if isinstance(then, tuple):
        return not isinstance(now, tuple) or len(now) != len(then) or any(map(differs, then, now))
    return now is not then  # always so for copies


def was_changed(then: Any, now: Any) -> bool:
    """As `differs`, but not for containers and arrays that hold the same."""
    if is_array(then):
        return type(now) is not type(then) or now.tobytes() != then.tobytes()
    if isinstance(then, tuple):
        return not isinstance(now, tuple) or len(now) != len(then) or any(map(was_changed, then, now))
    if type(then) not in _CONTAINERS:
        return differs(then, now)
    if type(now) is not type(then) or len(now) != len(then):
        return True
    if isinstance(then, dict):
        return then.keys() != now.keys() or any(was_changed(v, now[k]) for k, v in then.items())
    if isinstance(then, (list, deque)):
        return any(map(was_changed, then, now))
    return bool(then != now)


def again(value: Any, depth: int = _DEPTH) -> Any:
    """A value that was noted, for one recompute to find."""
    if isinstance(value, (HeldTensor, HeldContainer)):
        return value.again()
    if not (type(value) in _CONTAINERS or isinstance(value, tuple)):
        return value.copy() if is_array(value) else value
    if not depth:
        return value
    return _filled(value, lambda item: again(item, depth - 1))


def _filled(container: Any, item: Callable[[Any], Any]) -> Any:
    """A container of the same kind with ``item`` of what it holds."""
    if isinstance(container, tuple):
        kind: Any = type(container)
        items = [item(value) for value in container]
        return kind._make(items) if is_named_tuple(container) else tuple(items)
    out = container.copy()
    if _PLAIN.issuperset(map(type, out.values() if isinstance(out, dict) else out)):
        return out
    if isinstance(out, dict):
        for key, value in out.items():
            out[key] = item(value)
    elif isinstance(out, (list, deque)):
        for i, value in enumerate(out):
            out[i] = item(value)
    return out


def is_object_of(value: Any, packages: Collection[str]) -> bool:
    """Whether this is an object of a class of one of these packages, and neither a module nor a tensor."""
    return package_of(type(value)) in packages and not isinstance(value, _SEEN_ELSEWHERE)


def is_plain_object(value: Any, packages: Collection[str]) -> bool:
    """Whether this is a namespace, or an object of a class of one of these packages."""
    return isinstance(value, (SimpleNamespace, argparse.Namespace)) or is_object_of(value, packages)


def held_in(values: Iterable[Any], packages: Collection[str]) -> list[Any]:
    """Values, and what they hold, a few levels deep: in containers, and in objects whose classes belong to these
    packages. Of an object come the table of its attributes, and itself, if it has slots.
    """
    found = dict[int, Any]()
    todo = [(value, _DEPTH) for value in values]
    while todo:
        value, depth = todo.pop()
        if id(value) in found:
            continue
        found[id(value)] = value
        items: list[Any] = []
        if isinstance(value, (dict, list, tuple, deque)):
            items = items_in(value) or []
        elif is_plain_object(value, packages):
            items = [getattr(value, "__dict__", {}), *slots_of(value).values()]
        todo += [(item, depth - 1) for item in items if depth]
    return [*found.values()]
