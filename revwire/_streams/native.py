"""The compiled loops of `kernels`. Imported where Numba is installed, when the first of them is to run.

They take addresses: making NumPy arrays of tensors costs more than the work on a small one. A stream is cut into
`SEGMENTS` parts, of each of which a loop can give the sum of the integers on its way, and between which threads share
the work.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,attr-defined"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from revwire._streams.bits import SEGMENTS

LIMIT = 1 << 30
"""Integers stay below this magnitude, so that two of them can be added."""


_rint, _int32, _int64, _uint8, _float32 = np.rint, np.int32, np.int64, np.uint8, np.float32


_limit, _top, _zero = np.float32(LIMIT), np.int32(LIMIT), np.float32(0)


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no folder that a cache could be kept in
        return njit(nogil=True, error_model="numpy")(function)


def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), code


_at: Any = intrinsic(_pointer)


@_compiled
def advance(a, c, one, m, half, sign, n, first, last, previous, x, f, state, value, sums):
    """The step of segments ``first`` to ``last`` of a stream of ``n`` elements.

    Returns:
        All bits that a magnitude of the new state has: less than twice the largest one. -1: a value is out of range.
    """
    a, c, one = _float32(a), _float32(c), _float32(one)
    m, half, sign, outside, reached = _int32(m), _int32(half), _int32(sign), _int32(0), _int32(0)
    all_olds, all_news = carray(_at(previous), n, _int32), carray(_at(state), n, _int32)
    all_xs, all_fs, all_values = (
        carray(_at(x), n, _float32),
        carray(_at(f), n, _float32),
        carray(_at(value), n, _float32),
    )
    for s in range(first, last):
        low, high, total = n * s // SEGMENTS, n * (s + 1) // SEGMENTS, _int32(0)
        olds, news, xs, fs, values = (
            all_olds[low:high],
            all_news[low:high],
            all_xs[low:high],
            all_fs[low:high],
            all_values[low:high],
        )
        for j in range(len(olds)):
            wide = _rint(fs[j] * c + xs[j] * a)
            fits = abs(wide) < _limit  # not so for NaN
            rounded = _int32(wide if fits else _zero)
            old = olds[j]
            out = _int32(rounded + _int32(sign * _int32(_int32(old + half) >> m)))
            outside |= _int32(not fits) | _int32(out >= _top) | _int32(out <= -_top)
            reached |= _int32(out ^ _int32(out >> _int32(31)))
            total = _int32(total + old)
            news[j] = out
            values[j] = _float32(out) * one
        if sums:
            carray(_at(sums), SEGMENTS, _int32)[s] = total
    return _int32(-1) if outside else reached


@_compiled
def retreat(a, c, m, half, sign, n, first, last, following, x, f, out, sums):
    """The inverse of `advance`; ``out`` holds the kept bits, and becomes the state."""
    a, c = _float32(a), _float32(c)
    m, half, sign = _int32(m), _int32(half), _int32(sign)
    mask = _int32((_int32(1) << m) - 1)
    all_news, all_olds = carray(_at(following), n, _int32), carray(_at(out), n, _int32)
    all_xs, all_fs = carray(_at(x), n, _float32), carray(_at(f), n, _float32)
    for s in range(first, last):
        low, high, total = n * s // SEGMENTS, n * (s + 1) // SEGMENTS, _int32(0)
        news, olds, xs, fs = all_news[low:high], all_olds[low:high], all_xs[low:high], all_fs[low:high]
        for j in range(len(news)):
            wide = _rint(fs[j] * c + xs[j] * a)
            rounded = _int32(wide if abs(wide) < _limit else _zero)
            shifted = _int32(_int32(sign * _int32(news[j] - rounded)) << m)
            old = _int32(_int32(shifted | _int32(olds[j] & mask)) - half)
            total = _int32(total + old)
            olds[j] = old
        carray(_at(sums), SEGMENTS, _int32)[s] = total
    return True


@_compiled
def read(one, n, first, last, state, value):
    """The float values of a state."""
    one, low, high = _float32(one), n * first // SEGMENTS, n * last // SEGMENTS
    states, values = carray(_at(state), n, _int32)[low:high], carray(_at(value), n, _float32)[low:high]
    for j in range(len(states)):
        values[j] = _float32(states[j]) * one
    return True


@_compiled
def same(n, a, b):
    """Whether two tables of words are equal."""
    mine, others, differs = carray(_at(a), n, _int64), carray(_at(b), n, _int64), _int64(0)
    for j in range(n):
        differs |= mine[j] ^ others[j]
    return differs == 0


@_compiled
def summed(n, first, last, state, sums):
    """The sums of a state."""
    states, totals = carray(_at(state), n, _int32), carray(_at(sums), SEGMENTS, _int32)
    for s in range(first, last):
        part, total = states[n * s // SEGMENTS : n * (s + 1) // SEGMENTS], _int32(0)
        for j in range(len(part)):
            total = _int32(total + part[j])
        totals[s] = total
    return True


@_compiled
def _take(out, count, numbers, step):
    """``count`` of the numbers at an address, ``step`` apart, into ``out``."""
    found = carray(_at(numbers), count * step, _float32)
    for i in range(count):
        out[i] = found[i * step]


@_compiled
def sample(out, first, first_step, a, a_step, b, b_step, elements, fewer):
    """``elements`` of the numbers at ``first`` and ``fewer`` of those at ``a`` and ``b`` (if there), at equal
    distances.
    """
    sampled = carray(_at(out), elements + 2 * fewer, _float32)
    _take(sampled, elements, first, first_step)
    if a:
        _take(sampled[elements:], fewer, a, a_step)
    if b:
        _take(sampled[elements + fewer :], fewer, b, b_step)


@_compiled
def pack(n, previous, rows, layout, half, size, packed):
    """The low bits of a state plus ``half``, laid out by ``rows`` rows at ``layout``."""
    states, all_planes, half = carray(_at(previous), n, _int32), carray(_at(packed), size, _uint8), _int32(half)
    groups = carray(_at(layout), (rows, 7), _int64)
    for g in range(rows):
        start, end, first, shift, left, mask, fresh = groups[g]
        plane = all_planes[start:end]
        part = states[first : max(first, min(n, first + len(plane)))]
        for j in range(len(part)):
            low = _uint8(_int32(_int32(_int32(part[j] + half) >> _int32(shift)) & _int32(mask)) << _int32(left))
            plane[j] = low if fresh else plane[j] | low
        if fresh:
            plane[len(part) :] = 0


@_compiled
def unpack(size, packed, rows, layout, n, out):
    """The inverse of `pack`: the low bits, each in its element."""
    all_planes, states = carray(_at(packed), size, _uint8), carray(_at(out), n, _int32)
    groups = carray(_at(layout), (rows, 7), _int64)
    for g in range(rows):
        start, end, first, shift, left, mask, _ = groups[g]
        plane = all_planes[start:end]
        part = states[first : max(first, min(n, first + len(plane)))]
        for j in range(len(part)):
            low = _int32(_int32(_uint8(plane[j] >> _uint8(left)) & _uint8(mask)) << _int32(shift))
            part[j] = part[j] | low if shift else low
