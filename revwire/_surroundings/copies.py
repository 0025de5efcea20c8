"""Copies of stateful arguments (key-value caches, say): new containers around the same, detached tensors.

A call may write to such an object. A capture, and every recompute, must find it as the forward pass found it, and must
not write to the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revwire._surroundings.attributes import items_in, slots_of
from revwire._surroundings.inventory import version_of


def alike(t: Tensor) -> Tensor:
    """The same memory without its graph: it wants a gradient as ``t`` does, and has the attributes of ``t``."""
    out = t.detach().requires_grad_(t.requires_grad)
    if vars(t).keys() - OURS:
        vars(out).update(carried_by(t))
    return out


OURS = frozenset({"_revwire_link", "_revwire_link_of_view"})
"""Attributes that are not code's own."""


def carried_by(t: Tensor) -> dict[str, Any]:
    """The attributes that code gave a tensor, as they are now."""
    return {name: snapshot(value) for name, value in vars(t).items() if name not in OURS}


def snapshot(obj: Any, tensor: Callable[[Tensor], Tensor] = alike) -> Any:
    """``obj`` with its structure copied, and ``tensor`` applied to its tensors. Modules and what cannot be copied are
    shared.

    Tensors are only detached by default: in-place writes to them are not undone; they change a recompute, which is
    detected.
    """
    memo: dict[int, Any] = {}
    _share(obj, memo, set(), tensor)
    try:
        return copy.deepcopy(obj, memo)
    except Exception:  # noqa: BLE001 - a lock, a generator, a handle: it has no state that a copy could keep
        return obj


def _share(obj: Any, memo: dict[int, Any], seen: set[int], tensor: Callable[[Tensor], Tensor]) -> None:
    """Tell `copy.deepcopy` what to take for each tensor and module inside ``obj``."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    if isinstance(obj, Tensor):
        memo[id(obj)] = tensor(obj)
    elif isinstance(obj, nn.Module):
        memo[id(obj)] = obj
    else:
        for item in _parts_of(obj):
            _share(item, memo, seen, tensor)


def _parts_of(obj: Any) -> Iterable[Any]:
    """What a container or an object holds."""
    items = items_in(obj)
    if items is not None:
        return items
    return () if isinstance(obj, type) else (*getattr(obj, "__dict__", {}).values(), *slots_of(obj).values())


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


Versions = list[tuple[Tensor, int]]


def detached(value: Any, found: Versions) -> Any:
    """``value`` with each tensor in it detached, which is noted in ``found``; containers and stateful objects are
    copied.
    """
    if isinstance(value, Tensor):
        out = alike(value)
        found.append((out, version_of(out)))
        return out
    if type(value) in (list, tuple):
        return type(value)(detached(v, found) for v in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)._make(detached(v, found) for v in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return {k: detached(v, found) for k, v in value.items()}
    return _copied(value)


def recalled(value: Any) -> Any:
    """An extra input for one recompute: the kept tensors themselves, and copies of what the branch may write to."""
    if type(value) in (list, tuple):
        return type(value)(recalled(v) for v in value)
    if type(value) is dict:
        return {k: recalled(v) for k, v in value.items()}
    return value if isinstance(value, (Tensor, tuple)) else _copied(value)


def _copied(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else snapshot(value)


def is_stateful(value: Any) -> bool:
    """Whether a call may write to an argument that is no container."""
    return not isinstance(value, (Tensor, nn.Module, *_PLAIN))
