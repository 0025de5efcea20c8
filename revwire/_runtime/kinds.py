"""Streams of a subclass of `torch.Tensor`: the arithmetic runs on plain tensors, and what is handed on is of the class.

Only classes that keep their data as any tensor does, and differ in what they carry along (the affine of a medical
image, a unit). Those that dispatch their operators themselves (shards, quantised tensors) stay what they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from revwire._surroundings.copies import OURS


class Kind(NamedTuple):
    """A class of tensors, and what one of them carries along."""

    cls: type[Tensor]
    carried: dict[str, Any]


def kind_of(x: Tensor) -> Kind | None:
    """The class of ``x``; None where it is a plain tensor, or one that dispatches its operators itself."""
    cls = type(x)
    if cls is Tensor or cls is nn.Parameter or cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    return Kind(cls, {name: value for name, value in vars(x).items() if name not in OURS})


def plain(x: Tensor) -> Tensor:
    """``x`` without its class."""
    return x if kind_of(x) is None else x.as_subclass(Tensor)


def dressed(x: Tensor, kind: Kind | None) -> Tensor:
    """``x`` as a tensor of this class."""
    if kind is None:
        return x
    out = x.as_subclass(kind.cls)
    vars(out).update(kind.carried)
    return out
