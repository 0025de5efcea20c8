"""A twin of a model, to be rewired and measured in its stead: modules and buffers of its own, and the same weights.

Note [A twin]
    Parameters of a twin are tensors of its own in the memory of the model's, so that weights exist once, and that
    neither ``.grad`` nor hooks of the model's are touched by a backward pass of the twin. Attributes are deep copies in
    which the model's modules and tensors are exchanged for the twin's, bound methods included; what cannot be copied (a
    lock, a handle) is shared. What reaches the model in other ways (a closure over one of its modules) makes a twin
    that is another model: whoever takes one compares. Modules that `nn.Module.compile` has compiled run as they were
    written.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revwire._capture.arguments import fresh_arguments
from revwire._structures import mapped, tensors_in

M = TypeVar("M", bound=nn.Module)


def twin_of(model: M) -> M:
    """A twin of a model; see Note [A twin]."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    others: list[Any] = [object.__new__(type(m)) for m in modules]
    known: dict[int, Any] = {id(m): other for m, other in zip(modules, others, strict=True)}
    known.update({id(p): _lent(p) for p in model.parameters()})
    states = [_state(m) for m in modules]
    found = {id(t): t for state in states for t in _tensors(state) if id(t) not in known}
    known.update(zip(found, fresh_arguments([*found.values()]), strict=True))
    for other, state in zip(others, _copies(states, known), strict=True):
        other.__setstate__(state)
    return known[id(model)]  # type: ignore[no-any-return]


def _lent(p: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory; one of a class of its own is shared."""
    if type(p) is not nn.Parameter:
        return p
    lent = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    vars(lent).update(vars(p))
    return lent


def _state(module: nn.Module) -> dict[str, Any]:
    """What makes a module, as copies and pickles take it."""
    try:
        return dict(module.__getstate__())  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - modules that are not to be pickled say so in any way
        return dict(vars(module))


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [t for t in tensors_in(state) if not isinstance(t, nn.Parameter)]


def _copies(states: list[dict[str, Any]], known: dict[int, Any]) -> list[dict[str, Any]]:
    """Deep copies in which ``known`` says by what some objects are exchanged; what cannot be copied is shared."""
    try:
        return copy.deepcopy(states, dict(known))
    except Exception:  # noqa: BLE001 - in any way
        return mapped(states, lambda leaf: _copied(leaf, known))  # type: ignore[no-any-return]


def _copied(leaf: Any, known: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(leaf, dict(known))
    except Exception:  # noqa: BLE001 - a lock, a generator, a handle
        return leaf
