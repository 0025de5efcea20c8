"""The arithmetic of fixed-point streams on the CPU in one pass over memory, compiled by Numba where that is installed.

`_numerics` says what is computed; its plain form, one PyTorch call after the other, is the reference. Each of its dozen
calls reads and writes a whole stream, most of them into new memory; here each stream is read once and written once. The
rounding of a·x + c·f may differ from the plain form in its last bit (PyTorch's CPU kernels fuse that multiplication and
addition). Step and unstep must therefore both be of this form, or both of the other: `FixedStreams.compiled` says which.

The kernels work on the flat memory of dense tensors. Their results are new tensors, so no version counter is passed over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from math import ldexp
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LEAST_PER_THREAD = 1 << 21
"""Elements below which another thread costs more than it saves: one thread is bound by the memory, and OpenMP's wait beside it."""

_LIMIT = 1 << 30
"""Integers stay below this magnitude, so that two of them can be added."""


class Advanced(NamedTuple):
    """The state of x_{k+1}, its float value, the kept bits; and whether all values are in range (else the rest is undefined)."""

    state: Tensor
    value: Tensor
    bits: Tensor | None
    in_range: bool


def available() -> bool:
    """Whether the kernels can be compiled here; ``REVWIRE_KERNELS=0`` in the environment turns them off."""
    return os.environ.get("REVWIRE_KERNELS", "1") != "0" and find_spec("numba") is not None


def suits(*tensors: Tensor) -> bool:
    """Whether these tensors (streams, their values) are what the kernels work on: dense, of one layout, on the CPU."""
    layout = tensors[0].stride()
    return all(
        t.device.type == "cpu" and t.dtype in (torch.int32, torch.float32) and t.stride() == layout and type(t) is Tensor for t in tensors
    )


