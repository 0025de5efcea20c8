"""A branch again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from revwire._errors import ReconstructionError
from revwire._runtime.entries import UnitRecord
from revwire._runtime.following import unfollowed
from revwire._runtime.unit import evaluate
from revwire._surroundings.attributes import attributes_as_found
from revwire._surroundings.buffers import buffers_exchanged
from revwire._surroundings.copies import recalled
from revwire._surroundings.inventory import Place
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.weights import put_back

_OTHER_CALLS = "its recompute made other calls", "those of the forward"


class _Again(NamedTuple):
    """A second evaluation of a branch: the float value of x_k, F_k(x_k), the witnesses among what it saved.

    Where it stopped early there is no F_k(x_k), but glances at what it saved.
    """

    x: Tensor
    f: Tensor | None
    witnesses: list[Tensor]
    looks: list[Tensor]


class _Enough(BaseException):
    """Ends a recompute when all is there that its gradient needs. No `Exception`, so that few handlers in a branch take
    it for a fault.
    """


class _UntilEnough:
    """Around a recompute, which makes a graph: when there is ``enough``, whatever ends it does (TorchScript hides
    `_Enough` in another).
    """

    __slots__ = ("before", "enough")

    def __init__(self) -> None:
        self.enough = False

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        torch._C._set_grad_enabled(self.before)
        return self.enough and kind is not None and not issubclass(kind, (KeyboardInterrupt, SystemExit))


class _CheckpointWatch(TorchFunctionMode):
    """Finds out whether a run passes through non-reentrant activation checkpointing."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.found |= hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")
        return func(*args, **(kwargs or {}))


def branch_again(record: UnitRecord, x: Tensor) -> Tensor:
    """F_k(x), in the shape of ``x``."""
    if record.replay is None:
        return evaluate(record.unit, record.host, x, tuple(map(recalled, record.extras)) if record.extras else ())[0]
    with unfollowed():
        f = record.replay(x)
    return f if f.shape == x.shape else f.expand_as(x)


@contextmanager
def _modules_found(record: UnitRecord, gone: list[Place]) -> Iterator[None]:
    with (
        put_back(gone) if gone else NOTHING,
        buffers_exchanged(record.owned.writers, record.buffers) if record.owned.writers else NOTHING,
        attributes_as_found(record.attributes) if record.attributes else NOTHING,
    ):
        yield


def _modules_as_found(record: UnitRecord, gone: list[Place]) -> AbstractContextManager[None]:
    """Let a recompute find weights, buffers and attributes as the forward did, where anything of these may be
    another.
    """
    return _modules_found(record, gone) if gone or record.owned.writers or record.attributes else NOTHING


def _name(record: UnitRecord, weight: Tensor) -> str:
    names = (name for name, p in record.host.named_parameters() if p is weight)
    return next(names, "of the branch")


def _never(_: Any) -> Tensor:
    raise ReconstructionError("internal: the graph of a recompute was used; please report this")
