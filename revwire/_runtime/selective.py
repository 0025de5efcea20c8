"""Selective recomputes: what products of matrices, convolutions and attention gave in a forward is handed out again,
not computed.

Note [Selective units]
    These calls take most of a branch's time, and what they give is a smaller part of what autograd keeps for it: norms,
    activation functions and dropout save as much again. A selective unit (by a memory budget) is a checkpointed one
    that keeps them too, so its recompute costs little. PyTorch's selective checkpointing
    (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) makes the same bargain. A call is seen below
    autograd, by a dispatch mode, in forward and again in the recompute: which makes a graph as ever, as autograd does
    not ask where results come from. Calls that draw random numbers run again, so that those after them draw what they
    drew. So does one whose result the branch goes on to write to (which version counters do not always tell: recurrent
    cells write through views that have counters of their own); and the last one, if its result is the branch's: a
    recompute stops before it.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from revwire._capture.products import COSTLY
from revwire._torch import TorchDispatchMode, arguments_of, storage_id, tree_flatten, tree_unflatten, version_shared


@lru_cache(maxsize=64)
def _dropout(func: Any) -> tuple[int, float] | None:
    """Where the probability of dropout stands among the arguments of a call, and its default; None where it has
    none.
    """
    for i, argument in enumerate(arguments_of(func)):
        if argument.name == "dropout_p":
            return i, argument.default_value
    return None


@lru_cache(maxsize=1024)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that a call writes to."""
    return tuple(
        (i, a.name) for i, a in enumerate(arguments_of(func)) if a.alias_info is not None and a.alias_info.is_write
    )


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    place = _dropout(func)
    if place is None:
        return torch.Tag.nondeterministic_seeded in func.tags
    number, default = place
    return bool(args[number] if number < len(args) else kwargs.get("dropout_p", default))


def _shared(t: Tensor) -> Tensor:
    """A tensor on the same memory, and with the same version counter, that belongs to no graph."""
    with version_shared():
        return t.detach()


class _Call:
    """A call that was seen, and what it gave: until it is known that this cannot be handed out again."""

    __slots__ = ("func", "leaves", "structure", "versions")

    def __init__(self, func: Any, out: Any) -> None:
        leaves, self.structure = tree_flatten(out)
        plain = all(
            type(leaf) is Tensor and leaf.layout == torch.strided for leaf in leaves if isinstance(leaf, Tensor)
        )
        self.func = func
        self.leaves: list[Any] | None = [_shared(t) if isinstance(t, Tensor) else t for t in leaves] if plain else None
        self.versions = self._now()

    def _now(self) -> list[int]:
        return [t._version for t in self.leaves or () if isinstance(t, Tensor)]

    @property
    def intact(self) -> bool:
        """Whether nobody has written to it."""
        return self._now() == self.versions

    def shares(self, t: Tensor) -> bool:
        """Whether part of it lies in the memory of ``t``, or that cannot be told."""
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided:
            return True
        memory = storage_id(t.untyped_storage())
        return any(isinstance(own, Tensor) and storage_id(own.untyped_storage()) == memory for own in self.leaves or ())

    def again(self) -> Any:
        """What it gave, for another graph."""
        return tree_unflatten([_shared(t) if isinstance(t, Tensor) else t for t in self.leaves or ()], self.structure)


class Products(TorchDispatchMode):
    """Around the forward of a branch: keeps what its products give; see Note [Selective units]."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place, name in _written(func) if self.calls else ():
            target = args[place] if place < len(args) else (kwargs or {}).get(name)
            self._forget([t for t in tree_flatten(target)[0] if isinstance(t, Tensor)])
        out = func(*args, **(kwargs or {}))
        if func in COSTLY and not _draws(func, args, kwargs or {}):
            self.calls.append(_Call(func, out))
        return out

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        for call in self.calls:
            if any(call.shares(t) for t in tensors):
                call.leaves = None

    def settle(self, f: Tensor) -> None:
        """After the forward, which gave ``f``."""
        self._forget([f])
        for call in self.calls:
            if not call.intact:
                call.leaves = None

    @property
    def intact(self) -> bool:
        """Whether nobody has written to what is kept."""
        return all(call.intact for call in self.calls if call.leaves is not None)

    def recalled(self, mismatch: Callable[[], Exception]) -> TorchDispatchMode:
        """Around a recompute; ``mismatch`` makes the error that says that its calls are others."""
        return _Recalled(self.calls, mismatch)


class _Recalled(TorchDispatchMode):
    def __init__(self, calls: Sequence[_Call], mismatch: Callable[[], Exception]) -> None:
        super().__init__()
        self.calls, self.mismatch, self.number = calls, mismatch, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in COSTLY or _draws(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        if self.number >= len(self.calls) or self.calls[self.number].func is not func:
            raise self.mismatch()
        call = self.calls[self.number]
        self.number += 1
        return func(*args, **(kwargs or {})) if call.leaves is None else call.again()
