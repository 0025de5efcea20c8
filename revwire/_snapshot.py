"""Copies of stateful arguments (key-value caches, say): new containers around the same, detached tensors.

A call may write to such an object. A capture, and every recompute, must find it as the forward pass found it, and must not
write to the caller's. In-place writes to the tensors inside are not undone; they change a recompute, which is detected.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def snapshot(obj: Any) -> Any:
    """``obj`` with its structure copied and its tensors detached, not copied. Modules and what cannot be copied are shared."""
    memo: dict[int, Any] = {}
    _share(obj, memo, set())
    try:
        return copy.deepcopy(obj, memo)
    except Exception:  # a lock, a generator, a handle: it has no state that a copy could keep
        return obj


def _share(obj: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Tell `copy.deepcopy` what to take for each tensor and module inside ``obj``."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    if isinstance(obj, Tensor):
        memo[id(obj)] = obj.detach()
    elif isinstance(obj, nn.Module):
        memo[id(obj)] = obj
    elif isinstance(obj, (list, tuple, set)):
        for item in obj:
            _share(item, memo, seen)
    elif isinstance(obj, dict):
        for item in obj.values():
            _share(item, memo, seen)
    elif hasattr(obj, "__dict__"):
        _share(vars(obj), memo, seen)
