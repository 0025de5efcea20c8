"""Packing of the few low bits that a fixed-point step keeps: whole-tensor operations on bytes only, no loop over elements."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(state: Tensor, bits: int) -> Tensor:
    """The ``bits`` (1 to 7) low bits of every element of an integer tensor, packed: uint8, ``bits`` bytes per 8 elements.

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
