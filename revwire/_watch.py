"""What Python does during a run besides calling torch: attributes it assigns, containers it fills, random numbers it draws,
objects it looks into. A graph holds none of these, so code that does them must not be opened; and all are undone after a run.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from copy import copy
from typing import Any

import torch
from torch import nn

from revwire._recording import CONSTANTS, IDENTITIES
from revwire._replay import version_of

_TABLES = ("_parameters", "_buffers", "_modules")


# -- attributes --------------------------------------------------------------------------------------------------------


def _contents(v: Any) -> Any:
    """What a container holds, one level deep; None for anything else."""
    if isinstance(v, dict):
        return list(v.items())
    return list(v) if isinstance(v, (list, set)) else None


def attributes_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a module, with the contents of the containers among them."""
    return {k: (v, _contents(v)) for k, v in vars(module).items()}


def changed(before: dict[str, tuple[Any, Any]], module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that were assigned, added, removed or filled since `attributes_of`."""
    now = vars(module)
    gone = [k for k in before if k not in now]
    return tuple(gone + [name for k, v in now.items() for name in _differences(k, before.get(k), v)])


def _differences(name: str, before: tuple[Any, Any] | None, v: Any) -> list[str]:
    if before is None or not _same(before[0], v):
        return [name]
    old, new = before[1], _contents(v)
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
        if isinstance(v, list):
            v[:] = contents
        elif isinstance(v, (dict, set)):
            v.clear()
            v.update(contents)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Let code that is compiled by `torch.compile` run as it was written: compilers refuse to trace what is being observed."""
    if "torch._dynamo" not in sys.modules:  # then nothing is
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def backward_hooks_left_out(module: nn.Module) -> Iterator[None]:
    """Let a module (not those below it) forget its full backward hooks."""
    names = ("_backward_hooks", "_backward_pre_hooks") if module._is_full_backward_hook is not False else ("_backward_pre_hooks",)
    kept = {name: vars(module)[name] for name in names}
    vars(module).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        vars(module).update(kept)


@contextmanager
def shards_kept(root: nn.Module) -> Iterator[None]:
    """Let FSDP2 take away again what a run has gathered: it counts which weights are whole, and attributes alone do not tell it."""
    kept = [(m, list(m.parameters())) for m in root.modules() if hasattr(m, "unshard") and callable(getattr(m, "reshard", None))]
    try:
        yield
    finally:
        for module, weights in kept:
            if any(now is not before for now, before in zip(module.parameters(), weights, strict=True)):
                module.reshard()  # type: ignore[operator]


# -- buffers ----------------------------------------------------------------------------------------------------------


@contextmanager
def counters_kept(root: nn.Module) -> Iterator[None]:
    """Undo writes to buffers that are no floating-point statistics (those are kept apart by `buffers_kept`)."""
    kept = [(b, version_of(b), b.detach().clone()) for b in root.buffers() if not b.is_floating_point() and not b.is_inference()]
    try:
        yield
    finally:
        for buffer, version, copy in kept:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


# -- containers among the arguments ------------------------------------------------------------------------------------


def containers_in(structure: Any) -> list[tuple[Any, Any]]:
    """Each list, dict and set in an argument, with its contents."""
    out: list[tuple[Any, Any]] = []
    todo = [structure]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, dict, set)):
            out.append((item, _contents(item)))
        if isinstance(item, (list, tuple)):
            todo.extend(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
    return out


def refilled(before: list[tuple[Any, Any]]) -> bool:
    """Whether any of `containers_in` holds other things now."""
    for container, old in before:
        new = _contents(container)
        if len(old) != len(new) or not all(map(_same_item, old, new)):
            return True
    return False


# -- context variables -------------------------------------------------------------------------------------------------


def context_of_its_own() -> Context:
    """A copy of the present context, with copies of the containers among its variables: what hooks collect there in a run is not seen."""
    context = copy_context()
    for variable, value in list(context.items()):
        if isinstance(value, (list, dict, set)):
            context.run(variable.set, _copied(value))
    return context


def _copied(container: Any) -> Any:
    """A container, and the containers in it, copied; what else they hold is the same."""
    out = copy(container)
    items = out.items() if isinstance(out, dict) else enumerate(out) if isinstance(out, list) else ()
    for key, item in list(items):
        if isinstance(item, (list, dict, set)):
            out[key] = _copied(item)
    return out


# -- random numbers of Python and NumPy --------------------------------------------------------------------------------


def python_random_state() -> tuple[Any, ...]:
    """The states of ``random`` and, where it is loaded, ``numpy.random``."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two `python_random_state`s."""
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or bool(a[1][2:] == b[1][2:] and (a[1][1] == b[1][1]).all())


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Leave the generators of Python and NumPy as found."""
    before = python_random_state()
    try:
        yield
    finally:
        set_python_random_state(before)


def set_python_random_state(state: tuple[Any, Any]) -> None:
    """The inverse of `python_random_state`."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


# -- objects among the arguments ---------------------------------------------------------------------------------------

_LOOKS = (
    "__len__",
    "__bool__",
    "__iter__",
    "__getitem__",
    "__contains__",
    "__call__",
    "__eq__",
    "__lt__",
    "__int__",
    "__float__",
    "__index__",
)
_HARMLESS = frozenset({"__class__", "__dict__", "__dataclass_fields__", "__deepcopy__", "__reduce_ex__", "__copy__", "__getstate__"})
_LOCK = threading.Lock()
_PATCHED: dict[type, tuple[list[int], dict[str, Any]]] = {}
_LOCAL = threading.local()


class Watch:
    """Tells ``note(obj, name)`` when Python looks into one of the watched objects; see `add`.

    Classes are patched while any thread watches an object of theirs, so that the objects keep their type.
    """

    def __init__(self, note: Callable[[Any, str], None]) -> None:
        self.note = note
        self.objects: dict[int, Any] = {}
        self.classes: list[type] = []

    def __enter__(self) -> Watch:
        self.outer = getattr(_LOCAL, "watch", None)
        _LOCAL.watch = self
        return self

    def __exit__(self, *_: Any) -> None:
        _LOCAL.watch = self.outer
        for cls in self.classes:
            _unpatch(cls)

    def add(self, obj: Any) -> bool:
        """Watch an object from now on; False if objects of its class cannot be watched."""
        cls = type(obj)
        if isinstance(obj, IDENTITIES) or cls in self.classes:
            self.objects[id(obj)] = obj
            return True
        if not _patch(cls):
            return False
        self.classes.append(cls)
        self.objects[id(obj)] = obj
        return True

    def looked(self, obj: Any, name: str) -> None:
        """Called by the patched classes."""
        if id(obj) in self.objects and name not in _HARMLESS:
            self.note(obj, name)


def _patch(cls: type) -> bool:
    with _LOCK:
        if cls in _PATCHED:
            _PATCHED[cls][0][0] += 1
            return True
        own = dict(vars(cls))
        names = ["__getattribute__", *(n for n in _LOOKS if getattr(cls, n, None) is not getattr(object, n, None))]
        try:
            for name in names:
                setattr(cls, name, _watched(name, getattr(cls, name)))
        except TypeError:  # a class of C's own
            return False
        _PATCHED[cls] = [1], {n: own.get(n) for n in names}
        return True


def _unpatch(cls: type) -> None:
    with _LOCK:
        count, originals = _PATCHED[cls]
        count[0] -= 1
        if count[0]:
            return
        del _PATCHED[cls]
        for name, original in originals.items():
            if original is None:
                delattr(cls, name)
            else:
                setattr(cls, name, original)


def _watched(name: str, original: Any) -> Any:
    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = getattr(_LOCAL, "watch", None)
        if watch is not None:
            watch.looked(self, args[0] if name == "__getattribute__" else name)
        return original(self, *args, **kwargs)

    return look
