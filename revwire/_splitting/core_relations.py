"""Relations between sizes, by which a core is known again at other shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from revwire._capture.recording import Value

_DROPS = (functional.dropout, torch.dropout)


_MOST_WAYS = 64


_MOST_KNOWN = 4096


_EXACT = 2**22  # elements up to which calls are tried in double precision


_SIZED = ("view", "reshape", "expand", "unflatten", "repeat")


class Relation(NamedTuple):
    """What a part of a call's result needs: the dimension of each input along which it needs the same part (None: all
    of it).

    ``size``: the place among the call's constants of the number that stands for the size of the parted dimension, if
    there is one.
    """

    dims: tuple[int | None, ...]
    size: int | None = None


Known = dict[Any, Relation | None]
"""The relations that were found, by call and shapes."""


def _aligned(own: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of an input that is broadcast to ``shape``, of which it needs the same part; None: it is the same
    for all.
    """
    d = dim - (len(shape) - len(own))
    return d if d >= 0 and own[d] == shape[dim] else None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _random(value: Value, device: torch.device, most: int, *, wide: bool) -> Tensor:
    """Random values, larger towards the end of each dimension; integers below ``most``."""
    if value.dtype is torch.bool:
        return torch.rand(value.shape, device=device) < 0.5
    if _is_integer(value.dtype):
        return torch.randint(0, max(1, most), value.shape, dtype=value.dtype, device=device)
    if value.dtype.is_complex:
        dtype = torch.complex128 if wide or value.dtype == torch.complex128 else torch.complex64
    else:
        dtype = torch.float64 if wide or value.dtype == torch.float64 else torch.float32
    out = torch.randn(value.shape, dtype=dtype, device=device)
    for d, size in enumerate(value.shape):
        out *= torch.linspace(1, 3, size, device=device).view([-1 if i == d else 1 for i in range(out.dim())])
    return out


def _constants(node: fx.Node) -> list[Any]:
    out: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: out.append(a))
    return out


def _with_size(node: fx.Node, number: int | None, size: Any) -> tuple[Any, Any]:
    """The arguments of a call, with the number at a place among them replaced."""
    count = iter(range(1 << 30))
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: size if next(count) == number else a)
    return args, kwargs
