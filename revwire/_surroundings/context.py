"""Context variables: a run may have a context of its own, so that nobody sees what it sets, and a recompute has that of
its forward, on whatever thread autograd runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, copy_context
from copy import copy
from typing import Any, TypeVar

from torch import Tensor

_COPIED = (list, dict, set)

T = TypeVar("T")


def context_of_its_own(tensor: Callable[[Tensor], Tensor] | None = None) -> Context:
    """A copy of the present context, with copies of the containers among its variables: what hooks collect there in a
    run is not seen. ``tensor`` is applied to the tensors in it.
    """
    return _own(copy_context(), tensor)


def context_kept() -> Context | None:
    """The present context for a recompute; None where no variable is set.

    It holds no graph, which would keep the one alive that keeps it: but for those in objects of other kinds than
    containers, which it shares.
    """
    context = copy_context()
    return _own(context, _bare) if context else None


def run_again(context: Context | None, function: Callable[..., T], *args: Any) -> T:
    """Call a function in a context that was kept; what is set there, or put into its containers, is not seen."""
    return (Context() if context is None else _own(context.copy(), None)).run(function, *args)


def _own(context: Context, tensor: Callable[[Tensor], Tensor] | None) -> Context:
    for variable, value in list(context.items()):
        if isinstance(value, _COPIED) or (tensor and isinstance(value, (Tensor, tuple))):
            context.run(variable.set, _copied(value, tensor))
    return context


def _bare(t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.grad_fn is not None else t


def _copied(value: Any, tensor: Callable[[Tensor], Tensor] | None) -> Any:
    """A container, and the containers in it, copied; what else they hold is the same, but for tensors."""
    if tensor and isinstance(value, Tensor):
        return tensor(value)
    if type(value) is tuple:
        return tuple(_copied(item, tensor) for item in value)
    if not isinstance(value, _COPIED):
        return value
    out: Any = copy(value)
    items = out.items() if isinstance(out, dict) else enumerate(out) if isinstance(out, list) else ()
    for key, item in list(items):
        if isinstance(item, (*_COPIED, Tensor, tuple)):
            out[key] = _copied(item, tensor)
    return out
