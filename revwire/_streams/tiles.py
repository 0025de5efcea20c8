"""The Triton kernels of `fused`. Imported when the first of them is to run.

A program works on a tile: ``BLOCK`` columns of the eight rows into which a state is cut, ``span`` elements each. In the
layout of `bits.pack_bits` the values that share a byte are those of one column, so a tile reads whole pieces of memory,
and writes whole bytes. Whatever it finds out of a tile (a sum, the largest magnitude) it stores under its own number:
nothing is added up by several programs, and nothing must be zero before.

Every rounding is spelled out, so that no compiler and no device chooses one: a multiplication that is followed by an
addition is a fused one where the plain form's is; roundings to integers and to bfloat16 are sums and shifts. Triton's
interpreter has no fused multiply-add: where it is ``SPELLED``, it is computed in twice the precision.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-unimported"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_compiled: Any = triton.jit


_jit_sample: Any = triton.jit(do_not_specialize=["count", "step", "a_count", "a_step", "b_count", "b_step"])
"""Places differ from branch to branch, and are not worth a kernel of their own."""

POISON = tl.constexpr(-(2**31))
"""The state of a value out of range: no other is stored so."""


LIMIT = tl.constexpr(2**30)
"""Integers stay below this magnitude, so that two of them can be added."""


@_compiled
def _fused(x, a, y, SPELLED: tl.constexpr):
    """x·a + y, rounded once (all of them float32)."""
    if SPELLED:
        product = x.to(tl.float64) * tl.full((), a, tl.float32).to(tl.float64)  # exact
        wide = y.to(tl.float64)
        total = product + wide
        back = total - product
        missing = (product - (total - back)) + (wide - back)  # by how much it was rounded
        # Rounded to odd: then rounding it once more is rounding once.
        bits = total.to(tl.int64, bitcast=True)
        inexact = (missing < 0.0) | (missing > 0.0)  # not so where anything is not finite
        away = (missing > 0.0) == (total > 0.0)
        odd = tl.where(inexact & ((bits & 1) == 0), tl.where(away, bits + 1, bits - 1), bits)
        out = odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        out = tl.fma(x, a, y)
    return out


@_compiled
def _to_integer(wide):
    """(The nearest integer, of two the even one; whether 32 bits hold it; the same as a float.)"""
    size = tl.abs(wide)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)  # 2^23
    rounded = tl.where(wide < 0.0, -size, size)
    fits = size < 2147483648.0  # not so for NaN
    return tl.where(fits, rounded, 0.0).to(tl.int32), fits, rounded


@_compiled
def _increment(x, f, at, inside, a, c, one, ADDS: tl.constexpr, SPELLED: tl.constexpr):
    """2^K·(a·x + c·f) at some places, as a float: a and c come multiplied by 2^K; ``x``: values, or states."""
    wide = tl.load(f + at, mask=inside, other=0.0).to(tl.float32) * c
    if ADDS:
        if x.dtype.element_ty == tl.int32:
            wide = _fused(_number(tl.load(x + at, mask=inside, other=0), one), a, wide, SPELLED)
        else:
            wide = _fused(tl.load(x + at, mask=inside, other=0.0), a, wide, SPELLED)
    return wide


@_compiled
def _number(state, one):
    """The values of a state."""
    return tl.where(state != POISON, state.to(tl.float32) * one, float("nan"))


@_compiled
def _tile(n, span, BLOCK: tl.constexpr):
    """The tile of this program: where each of its elements is, whether it is there, and its row."""
    rows, columns = tl.arange(0, 8), tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    starts = first + rows.to(tl.int64) * span
    counts = tl.minimum(tl.minimum(span - first, n - starts), BLOCK).to(tl.int32)
    return starts[:, None] + columns[None, :], columns[None, :] < counts[:, None], rows[:, None]


@_compiled
def _plane(span, past: tl.constexpr, BLOCK: tl.constexpr):
    """Where the bytes of this tile lie that come ``past`` rows of others, and whether they are there."""
    first, columns = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    return first + tl.full((), past, tl.int64) * span + columns, columns < tl.minimum(span - first, BLOCK).to(tl.int32)


@_compiled
def _place(row, WIDTH: tl.constexpr):
    """Of a row's ``WIDTH`` bits in the bytes of a column: of eight rows they fill ``WIDTH`` bytes."""
    if WIDTH == 4:
        place = 8 * (row % 4) + row // 4 * 4
    elif WIDTH == 2:
        place = 8 * (row % 2) + row // 4 * 2 + row // 2 % 2 * 4
    else:
        place = row // 4 + row // 2 % 2 * 2 + row % 2 * 4
    return place


@_compiled
def _packed(bits, low, row, span, past: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the ``WIDTH`` lowest bits of a tile: a plane of `bits.pack_bits`."""
    cut = (low & ((1 << WIDTH) - 1)).to(tl.int64)
    word = tl.sum(cut << _place(row, WIDTH), 0)
    for r in tl.static_range(WIDTH):
        at, inside = _plane(span, past + r, BLOCK)
        tl.store(bits + at, ((word >> 8 * r) & 255).to(tl.uint8), mask=inside)


@_compiled
def _unpacked(bits, row, span, past: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `_packed`."""
    word = tl.zeros((BLOCK,), tl.int32)
    for r in tl.static_range(WIDTH):
        at, inside = _plane(span, past + r, BLOCK)
        word |= tl.load(bits + at, mask=inside, other=0).to(tl.int32) << 8 * r
    return (word[None, :] >> _place(row, WIDTH)) & ((1 << WIDTH) - 1)


@_compiled
def _add_up(sums, tile):
    """Store the sum of a tile of integers, which may overflow."""
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tile.to(tl.int64), 1), 0).to(tl.int32))