def advance(previous: Tensor, x: Tensor, f: Tensor, a: float, c: float, m: int, *, negative: bool, scale: int, keep: bool) -> Advanced:
    """X_{k+1} = round(2^K·(a·x + c·f)) ± ((X_{k-1} + h) >> m), as `_numerics` defines it; ``keep`` the m low bits."""
    k = _compiled()
    state, value = torch.empty_like(previous), torch.empty_like(x)
    numbers = k.numbers(a, c, m, negative, scale)
    in_range = _in_parts(k.advance, (previous, x, _like(f, x), state, value), numbers)
    bits = None
    if m and keep:
        bits = torch.empty(-(-previous.numel() // 8) * m, dtype=torch.uint8)
        k.pack(_flat(previous), _groups(previous.numel(), m), numbers[4], _flat(bits))
    return Advanced(state, value, bits, in_range)


def retreat(
    following: Tensor, x: Tensor, f: Tensor, a: float, c: float, m: int, bits: Tensor | None, *, negative: bool, scale: int
) -> Tensor:
    """X_{k-1}, the inverse of `advance`."""
    k, out = _compiled(), torch.empty_like(following)
    if m:
        assert bits is not None
        k.unpack(_flat(bits), _groups(out.numel(), m), _flat(out))
    _in_parts(k.retreat, (following, x, _like(f, x), out), k.numbers(a, c, m, negative, scale))
    return out


def read(state: Tensor, scale: int) -> Tensor:
    """The float32 value of a state."""
    k, value = _compiled(), torch.empty_like(state, dtype=torch.float32)
    _in_parts(k.read, (state, value), k.numbers(0.0, 0.0, 0, False, scale))
    return value


@lru_cache(maxsize=64)
def _groups(n: int, m: int) -> Any:
    """The layout of `_bits.pack_bits` for n values of m bits: planes of 4, 2 and 1 bits; the values that share a byte lie far apart.

    Returns:
        A row for each group of values that have the same place in their bytes: the first byte and the end of the plane, the group's
        first value, the shift and the mask that cut its bits out, the shift to their place in the byte, whether it is the plane's first.
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
    return np.array(rows, dtype=np.int64)


def _like(f: Tensor, x: Tensor) -> Tensor:
    return f if f.dtype == x.dtype and f.stride() == x.stride() else torch.empty_like(x).copy_(f.detach())


def _flat(x: Tensor) -> Any:
    """The memory of a dense tensor, as a NumPy array of one dimension."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()


def _in_parts(kernel: Any, tensors: tuple[Tensor, ...], numbers: Any) -> bool:
    """Run a kernel on these tensors, cut into one part for each thread if there is enough to do; whether it says True of all."""
    arrays, n = [_flat(t) for t in tensors], tensors[0].numel()
    threads = min(torch.get_num_threads(), n // _LEAST_PER_THREAD)
    if threads < 2:
        return bool(kernel(numbers, *arrays))
    bounds = [n * i // threads for i in range(threads + 1)]
    parts = [[array[lo:hi] for array in arrays] for lo, hi in pairwise(bounds)]
    return all(list(_pool(os.getpid(), threads).map(lambda part: kernel(numbers, *part), parts)))


@lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="revwire")


class _Kernels(NamedTuple):
    """The compiled functions; ``numbers`` packs the scalars of one step, in the dtypes that the kernels compute in."""

    advance: Any
    retreat: Any
    read: Any
    pack: Any
    unpack: Any
    numbers: Callable[[float, float, int, bool, int], tuple[Any, ...]]


@lru_cache(maxsize=1)
def _compiled() -> _Kernels:
    import numpy as np
    from numba import njit

    def compiled(function: Any) -> Any:
        try:
            return njit(nogil=True, error_model="numpy", cache=True)(function)
        except RuntimeError:  # there is no folder that a cache could be kept in
            return njit(nogil=True, error_model="numpy")(function)

    rint, int32, uint8, float32 = np.rint, np.int32, np.uint8, np.float32
    limit, top, zero = float32(_LIMIT), int32(_LIMIT), float32(0)

    def numbers(a: float, c: float, m: int, negative: bool, scale: int) -> tuple[Any, ...]:
        factors = (float32(ldexp(a, scale)), float32(ldexp(c, scale)), float32(ldexp(1.0, -scale)))
        return (*factors, int32(m), int32(1 << m >> 1), int32(-1 if negative else 1))

    @compiled
    def advance(numbers, previous, x, f, state, value):  # type: ignore[no-untyped-def]
        a, c, one, m, half, sign = numbers
        outside = int32(0)
        for j in range(len(previous)):
            wide = rint(f[j] * c + x[j] * a)
            fits = abs(wide) < limit  # not so for NaN
            rounded = int32(wide if fits else zero)
            out = int32(rounded + int32(sign * int32(int32(previous[j] + half) >> m)))
            outside |= int32(not fits) | int32(out >= top) | int32(out <= -top)
            state[j] = out
            value[j] = float32(out) * one
        return outside == 0

    @compiled
    def retreat(numbers, following, x, f, out):  # type: ignore[no-untyped-def]
        a, c, _, m, half, sign = numbers
        mask = int32((int32(1) << m) - 1)
        for j in range(len(following)):
            wide = rint(f[j] * c + x[j] * a)
            rounded = int32(wide if abs(wide) < limit else zero)
            shifted = int32(int32(sign * int32(following[j] - rounded)) << m)
            out[j] = int32(int32(shifted | int32(out[j] & mask)) - half)
        return True

    @compiled
    def read(numbers, state, value):  # type: ignore[no-untyped-def]
        one = numbers[2]
        for j in range(len(state)):
            value[j] = float32(state[j]) * one
        return True

    @compiled
    def pack(previous, groups, half, packed):  # type: ignore[no-untyped-def]
        n = len(previous)
        for g in range(len(groups)):
            start, end, first, shift, left, mask, fresh = groups[g]
            plane = packed[start:end]
            part = previous[first : max(first, min(n, first + len(plane)))]
            for j in range(len(part)):
                low = uint8(int32(int32(int32(part[j] + half) >> int32(shift)) & int32(mask)) << int32(left))
                plane[j] = low if fresh else plane[j] | low
            if fresh:
                plane[len(part) :] = 0

    @compiled
    def unpack(packed, groups, out):  # type: ignore[no-untyped-def]
        n = len(out)
        for g in range(len(groups)):
            start, end, first, shift, left, mask, _ = groups[g]
            plane = packed[start:end]
            part = out[first : max(first, min(n, first + len(plane)))]
            for j in range(len(part)):
                low = int32(int32(uint8(plane[j] >> uint8(left)) & uint8(mask)) << int32(shift))
                part[j] = part[j] | low if shift else low

    return _Kernels(advance, retreat, read, pack, unpack, numbers)
