"""The arithmetic of fixed-point streams on the CPU in one pass over memory, compiled by Numba where that is installed.

`base` says what is computed; its plain form, one PyTorch call after the other, is the reference. Each of its dozen
calls reads and writes a whole stream, most of them into new memory; here each stream is read once and written once. The
rounding of a·x + c·f may differ from the plain form in its last bit (PyTorch's CPU kernels fuse that multiplication and
addition). Step and unstep must therefore both be of this form, or both of the other: `FixedStreams.form` says
which.

The kernels (`native`) work on the flat memory of dense tensors. Their results are new tensors, so no version counter is
passed over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from math import ldexp
from typing import Any

import torch
from torch import Tensor, nn

from revwire._streams.base import Scaled, Stepped, Undone
from revwire._streams.bits import SEGMENTS, layout_of

_NATIVE = "revwire._streams.native"


_FLOAT, _DTYPES, _KINDS = torch.float32, (torch.int32, torch.float32, torch.int64), (Tensor, nn.Parameter)


_LEAST_PER_THREAD = 1 << 21
"""Elements below which another thread costs more than it saves: one thread is bound by the memory, and OpenMP's wait
beside it.
"""


_PIECE = 1 << 14
"""Elements of a stream that are converted at a time."""


def available() -> bool:
    """Whether the kernels can be compiled here; ``REVWIRE_KERNELS=0`` in the environment turns them off."""
    return os.environ.get("REVWIRE_KERNELS", "1") != "0" and find_spec("numba") is not None


def suits(*tensors: Tensor) -> bool:
    """Whether these tensors (streams, their values) are what the kernels work on: dense, of one layout, on the CPU."""
    layout = tensors[0].stride()
    for t in tensors:
        plain = type(t) is Tensor and t.dtype in _DTYPES
        if not (plain and t.is_cpu and t.stride() == layout):
            return False
    return True


def advance(previous: Tensor, x: Tensor, f: Tensor, rule: Scaled, *, keep: bool, dtype: torch.dtype) -> Stepped:
    """X_{k+1} = round(2^K·(a·x + c·f)) ± ((X_{k-1} + h) >> m), as `base` defines it; ``keep`` what it takes to
    come back: the m low bits of X_{k-1} + h, and the sums of X_{k-1} that will tell whether it came out right.

    ``x`` may be the state of x_k instead of its value. The value of x_{k+1} has this ``dtype``. Where not all is in
    range, what it gives is undefined.
    """
    k, n, (a, c, unit, m, negative) = _native(), previous.numel(), rule
    like, half = k.LIKE[previous.itemsize], 1 << m >> 1
    state, value = torch.empty_like(previous), torch.empty_like(x, dtype=dtype)
    sums = torch.empty(SEGMENTS, dtype=previous.dtype) if keep else None
    numbers = (a, c, unit, m, half, -1 if negative else 1, like)
    to_previous, to_state, to_sums = previous.data_ptr(), state.data_ptr(), 0 if sums is None else sums.data_ptr()
    if _is_float(x, f) and dtype is _FLOAT:
        given = to_previous, x.data_ptr(), f.data_ptr(), to_state, value.data_ptr(), to_sums
        reached = _in_parts(k.advance, numbers, n, given)
    else:
        values = _flat(value)

        def piece(first: int, last: int, low: int, high: int, to_x: int, to_f: int) -> int:
            made = values[low:high] if dtype is _FLOAT else torch.empty(high - low)
            to_value = made.data_ptr() - low * _FLOAT.itemsize
            found = k.advance(*numbers, n, first, last, to_previous, to_x, to_f, to_state, to_value, to_sums)
            if dtype is not _FLOAT:
                values[low:high].copy_(made)
            return int(found)

        reached = _in_pieces(piece, x, f, unit)
    bits = None
    if m and keep:
        size = -(-n // 8) * m
        bits = torch.empty(size, dtype=torch.uint8)
        layout = layout_of(n, m)
        k.pack(like, n, to_previous, layout.rows, layout.address, half, size, bits.data_ptr())
    return Stepped(state, value, bits, sums, min(reached) >= 0, max(reached) * unit)


def retreat(following: Tensor, x: Tensor, f: Tensor, rule: Scaled, bits: Tensor | None) -> Undone:
    """X_{k-1}, the inverse of `advance`, and its sums; ``x`` may be the state of x_k instead of its value."""
    k, n, (a, c, unit, m, negative) = _native(), following.numel(), rule
    out, sums = torch.empty_like(following), torch.empty(SEGMENTS, dtype=following.dtype)
    like = k.LIKE[following.itemsize]
    numbers = (a, c, m, 1 << m >> 1, -1 if negative else 1, like)
    to_following, to_out, to_sums = following.data_ptr(), out.data_ptr(), sums.data_ptr()
    if _is_float(x, f):
        _in_parts(k.retreat, numbers, n, (to_following, x.data_ptr(), f.data_ptr(), to_out, to_sums))
    else:

        def piece(first: int, last: int, low: int, high: int, to_x: int, to_f: int) -> int:
            return int(k.retreat(*numbers, n, first, last, to_following, to_x, to_f, to_out, to_sums))

        _in_pieces(piece, x, f, unit)
    if m:
        assert bits is not None
        layout = layout_of(n, m)
        k.unpack(like, bits.numel(), bits.data_ptr(), layout.rows, layout.address, n, to_out, to_sums)
    return Undone(out, sums)


def _is_float(x: Tensor, f: Tensor) -> bool:
    """Whether a kernel reads both as they lie."""
    return x.dtype is _FLOAT is f.dtype and x.stride() == f.stride() and type(f) is Tensor


def _in_pieces(kernel: Callable[..., int], x: Tensor, f: Tensor, unit: float) -> tuple[int, ...]:
    """As `_in_parts`, a few segments at a time, so that no value of a whole stream is there.

    Args:
        kernel: is given the first and the last segment of a piece, its first and its last element, and the addresses at
            which the values of x_k and of the branch would begin.
        x: values of x_k, or its state.
        f: what the branch gave.
        unit: 2^-K.
    """
    n = x.numel()
    f = f if f.stride() == x.stride() and type(f) is Tensor else torch.empty_like(x, dtype=f.dtype).copy_(f.detach())
    xs, fs, step = _flat(x), _flat(f.detach()), max(1, SEGMENTS // max(1, n // _PIECE))

    def piece(first: int, last: int) -> int:
        low, high = n * first // SEGMENTS, n * last // SEGMENTS
        at, with_ = _value(xs[low:high], unit), fs[low:high].to(_FLOAT)
        before = low * _FLOAT.itemsize
        return kernel(first, last, low, high, at.data_ptr() - before, with_.data_ptr() - before)

    def share(_: int, first: int, last: int) -> int:
        found = [piece(a, min(a + step, last)) for a in range(first, last, step)]
        return -1 if min(found) < 0 else max(found)

    return _in_parts(share, (), n, ())


def _flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return t.as_strided((t.numel(),), (1,))


def _value(x: Tensor, unit: float) -> Tensor:
    """Some values of a stream, from these or from their states."""
    return x if x.dtype is _FLOAT else x.to(_FLOAT).mul_(unit)


def read(state: Tensor, scale: int) -> Tensor:
    """The float32 value of a state."""
    value = torch.empty_like(state, dtype=torch.float32)
    k = _native()
    _in_parts(k.read, (ldexp(1.0, -scale), k.LIKE[state.itemsize]), state.numel(), (state.data_ptr(), value.data_ptr()))
    return value


def summed(state: Tensor) -> Tensor:
    """The sums of a state, as `advance` and `retreat` give them."""
    k, sums = _native(), torch.empty(SEGMENTS, dtype=state.dtype)
    _in_parts(k.summed, (k.LIKE[state.itemsize],), state.numel(), (state.data_ptr(), sums.data_ptr()))
    return sums


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two byte tensors on the CPU, dense and of one size, are equal: in the compiled form where that is in
    use.
    """
    size, native = a.numel(), sys.modules.get(_NATIVE)
    if size % 8 or b.numel() != size:
        return torch.equal(a, b)
    if native is None:
        return torch.equal(a.view(torch.int64), b.view(torch.int64))  # comparing words is four times as fast
    return bool(native.same(size // 8, a.data_ptr(), b.data_ptr()))


def sampled(f: Tensor, saved: Sequence[Tensor], elements: int, fewer: int) -> Tensor | None:
    """``elements`` numbers of ``f`` and ``fewer`` of each of at most two others, at equal distances; None where this
    form does not do.
    """
    steps: list[int] = []
    count = elements
    for t in (f, *saved):
        n = t.numel()
        plain = type(t) in _KINDS  # others may have no memory of their own
        if not plain or n < count or t.dtype is not _FLOAT or not t.is_cpu or not t.is_contiguous():
            return None
        steps += t.data_ptr(), n // count
        count = fewer
    steps += [0, 1] * (2 - len(saved))
    out = torch.empty(elements + fewer * len(saved), dtype=torch.float32)
    _native().sample(out.data_ptr(), *steps, elements, fewer)
    return out


def _in_parts(
    kernel: Callable[..., int], numbers: tuple[float, ...], n: int, addresses: tuple[int, ...]
) -> tuple[int, ...]:
    """Run a kernel on the segments of a stream, shared by threads if there is enough to do; what it gives for each
    share.
    """
    if n < 2 * _LEAST_PER_THREAD:
        return (kernel(*numbers, n, 0, SEGMENTS, *addresses),)
    threads = min(torch.get_num_threads(), n // _LEAST_PER_THREAD, SEGMENTS)
    if threads < 2:
        return (kernel(*numbers, n, 0, SEGMENTS, *addresses),)
    bounds = [SEGMENTS * i // threads for i in range(threads + 1)]
    return tuple(_pool(os.getpid(), threads).map(lambda part: kernel(*numbers, n, *part, *addresses), pairwise(bounds)))


@lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="revwire")


@lru_cache(maxsize=1)
def _native() -> Any:
    from revwire._streams import native

    return native
