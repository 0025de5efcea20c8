"""Which kernels multiply by a matrix, convolve or attend: the calls that take most of a branch's time.

Below autograd, PyTorch runs a few kernels for all of these. Above it, or in inference mode, a call may be seen under
the name that its caller used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_MATRICES = ("mm", "addmm", "bmm", "baddbmm", "convolution")


_VECTORS = ("mv", "addmv", "dot")


_ABOVE_AUTOGRAD = ("matmul", "linear", "_convolution")


_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def _packets(*names: str) -> Iterator[Any]:
    """The operators of these names, as far as this build of PyTorch has them."""
    return (getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))


PRODUCTS = frozenset(_packets(*_MATRICES, *_VECTORS, *_ABOVE_AUTOGRAD))
"""Operators, of any overload, that multiply by a matrix or convolve."""


COSTLY = frozenset(packet.default for packet in _packets(*_MATRICES, *_ATTENTION))
"""Kernels below autograd whose results are few and whose time is most of a branch's: worth keeping, not computing."""