@_compiled
def advance(
    previous, x, f, state, value, bits, sums, reached, n, span, a, c, one,
    M: tl.constexpr, NEGATIVE: tl.constexpr, ADDS: tl.constexpr, KEEP: tl.constexpr, SPELLED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A step: the state and the value of x_{k+1}, the kept bits, sums of the state of x_{k-1}, and the largest
    magnitudes (as the bits of float32, of which those of what is not finite are the largest).
    """
    at, inside, row = _tile(n, span, BLOCK)
    old = tl.load(previous + at, mask=inside, other=0)
    rounded, fits, wide = _to_integer(_increment(x, f, at, inside, a, c, one, ADDS, SPELLED))
    shifted = old + ((1 << M) >> 1)
    new = rounded - (shifted >> M) if NEGATIVE else rounded + (shifted >> M)
    sound = old != POISON
    good = sound & fits & (new < LIMIT) & (new > -LIMIT)
    number = tl.where(fits, new.to(tl.float32), wide) * one
    number = tl.where(sound, number, float("nan"))
    tl.store(state + at, tl.where(good, new, POISON), mask=inside)
    _put(value, at, tl.where(good, number, float("nan")), inside)
    size = tl.where(inside, number.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.store(reached + tl.program_id(0), tl.max(tl.max(size, 1), 0))
    _add_up(sums, old)
    if KEEP:
        low = tl.where(inside, shifted, 0)
        if M & 4:
            _packed(bits, low, row, span, 0, 4, BLOCK)
        if M & 2:
            _packed(bits, low >> (M & 4), row, span, M & 4, 2, BLOCK)
        if M & 1:
            _packed(bits, low >> (M & 6), row, span, M & 6, 1, BLOCK)


@_compiled
def retreat(
    following, x, f, bits, state, sums, n, span, a, c, one,
    M: tl.constexpr, NEGATIVE: tl.constexpr, ADDS: tl.constexpr, SPELLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of `advance`: the state of x_{k-1}, and its sums."""
    at, inside, row = _tile(n, span, BLOCK)
    new = tl.load(following + at, mask=inside, other=0)
    rounded, _, _ = _to_integer(_increment(x, f, at, inside, a, c, one, ADDS, SPELLED))
    old = (rounded - new if NEGATIVE else new - rounded) << M
    if M & 4:
        old |= _unpacked(bits, row, span, 0, 4, BLOCK)
    if M & 2:
        old |= _unpacked(bits, row, span, M & 4, 2, BLOCK) << (M & 4)
    if M & 1:
        old |= _unpacked(bits, row, span, M & 6, 1, BLOCK) << (M & 6)
    old -= (1 << M) >> 1
    tl.store(state + at, old, mask=inside)
    _add_up(sums, tl.where(inside, old, 0))


@_compiled
def summed(state, sums, n, span, BLOCK: tl.constexpr):
    """The sums of a state."""
    at, inside, _ = _tile(n, span, BLOCK)
    _add_up(sums, tl.load(state + at, mask=inside, other=0))


@_compiled
def read(state, value, n, one, BLOCK: tl.constexpr):
    """The float values of a state."""
    first, columns = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = columns < tl.minimum(n - first, BLOCK).to(tl.int32)
    found = tl.load(state + first + columns, mask=inside, other=0)
    tl.store(value + first + columns, _number(found, one), mask=inside)


@_compiled
def _taken(out, source, count, step, MOST: tl.constexpr):
    """``count`` of the numbers at ``source``, ``step`` apart."""
    i = tl.arange(0, MOST)
    found = tl.load(source + i.to(tl.int64) * step, mask=i < count, other=0.0)
    tl.store(out + i, found.to(tl.float32), mask=i < count)


@_jit_sample
def sample(
    out, first, a, b, count, step, a_count, a_step, b_count, b_step, ELEMENTS: tl.constexpr, FEWER: tl.constexpr
):
    """Some of the numbers at ``first``, ``a`` and ``b``, each at equal distances, one after the other."""
    _taken(out, first, count, step, ELEMENTS)
    _taken(out + count, a, a_count, a_step, FEWER)
    _taken(out + count + a_count, b, b_count, b_step, FEWER)


@_compiled
def _put(out, at, number, inside):
    """Store float32 numbers as the type of ``out`` has them."""
    if out.dtype.element_ty == tl.bfloat16:  # to the nearest, of two the even one
        bits = number.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        near = tl.where(number != number, 0x7FC0, near)
        tl.store(out + at, near.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out + at, number.to(out.dtype.element_ty), mask=inside)


@_compiled
def scale(
    g, first, second, third, n, a, b, c, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to three multiples of ``g``, each in the type of its place."""
    start, columns = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside, at = columns < tl.minimum(n - start, BLOCK).to(tl.int32), start + columns
    found = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        _put(first, at, found * a, inside)
    if SECOND:
        _put(second, at, found * b, inside)
    if THIRD:
        _put(third, at, found * c, inside)
