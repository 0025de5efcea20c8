"""The loops of `suppression`, compiled by Numba: imported when the first of them is to run.

Groups (classes) lie one after the other: those of group g are ``order[bounds[g] : bounds[g + 1]]``. What is kept is
written to ``kept`` and ``values``, each group's by descending score, and counted.

Note [Order of ties]
    Of equal scores the first in the current order is taken, and what is taken or dropped leaves its place to another,
    as in the field's kernel: equal scores come in the same order as there.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

LENGTH = np.float32(1e-6)
"""What is added to lengths, so that a segment of none has an overlap."""

_ZERO, _ONE = np.float32(0), np.float32(1)


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no folder that a cache could be kept in
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def soft(spans, scores, order, bounds, decay, sigma, threshold, min_score, most, kept, values):
    """Take the best, and lower the others by how far they overlap it: 0 to nothing, 1 linearly, 2 by a bell.

    Args:
        spans: (n, 2), float32. scores: (n,), float32. most: taken of a group.
    """
    count = 0
    for group in range(len(bounds) - 1):
        index = order[bounds[group] : bounds[group + 1]].copy()
        start, end, score = spans[index, 0], spans[index, 1], scores[index]
        left, best, taken = len(index), score.argmax(), 0
        while taken < min(left, most):
            first, last, high, number = start[best], end[best], score[best], index[best]
            start[best], end[best], score[best], index[best] = start[taken], end[taken], score[taken], index[taken]
            kept[count], values[count] = number, high
            count += 1
            taken += 1
            length, high, best, at = last - first + LENGTH, np.float32(-np.inf), taken, taken
            while at < left:
                meet = max(_ZERO, min(last, end[at]) - max(first, start[at]))
                overlap = meet / (length + (end[at] - start[at] + LENGTH) - meet)
                value = score[at]
                if decay == 2:
                    if meet > _ZERO:
                        value *= math.exp(-(overlap * overlap) / sigma)
                elif overlap >= threshold:
                    value *= _ONE - overlap if decay == 1 else _ZERO
                if value < min_score:
                    left -= 1
                    start[at], end[at], score[at], index[at] = start[left], end[left], score[left], index[left]
                    continue
                score[at] = value
                if value > high:
                    high, best = value, at
                at += 1
    return count


@_compiled
def hard(spans, scores, order, bounds, threshold, most, kept, values):
    """Keep those that no better one overlaps by ``threshold``.

    Args:
        order: of each group by descending score.
    """
    count = 0
    for group in range(len(bounds) - 1):
        begin = count
        for number in order[bounds[group] : bounds[group + 1]]:
            if count - begin == most:
                break
            first, last = spans[number]
            free = True
            for other in kept[begin:count]:
                meet = max(_ZERO, min(last, spans[other, 1]) - max(first, spans[other, 0]))
                both = (last - first + LENGTH) + (spans[other, 1] - spans[other, 0] + LENGTH) - meet
                if meet / both >= threshold:
                    free = False
                    break
            if free:
                kept[count], values[count] = number, scores[number]
                count += 1
    return count
