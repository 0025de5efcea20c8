"""Copies of stateful arguments (key-value caches, say): new containers around the same, detached tensors.

A call may write to such an object. A capture, and every recompute, must find it as the forward pass found it, and must not
write to the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def snapshot(obj: Any, tensor: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
    """``obj`` with its structure copied, and ``tensor`` applied to its tensors. Modules and what cannot be copied are shared.

    Tensors are only detached by default: in-place writes to them are not undone; they change a recompute, which is detected.
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
    elif isinstance(obj, (list, tuple, set)):
        for item in obj:
            _share(item, memo, seen, tensor)
    elif isinstance(obj, dict):
        for item in obj.values():
            _share(item, memo, seen, tensor)
    elif hasattr(obj, "__dict__"):
        _share(vars(obj), memo, seen, tensor)
