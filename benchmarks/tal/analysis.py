"""Where the errors are, in the manner of DETAD (Alwassel et al., arXiv 1807.10706): what false detections are, which
segments are found worse than others, and which are not found at all.

Detections of each class go by descending score, and each takes, at a threshold t, the free segment of its class that it
overlaps most, if by t. What is not right is the first of these that holds:

- double: it overlaps a segment of its class by t, which a better detection has taken;
- label: it overlaps a segment of another class by t;
- place: it overlaps a segment of its class, by ``LEAST`` at least;
- confusion: it overlaps one of another class so;
- background: none of these.

Segments differ in coverage (of their video), length (seconds), and in how many of their class are in the video. mAP is
normalised: precision counts as if every class had as many segments as the classes have on average, so that parts of the
segments compare with each other. Other segments than those of a part are left out with the detections that take them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tal.annotations import Annotations, bare
from benchmarks.tal.detection_files import read
from benchmarks.tal.evaluation import distinct
from benchmarks.tal.segments.overlap import iou

LEAST = 0.1
"""Overlap under which a detection is nowhere."""

MOST = 10
"""Detections of a class that the profile shows, in multiples of the class's segments."""

KINDS = ("right", "double", "label", "place", "confusion", "background")

EDGES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "thumos14": {"coverage": (0.02, 0.04, 0.06, 0.08), "length": (3, 6, 12, 18), "instances": (1, 40, 80)},
    "activitynet": {"coverage": (0.2, 0.4, 0.6, 0.8), "length": (30, 60, 120, 180), "instances": (1, 4, 8)},
}
"""Upper ends of the parts of segments by data set, as in the paper; the last part has no end."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Segments that are alike in one respect.

    Attributes:
        trait: ``coverage``, ``length`` or ``instances``. name: ``up to 3``, ``3 to 6``, .. segments: how many.
        map: normalised, mean over thresholds, where these alone count. missed: share that no detection finds, mean over
            thresholds.
    """

    trait: str
    name: str
    segments: int
    map: float
    missed: float


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found.

    Attributes:
        profile: (multiples of the segments, kinds): share of each of ``KINDS`` among the detections whose rank in their
            class is in the first, second, .. so many as the class has segments, at ``threshold``.
        gains: by kind, by how much the mean normalised mAP rises where these detections are left out at each threshold.
        map: normalised, mean over thresholds. parts: of the segments.
    """

    threshold: float
    profile: Array
    gains: Mapping[str, float]
    map: float
    missed: float
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "threshold": self.threshold,
            "profile": [dict(zip(KINDS, map(float, row), strict=True)) for row in self.profile],
            "gains": dict(self.gains),
            "normalised_map": self.map,
            "missed": self.missed,
            "parts": [vars(part) for part in self.parts],
        }


@dataclass(frozen=True)
class _Class:
    """Detections of a class by descending score, its segments, and which detection takes which at each threshold."""

    videos: NDArray[np.int64]
    spans: Array
    segments: NDArray[np.int64]  # numbers among all segments
    taken: NDArray[np.int64]  # (thresholds, detections): number of the segment, or −1


def analyse(
    truth: Annotations,
    detections: Any,
    tious: Sequence[float],
    edges: Mapping[str, Sequence[float]],
    threshold: float | None = None,
) -> Analysis:
    """Errors of detections.

    Args:
        truth: of the videos that are evaluated, with durations.
        detections: as for `evaluation.evaluate`.
        tious: thresholds. threshold: that of the profile, one of them; by default the first.
        edges: of the parts, by trait, as `EDGES` has them.
    """
    at = tuple(tious).index(tious[0] if threshold is None else threshold)
    table = _Segments(truth)
    thresholds = np.asarray(tious, dtype=np.float64)
    classes = table.classes(detections, thresholds)
    kinds = [table.kinds(label, found, thresholds) for label, found in classes.items()]
    profile = np.zeros((MOST, len(KINDS)))
    for found, kind in zip(classes.values(), kinds, strict=True):
        rank = np.arange(kind.shape[1]) // max(len(found.segments), 1)
        np.add.at(profile, (rank[rank < MOST], kind[at, rank < MOST]), 1)
    profile /= np.maximum(profile.sum(1, keepdims=True), 1)
    everything = np.ones(len(table.labels), dtype=bool)
    whole = _normalised(classes.values(), everything)
    without = {
        name: _normalised(classes.values(), everything, [k != number for k in kinds]) - whole
        for number, name in enumerate(KINDS)
        if number
    }
    found = _found(classes.values(), len(everything), len(tious))
    parts = []
    for trait, ends in edges.items():
        place = np.searchsorted(np.asarray(ends, dtype=np.float64), table.traits[trait], side="left")
        for number, name in enumerate(_names(ends)):
            inside = place == number
            missed = float(1 - found[:, inside].mean()) if inside.any() else 0.0
            parts.append(Part(trait, name, int(inside.sum()), _normalised(classes.values(), inside), missed))
    return Analysis(
        float(tious[at]), profile, without, whole, float(1 - found.mean()) if found.size else 0.0, tuple(parts)
    )


def quantiles(truth: Annotations, count: int = 5) -> dict[str, tuple[float, ...]]:
    """Edges of parts that hold about as many segments each."""
    table = _Segments(truth)
    shares = np.arange(1, count) / count
    return {trait: tuple(np.unique(np.quantile(values, shares)).tolist()) for trait, values in table.traits.items()}


class _Segments:
    """All segments that count, numbered: (n, 2) spans, videos, labels, and traits."""

    def __init__(self, truth: Annotations) -> None:
        self.names = truth.classes
        self.number = {bare(video.id): i for i, video in enumerate(truth.videos)}
        kept = [(i, video, s) for i, video in enumerate(truth.videos) for s in distinct(video.segments)]
        self.videos = np.array([i for i, _, _ in kept], dtype=np.int64)
        self.labels = np.array([s.label for _, _, s in kept], dtype=np.int64)
        self.spans = np.array([(s.start, s.end) for _, _, s in kept], dtype=np.float64).reshape(-1, 2)
        length = self.spans[:, 1] - self.spans[:, 0]
        pairs = self.videos * max(len(self.names), 1) + self.labels
        _, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        durations = np.array([video.duration for _, video, _ in kept])
        self.traits = {"coverage": length / durations, "length": length, "instances": counts[inverse].astype(float)}

    def classes(self, detections: Any, tious: Array) -> dict[int, _Class]:
        """By label, of the classes that have segments."""
        label_of = {name: label for label, name in enumerate(self.names)}
        rows: dict[int, list[tuple[float, int, float, float]]] = {int(label): [] for label in np.unique(self.labels)}
        for key, items in read(detections).items():
            video = self.number.get(bare(key), -1)
            for row in items:
                if (label := label_of.get(row.label, -1)) in rows:
                    rows[label].append((-row.score, video, row.start, row.end))
        return {label: self._class(label, found, tious) for label, found in rows.items()}

    def _class(self, label: int, rows: Collection[tuple[float, int, float, float]], tious: Array) -> _Class:
        array = np.array(list(rows), dtype=np.float64).reshape(-1, 4)
        array = array[np.argsort(array[:, 0], kind="stable")]
        videos, spans = array[:, 1].astype(np.int64), array[:, 2:]
        own = np.flatnonzero(self.labels == label)
        taken = np.full((len(tious), len(videos)), -1, dtype=np.int64)
        every = np.arange(len(tious))
        for video in np.unique(self.videos[own]):
            numbers, here = own[self.videos[own] == video], np.flatnonzero(videos == video)
            free = np.ones((len(tious), len(numbers)), dtype=bool)
            for detection, overlaps in zip(here, iou(spans[here, None], self.spans[numbers]), strict=True):
                left = np.where(free, overlaps, -1.0)
                best = left.argmax(1)
                right = left[every, best] >= tious
                taken[right, detection] = numbers[best[right]]
                free[every[right], best[right]] = False
        return _Class(videos, spans, own, taken)

    def kinds(self, label: int, found: _Class, tious: Array) -> NDArray[np.int64]:
        """(thresholds, detections): which of ``KINDS`` each is."""
        own, other = np.zeros(len(found.videos)), np.zeros(len(found.videos))
        for video in np.unique(found.videos):
            here = found.videos == video
            for best, chosen in ((own, self.labels == label), (other, self.labels != label)):
                spans = self.spans[chosen & (self.videos == video)]
                if len(spans):
                    best[here] = iou(found.spans[here, None], spans).max(1)
        enough = tious[:, None]
        holds = [found.taken >= 0, own >= enough, other >= enough, own >= LEAST, other >= LEAST]
        return np.select([np.broadcast_to(h, found.taken.shape) for h in holds], list(range(5)), 5)


def _found(classes: Collection[_Class], segments: int, thresholds: int) -> NDArray[np.bool_]:
    """(thresholds, segments): which segments some detection takes."""
    found = np.zeros((thresholds, segments), dtype=bool)
    for of_class in classes:
        at, detection = np.nonzero(of_class.taken >= 0)
        found[at, of_class.taken[at, detection]] = True
    return found


def _normalised(
    classes: Collection[_Class], counted: NDArray[np.bool_], kept: Sequence[NDArray[np.bool_]] | None = None
) -> float:
    """Mean normalised mAP where only the segments ``counted`` count, and of each class the detections ``kept``."""
    average = sum(len(c.segments) for c in classes) / max(len(classes), 1)
    values = []
    for number, of_class in enumerate(classes):
        own = int(counted[of_class.segments].sum())
        if not own:
            continue
        for at, taken in enumerate(of_class.taken):
            mine = taken if kept is None else taken[kept[number][at]]
            left = mine[(mine < 0) | counted[mine]]  # what takes another segment is left out
            right = left >= 0
            reached, false = np.cumsum(right) / own, np.cumsum(~right)
            precision = average * reached / np.maximum(average * reached + false, 1e-12)
            highest = np.maximum.accumulate(precision[::-1])[::-1]
            values.append(highest[right].sum() / own)
    return float(np.mean(values)) if values else 0.0


def _names(ends: Sequence[float]) -> list[str]:
    text = [f"{end:g}" for end in ends]
    between = [f"{a} to {b}" for a, b in pairwise(text)]
    return [f"up to {text[0]}", *between, f"above {text[-1]}"] if text else ["all"]
