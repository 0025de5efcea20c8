"""Steps that allocate what they would, and multiply nothing: for peak bytes of networks whose arithmetic would take hours.

What a step allocates follows from shapes, not from values. Inside of `products_left_out`, matrix products on the CPU return zeros of the
right shape; everything else runs (convolutions too: they have workspaces of their own). Where such a kernel allocated something for
itself, it would show in `difference`, which every record of a sweep has for a small case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from revwire.measure import peak_bytes


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_zeros(a.shape[0], b.shape[1])


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return a.new_zeros(a.shape[0], b.shape[1])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])


@contextmanager
def products_left_out() -> Iterator[None]:
    """In this context, matrix products of CPU tensors give zeros."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, kernel in {"mm": _mm, "addmm": _addmm, "bmm": _bmm}.items():
            library.impl(name, kernel, "CPU")
        yield
    finally:
        library._destroy()


def difference(step: Callable[[], None]) -> int:
    """Peak bytes of a step with its products, less those without."""
    full = peak_bytes(step)
    with products_left_out():
        return full - peak_bytes(step)
