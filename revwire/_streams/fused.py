"""The arithmetic of fixed-point streams on a GPU in one pass over memory each, by Triton where that is installed.

What it gives has the bits of the plain form (`fixed`), which remains the reference: so step and unstep may be of either
form. Only the sums of a state differ, which count other parts of it.

Note [Out of range on a GPU]
    A kernel tells the largest magnitudes that it met (`Stepped.reached`), for the check that is read later. Meanwhile a
    value out of range is NaN, in its own place, and its state is an integer that no other value has: whatever is
    computed from it is NaN again, also where a branch takes NaN for a number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from math import ldexp
from typing import Any

import torch
from torch import Tensor, nn

from revwire._streams.base import Scaled, Stepped, Undone, is_dense

INTERPRETED = os.environ.get("REVWIRE_KERNELS") == "interpreted"
"""For tests: the kernels run on the CPU, by Triton's interpreter (which wants ``TRITON_INTERPRET=1`` too)."""


_BLOCK, _FLAT = 256, 1024
"""Columns of a tile, and elements of a program without tiles."""


_INTERPRETED_BLOCK = 1 << 12
"""At most so many for the interpreter, whose operations take long however few elements they have."""


_KINDS, _BRANCHES = (Tensor, nn.Parameter), (torch.float32, torch.bfloat16, torch.float16)


_EMPTY: AbstractContextManager[Any] = nullcontext()


def available() -> bool:
    """Whether the kernels can be compiled; ``REVWIRE_KERNELS=0`` in the environment turns them off."""
    return os.environ.get("REVWIRE_KERNELS", "1") != "0" and find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return (device.type == "cuda" or INTERPRETED) and available() and _compiles_for(device)


@lru_cache(maxsize=32)
def _compiles_for(device: torch.device) -> bool:
    """Whether Triton can: it needs a C compiler, and a GPU that it knows."""
    try:
        return summed(torch.zeros(8, dtype=torch.int32, device=device)).tolist() == [0]
    except Exception as error:  # noqa: BLE001 (whatever compilers raise)
        warnings.warn(
            f"Triton: got {type(error).__name__} on {device} ({error}); expected kernels for the streams of reversible "
            "chains. The plain arithmetic computes the same, in a dozen kernels a step. Triton needs a C compiler; "
            "REVWIRE_KERNELS=0 turns its kernels off",
            stacklevel=2,
        )
        return False


def suits(*tensors: Tensor) -> bool:
    """Whether these tensors (streams, their values) are what the kernels work on: dense, of one layout, of 32 bits."""
    layout = tensors[0].stride()
    for t in tensors:
        plain = type(t) is Tensor and (t.dtype is torch.int32 or t.dtype is torch.float32)
        if not (plain and (t.is_cuda or INTERPRETED) and t.stride() == layout and t.numel()):
            return False
    return True


