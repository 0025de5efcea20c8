"""Packing of the few low bits that a fixed-point step keeps: whole-tensor operations on bytes only, no loop over
elements.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEGMENTS = 64
"""A state has this many sums, one for each part of it."""


def pack_bits(state: Tensor, bits: int) -> Tensor:
    """The ``bits`` (1 to 7) low bits of every element of an integer tensor, packed: uint8, ``bits`` bytes per 8
    elements.

    They are cut into planes of 4, 2 and 1 bits; a plane is halved, one half beside the other, until its bytes are full.
    """
    low = _flat(state).to(torch.uint8)
    if low.numel() % 8:
        low = torch.nn.functional.pad(low, (0, -low.numel() % 8))
    planes, shift = [], 0
    for width in _planes(bits):
        planes.append(_squeeze(low >> shift if shift else low, width))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def unpack_bits(packed: Tensor, bits: int, like: Tensor) -> Tensor:
    """The inverse of `pack_bits`: an integer tensor of the shape, layout and dtype of ``like``."""
    size, shift = -(-like.numel() // 8), 0
    low = packed
    for width in _planes(bits):
        plane, packed = packed[: size * width], packed[size * width :]
        plane = _unsqueeze(plane, width)
        low = (plane << shift).bitwise_or_(low) if shift else plane
        shift += width
    out = torch.empty_like(like)
    _flat(out).copy_(low[: like.numel()])
    return out


def _planes(bits: int) -> list[int]:
    return [width for width in (4, 2, 1) if bits & width]


def _squeeze(low: Tensor, width: int) -> Tensor:
    """The ``width`` low bits of each byte, moved together until they fill bytes."""
    low = low & (1 << width) - 1
    while width < 8:
        half = low.numel() // 2
        low = (low[half:] << width).bitwise_or_(low[:half])
        width *= 2
    return low


def _unsqueeze(plane: Tensor, width: int) -> Tensor:
    """The inverse of `_squeeze`: one value a byte."""
    full = 8
    while full > width:
        full //= 2
        plane = torch.cat([plane & (1 << full) - 1, plane >> full])
    return plane


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one dimension, in storage order, without a copy."""
    return x.as_strided((x.numel(),), (1,))


class Layout(NamedTuple):
    """Rows of a table that the kernels read, and its address."""

    rows: int
    address: int
    table: Any  # it lies there as long as this lives


@lru_cache(maxsize=64)
def layout_of(n: int, m: int) -> Layout:
    """The layout of `pack_bits` for n values of m bits: planes of 4, 2 and 1 bits; the values that share a byte
    lie far apart.

    Returns:
        A row for each group of values that have the same place in their bytes: the first byte and the end of the plane,
        the group's first value, the shift and the mask that cut its bits out, the shift to their place in the byte,
        whether it is the plane's first.
    """
    import numpy as np

    rows, size, start, shift = [], -(-n // 8), 0, 0
    for width in (4, 2, 1):
        if m & width:
            for i in range(8 // width):
                first, left, span, wide, half = 0, 0, size * 4, width, i
                while wide < 8:
                    if half & 1:
                        first, left = first + span, left + wide
                    half, wide, span = half >> 1, wide * 2, span // 2
                rows.append((start, start + size * width, first, shift, left, (1 << width) - 1, i == 0))
            start, shift = start + size * width, shift + width
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    return Layout(len(table), table.ctypes.data, table)
