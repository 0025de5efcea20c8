"""See which objects Python looks into during a run. A graph holds none of that, so code that does it is not opened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from revwire._structures import IDENTITIES

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


_HARMLESS = frozenset(
    {"__class__", "__dict__", "__dataclass_fields__", "__deepcopy__", "__reduce_ex__", "__copy__", "__getstate__"}
)


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
