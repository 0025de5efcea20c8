"""Average precision as THUMOS-14's own toolkit counts it (``TH14evaldet``), where it differs from `evaluation`.

- Each annotated segment, in the file's order, takes the free detection that overlaps it most, by more than the
  threshold; there, each detection takes a segment. Segments that repeat another count again.
- A detection that is not right and meets an ambiguous segment does not count.
- Precision is not interpolated. Of equal scores the first by the video's name counts first, then by the file's order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.tal.annotations import AnnotationError, Annotations, Fault, bare, span
from benchmarks.tal.segments.overlap import hull, intersection

Array = NDArray[np.float64]

SMALLEST = 1e-8
"""Seconds that what divides an overlap has at least."""


def marked(truth: Annotations, path: Path) -> Annotations:
    """The annotations with ambiguous segments as the data set has them (``Ambiguous_test.txt``): on each line a video,
    a start and an end in seconds.

    Raises:
        AnnotationError: it cannot be read, or a line is none.
    """
    found = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(path, [Fault("missing", "", f"it cannot be read ({error})")]) from None
    for count, line in enumerate(lines, 1):
        if fields := line.split():
            if (ends := span(fields[1:])) is None:
                form = "a video, and its start and end in seconds"
                raise AnnotationError(path, [Fault("line", f"line {count}", f"expected {form}; got {line!r}")])
            found[bare(fields[0])].append(ends)
    return replace(
        truth, videos=tuple(replace(v, doubtful=(*v.doubtful, *found.get(bare(v.id), ()))) for v in truth.videos)
    )


def average_precision(
    videos: NDArray[np.int64], spans: Array, groups: Mapping[int, Array], doubtful: Mapping[int, Array], tious: Array
) -> Array:
    """(thresholds,) of one class.

    Args:
        videos, spans: (n,) and (n, 2), its detections by descending score.
        groups, doubtful: by video its segments (m, 2), and the ambiguous ones.
        tious: (thresholds,)
    """
    right = np.zeros((len(tious), len(spans)), dtype=bool)
    passed_over = np.zeros(len(spans), dtype=bool)
    for video in np.unique(videos):
        here = np.flatnonzero(videos == video)
        if video in groups:
            pairs = groups[video][:, None], spans[here]
            overlaps = intersection(*pairs) / np.maximum(hull(*pairs), SMALLEST)  # rounded as the toolkit's
            right[:, here] = _taken(overlaps, tious)
        if video in doubtful:
            passed_over[here] = (intersection(doubtful[video][:, None], spans[here]) > 0).any(0)
    counted = np.cumsum(right | ~passed_over, 1)
    return np.where(right, np.cumsum(right, 1) / np.maximum(counted, 1), 0.0).sum(1) / sum(map(len, groups.values()))


def _taken(overlaps: Array, tious: Array) -> NDArray[np.bool_]:
    """Which detections a segment takes, (thresholds, detections), by overlaps (segments, detections)."""
    taken, thresholds = np.zeros((len(tious), overlaps.shape[1]), dtype=bool), np.arange(len(tious))
    for of_segment in overlaps:
        free = np.where(taken, -1.0, of_segment)
        best = free.argmax(1)
        taken[thresholds, best] |= free[thresholds, best] > tious
    return taken
