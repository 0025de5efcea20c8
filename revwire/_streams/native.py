"""The compiled loops of `kernels`. Imported where Numba is installed, when the first of them is to run.

They take addresses: making NumPy arrays of tensors costs more than the work on a small one. A stream is cut into
`SEGMENTS` parts, of each of which a loop can give the sum of the integers on its way, and between which threads share
the work. The integers of a stream are of the type of the argument ``like``: Numba compiles a loop for each.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,attr-defined"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from revwire._streams.bits import SEGMENTS

LIKE = {4: np.int32(0), 8: np.int64(0)}
"""An integer of so many bytes."""


_rint, _int64, _uint8, _float32 = np.rint, np.int64, np.uint8, np.float32


_zero = np.float32(0)


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


def _pointer_to(typing_context: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to numbers of the type of another."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), code


def _cast(typing_context: Any, number: Any, like: Any) -> Any:
    """A number in the type of another."""

    def code(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], signature.args[0], like)

    return like(number, like), code


def _limit(typing_context: Any, like: Any) -> Any:
    """Integers of this type stay below this magnitude, so that two of them can be added."""

    def code(context, builder, signature, arguments):
        return context.get_constant(like, 1 << like.bitwidth - 2)

    return like(like), code


_intrinsic: Any = intrinsic
_at, _to, _as, _top = map(_intrinsic, (_pointer, _pointer_to, _cast, _limit))


@_compiled
def advance(a, c, one, m, half, sign, like, n, first, last, previous, x, f, state, value, sums):
    """The step of segments ``first`` to ``last`` of a stream of ``n`` elements.

    Returns:
        All bits that a magnitude of the new state has: less than twice the largest one. -1: a value is out of range.
    """
    top = _top(like)
    a, c, one, limit = _float32(a), _float32(c), _float32(one), _float32(top) * _float32(2)
    m, half, sign, outside, reached = _as(m, like), _as(half, like), _as(sign, like), _as(0, like), _as(0, like)
    all_olds, all_news = carray(_to(previous, like), n), carray(_to(state, like), n)
    all_xs, all_fs, all_values = (
        carray(_at(x), n, _float32),
        carray(_at(f), n, _float32),
        carray(_at(value), n, _float32),
    )
    for s in range(first, last):
        low, high, total = n * s // SEGMENTS, n * (s + 1) // SEGMENTS, _as(0, like)
        olds, news, xs, fs, values = (
            all_olds[low:high],
            all_news[low:high],
            all_xs[low:high],
            all_fs[low:high],
            all_values[low:high],
        )
        for j in range(len(olds)):
            wide = _rint(fs[j] * c + xs[j] * a)
            fits = abs(wide) < limit  # not so for NaN; an increment may be larger than the state that it leads to
            rounded = _as(wide if fits else _zero, like)
            old = olds[j]
            out = _as(rounded + _as(sign * _as(_as(old + half, like) >> m, like), like), like)
            outside |= _as(not fits, like) | _as(out >= top, like) | _as(out <= -top, like)
            reached |= _as(out ^ _as(-_as(out < 0, like), like), like)
            total = _as(total + old, like)
            news[j] = out
            values[j] = _float32(out) * one
        if sums:
            carray(_to(sums, like), SEGMENTS)[s] = total
    return _as(-1, like) if outside else reached


@_compiled
def retreat(a, c, m, half, sign, like, n, first, last, following, x, f, out, sums):
    """The inverse of `advance`, as if all kept bits were zero: `unpack` adds them to ``out``."""
    a, c, limit = _float32(a), _float32(c), _float32(_top(like)) * _float32(2)
    m, half, sign = _as(m, like), _as(half, like), _as(sign, like)
    all_news, all_olds = carray(_to(following, like), n), carray(_to(out, like), n)
    all_xs, all_fs = carray(_at(x), n, _float32), carray(_at(f), n, _float32)
    for s in range(first, last):
        low, high, total = n * s // SEGMENTS, n * (s + 1) // SEGMENTS, _as(0, like)
        news, olds, xs, fs = all_news[low:high], all_olds[low:high], all_xs[low:high], all_fs[low:high]
        for j in range(len(news)):
            wide = _rint(fs[j] * c + xs[j] * a)
            rounded = _as(wide if abs(wide) < limit else _zero, like)
            old = _as(_as(_as(sign * _as(news[j] - rounded, like), like) << m, like) - half, like)
            total = _as(total + old, like)
            olds[j] = old
        carray(_to(sums, like), SEGMENTS)[s] = total
    return True


@_compiled
def read(one, like, n, first, last, state, value):
    """The float values of a state."""
    one, low, high = _float32(one), n * first // SEGMENTS, n * last // SEGMENTS
    states, values = carray(_to(state, like), n)[low:high], carray(_at(value), n, _float32)[low:high]
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
def summed(like, n, first, last, state, sums):
    """The sums of a state."""
    states, totals = carray(_to(state, like), n), carray(_to(sums, like), SEGMENTS)
    for s in range(first, last):
        part, total = states[n * s // SEGMENTS : n * (s + 1) // SEGMENTS], _as(0, like)
        for j in range(len(part)):
            total = _as(total + part[j], like)
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
def pack(like, n, previous, rows, layout, half, size, packed):
    """The low bits of a state plus ``half``, laid out by ``rows`` rows at ``layout``."""
    states, all_planes, half = carray(_to(previous, like), n), carray(_at(packed), size, _uint8), _as(half, like)
    groups = carray(_at(layout), (rows, 7), _int64)
    for g in range(rows):
        start, end, first, shift, left, mask, fresh = groups[g]
        plane = all_planes[start:end]
        part = states[first : max(first, min(n, first + len(plane)))]
        for j in range(len(part)):
            bits = _as(_as(_as(part[j] + half, like) >> _as(shift, like), like) & _as(mask, like), like)
            low = _uint8(_as(bits << _as(left, like), like))
            plane[j] = low if fresh else plane[j] | low
        if fresh:
            plane[len(part) :] = 0


@_compiled
def unpack(like, size, packed, rows, layout, n, out, sums):
    """The inverse of `pack`: the low bits, added each to its element, where they are zero; and the sums then."""
    all_planes, states = carray(_at(packed), size, _uint8), carray(_to(out, like), n)
    groups = carray(_at(layout), (rows, 7), _int64)
    for g in range(rows):
        start, end, first, shift, left, mask, _ = groups[g]
        plane = all_planes[start:end]
        part = states[first : max(first, min(n, first + len(plane)))]
        for j in range(len(part)):
            low = _as(_as(_uint8(plane[j] >> _uint8(left)) & _uint8(mask), like) << _as(shift, like), like)
            part[j] = _as(part[j] + low, like)
    totals = carray(_to(sums, like), SEGMENTS)
    for s in range(SEGMENTS):
        part, total = states[n * s // SEGMENTS : n * (s + 1) // SEGMENTS], _as(0, like)
        for j in range(len(part)):
            total = _as(total + part[j], like)
        totals[s] = total