def advance(previous: Tensor, x: Tensor, f: Tensor, rule: Scaled, *, keep: bool, dtype: torch.dtype) -> Stepped:
    """X_{k+1} = round(2^K·(a·x + c·f)) ± ((X_{k-1} + h) >> m), as `base` defines it; ``keep`` the m low bits of
    X_{k-1} + h. ``x`` may be the state of x_k instead of its value. The value of x_{k+1} has this ``dtype``.
    """
    n, f, (a, c, unit, m, negative) = previous.numel(), _like(f, x), rule
    span, tiles, block = _tiles(n)
    state, value = torch.empty_like(previous), torch.empty_like(x, dtype=dtype)
    found = previous.new_empty(2, tiles)
    bits = previous.new_empty(span * m, dtype=torch.uint8) if m and keep else None
    with _on(previous):
        _kernels().advance[(tiles,)](
            *(previous, x, f, state, value, state if bits is None else bits, found[0], found[1], n, span),
            *(a, c, unit),
            M=m,
            NEGATIVE=negative,
            ADDS=a != 0,
            KEEP=bits is not None,
            SPELLED=INTERPRETED,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return Stepped(state, value, bits, found[0], reached=found[1].view(torch.float32))


def retreat(following: Tensor, x: Tensor, f: Tensor, rule: Scaled, bits: Tensor | None) -> Undone:
    """X_{k-1}, the inverse of `advance`, and its sums; ``x`` may be the state of x_k instead of its value."""
    n, f, out = following.numel(), _like(f, x), torch.empty_like(following)
    a, c, unit, m, negative = rule
    span, tiles, block = _tiles(n)
    sums = following.new_empty(tiles)
    with _on(following):
        _kernels().retreat[(tiles,)](
            *(following, x, f, following if bits is None else bits, out, sums, n, span),
            *(a, c, unit),
            M=m,
            NEGATIVE=negative,
            ADDS=a != 0,
            SPELLED=INTERPRETED,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return Undone(out, sums)


def read(state: Tensor, scale: int) -> Tensor:
    """The float32 value of a state."""
    value, n = torch.empty_like(state, dtype=torch.float32), state.numel()
    block = _block(n, _FLAT)
    with _on(state):
        _kernels().read[(-(-n // block),)](state, value, n, ldexp(1.0, -scale), BLOCK=block)
    return value


def summed(state: Tensor) -> Tensor:
    """The sums of a state, as `advance` and `retreat` give them."""
    n = state.numel()
    span, tiles, block = _tiles(n)
    sums = state.new_empty(tiles)
    with _on(state):
        _kernels().summed[(tiles,)](state, sums, n, span, BLOCK=block)
    return sums


def sampled(f: Tensor, saved: Sequence[Tensor], elements: int, fewer: int) -> Tensor | None:
    """At most ``elements`` numbers of ``f`` and ``fewer`` of each of at most two others, as `samples.spread` takes
    them; None where this form does not do.
    """
    places: list[int] = []
    most = elements
    for t in (f, *saved):
        if not (type(t) in _KINDS and t.dtype in _BRANCHES and (t.is_cuda or INTERPRETED) and t.device == f.device):
            return None
        places += _spread(t, most)
        most = fewer
    if not places[0]:
        return None
    total = sum(places[::2])
    out = torch.empty(total, dtype=torch.float32, device=f.device)
    tensors = [t.detach() for t in (f, *saved, *[f] * (2 - len(saved)))]
    with _on(f):
        _kernels().sample[(1,)](out, *tensors, *places, *[0, 1] * (2 - len(saved)), ELEMENTS=elements, FEWER=fewer)
    return out


def _spread(t: Tensor, most: int) -> tuple[int, int]:
    """How many numbers of a tensor are looked at, and their distance."""
    n = t.numel()
    extent = n if t.is_contiguous() else 1 + sum((k - 1) * s for k, s in zip(t.shape, t.stride(), strict=True))
    count = min(most, extent, n)
    return count, max(extent // max(count, 1), 1)


def multiples(g: Tensor, wanted: Sequence[tuple[float, torch.dtype]]) -> list[Tensor] | None:
    """Up to three multiples of a gradient, each in a dtype of its own; None where this form does not do."""
    plain = type(g) in _KINDS and g.dtype in _BRANCHES and (g.is_cuda or INTERPRETED) and g.numel()
    if not plain or any(dtype not in _BRANCHES for _, dtype in wanted) or not is_dense(g):
        return None
    g, n = g.detach(), g.numel()
    outs = [torch.empty_like(g, dtype=dtype) for _, dtype in wanted]
    spare = 3 - len(outs)
    factors = [factor for factor, _ in wanted] + [0.0] * spare
    there = dict(zip(("FIRST", "SECOND", "THIRD"), [True] * len(outs) + [False] * spare, strict=True))
    block = _block(n, _FLAT)
    with _on(g):
        _kernels().scale[(-(-n // block),)](g, *outs, *[g] * spare, n, *factors, **there, BLOCK=block)
    return outs


def _tiles(n: int) -> tuple[int, int, int]:
    """The elements of a row, the number of tiles, and the columns of each."""
    span = -(-n // 8)
    block = _block(span, _BLOCK)
    return span, -(-span // block), block


def _block(n: int, block: int) -> int:
    """How many elements a program has side by side."""
    return min(_INTERPRETED_BLOCK, 1 << (n - 1).bit_length()) if INTERPRETED else block


def _like(f: Tensor, x: Tensor) -> Tensor:
    """``f`` as the kernels read it: in the layout of ``x``, in at most 32 bits."""
    f = f.detach()
    narrow = f.dtype in _BRANCHES
    if narrow and f.stride() == x.stride() and type(f) is Tensor:
        return f
    return torch.empty_like(x, dtype=f.dtype if narrow else torch.float32).copy_(f)


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device. (NumPy, which interprets, warns of what is not finite.)"""
    if INTERPRETED and not t.is_cuda:
        import numpy as np

        return np.errstate(all="ignore")
    if t.device.index == torch.cuda.current_device():
        return _EMPTY
    return torch.cuda.device(t.device)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from revwire._streams import tiles

    return tiles
