"""Mean average precision of detected segments, by the protocol of ActivityNet, which is in use for THUMOS-14, too; or
by THUMOS-14's own (`thumos`).

For each class, the detections of all videos go by descending score. Each takes, of its video's annotated segments that
are still free, the one with the highest tIoU that reaches the threshold; one that finds none is false. AP is the area
under the precision, interpolated as in PASCAL VOC 2011 (the highest precision at this recall or a higher one). mAP is
the plain mean over the classes that have segments.

Annotated segments without length, and a second one of the same class within a millisecond of the first, do not count.
Detections of other classes are left out; those in videos that are not evaluated are false.

Ties. Among detections of equal score those without length and those that repeat another go last, then the file's order
counts. Of segments that a detection overlaps equally, which happens where times are rounded, the last by
``numpy.argsort`` is taken, as in the field's evaluators; published figures depend on it in their second decimal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tal import detection_files, thumos
from benchmarks.tal.annotations import AnnotationError, Annotations, Segment, bare, parse
from benchmarks.tal.detection_files import PredictionError as PredictionError
from benchmarks.tal.detection_files import Row
from benchmarks.tal.schema import Protocol
from benchmarks.tal.segments.overlap import iou

ACTIVITYNET = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""ActivityNet's thresholds: 0.5 to 0.95 by 0.05."""

THUMOS = tuple(round(0.3 + 0.1 * i, 1) for i in range(5))
"""THUMOS's thresholds: 0.3 to 0.7 by 0.1."""

REPEATED = 1e-3
"""Seconds within which two segments of one class in one video are the same annotation."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """What an evaluation found. Rows are thresholds, columns classes: those that have segments, in order of
    appearance.
    """

    tious: tuple[float, ...]
    classes: tuple[str, ...]
    ap: Array
    segments: tuple[int, ...]
    """Annotated segments of each class."""
    detections: tuple[int, ...]
    """Detections of each class."""
    other_labels: Mapping[str, int]
    """Detections left out, by their label: no segment of the evaluated videos has it."""
    other_videos: Mapping[str, int]
    """False detections in videos that are not evaluated."""
    without_length: int
    """False detections that do not end after they start."""
    videos: int
    """Evaluated videos."""
    missed: int
    """Evaluated videos of which the detections say nothing: their segments count as missed."""

    @property
    def map(self) -> Array:
        """mAP at each threshold, between 0 and 1."""
        return self.ap.mean(1) if self.classes else np.zeros(len(self.tious))

    @property
    def average(self) -> float:
        """mean of mAP over the thresholds."""
        return float(self.map.mean())

    @property
    def missing(self) -> str:
        """What is to be said of videos without detections."""
        return f"{self.missed} of {self.videos} test videos are not among the detections: they count as missed"

    def at(self, tiou: float) -> float:
        """mAP at one of the thresholds."""
        return float(self.map[[abs(t - tiou) < 1e-9 for t in self.tious].index(True)])

    def to_dict(self) -> dict[str, Any]:
        """Figures for a record: mAP by threshold, their average, AP by class averaged over thresholds, and what was
        left out.
        """
        return {
            "map": {f"{t:g}": float(m) for t, m in zip(self.tious, self.map, strict=True)},
            "average_map": self.average,
            "average_ap": {name: float(self.ap[:, i].mean()) for i, name in enumerate(self.classes)},
            "segments": sum(self.segments),
            "detections": sum(self.detections),
            "other_labels": dict(self.other_labels),
            "other_videos": dict(self.other_videos),
            "without_length": self.without_length,
            "videos": self.videos,
            "missed": self.missed,
        }

    def __str__(self) -> str:
        lines = [f"mAP@{t:.2f}  {100 * m:6.2f}" for t, m in zip(self.tious, self.map, strict=True)]
        lines.append(f"average   {100 * self.average:6.2f}")
        lines += [
            f"{count} detections left out: no segment is labelled {label!r}"
            for label, count in self.other_labels.items()
        ]
        if self.other_videos:
            lines.append(
                f"{sum(self.other_videos.values())} detections lie in {len(self.other_videos)} videos that are not "
                "evaluated"
            )
        if self.missed:
            lines.append(self.missing)
        if self.without_length:
            lines.append(f"{self.without_length} detections do not end after they start")
        return "\n".join(lines)


def evaluate(
    truth: Annotations | Path | str,
    detections: Mapping[str, Any] | Path | str,
    tious: Sequence[float] = ACTIVITYNET,
    *,
    subset: str | None = None,
    blocked: Collection[str] = (),
    only_found: bool = False,
    protocol: Protocol = "activitynet",
) -> Result:
    """AP of every class at every threshold.

    Args:
        truth: annotations, or the path of a file in ActivityNet's form; of a file, durations are not needed.
        detections: ``{video id: [{"segment": [start, end], "label": name, "score": number}, …]}`` in seconds, alone or
            as the ``"results"`` of an object, or the path of a file, as `detection_files.read` takes it.
        tious: thresholds.
        subset: evaluate this subset's videos; without it, all.
        blocked: ids of videos that are left out, with their detections.
        only_found: leave out videos of which the detections say nothing, where they count as missed otherwise.
        protocol: ``"thumos14"`` is that of its toolkit, see `thumos`.

    Ids are the same with ActivityNet's ``v_`` and without.

    Raises:
        AnnotationError: the annotations' file has a fault.
        PredictionError: detections are malformed; names the video, the position in its list, and what was expected.
        EmptyError: no video is in the subset.
    """
    own = protocol == "thumos14"
    found = _truth(truth, ("Ambiguous",) if own else ()) if isinstance(truth, (str, Path)) else truth
    found = found if subset is None else found.subset(subset)
    rows = detection_files.read(detections)
    ids = {bare(key) for key in rows}
    places = _Places(found.only(ids) if only_found else found, {bare(key) for key in blocked}, repeated=own)
    read = _columns(dict(sorted(rows.items())) if own else rows, places)
    order = np.lexsort(((read.labels if own else _last_of_ties(read)), -read.scores, read.labels))
    bounds = np.searchsorted(read.labels[order], np.arange(len(places.classes) + 1))
    thresholds = np.asarray(tious, dtype=np.float64)
    counts = [sum(map(len, groups.values())) for groups in places.groups]
    ap = np.zeros((len(thresholds), len(places.classes)))
    for label, groups in enumerate(places.groups):
        chosen = order[bounds[label] : bounds[label + 1]]
        inputs = read.videos[chosen], read.spans[chosen], groups
        if own:
            ap[:, label] = thumos.average_precision(*inputs, places.doubtful, thresholds)
        else:
            ap[:, label] = average_precision(matches(*inputs, thresholds), counts[label])
    return Result(
        tuple(float(t) for t in tious),
        places.classes,
        ap,
        tuple(counts),
        tuple(int(n) for n in np.diff(bounds)),
        read.other_labels,
        read.other_videos,
        int((read.spans[:, 1] <= read.spans[:, 0]).sum()),
        len(places.videos),
        len(places.videos.keys() - ids),
    )


# -- what is evaluated -------------------------------------------------------------------------------------------------


def _truth(path: Path | str, ignore: Collection[str]) -> Annotations:
    found, faults = parse(path, subsets=None, ignore=ignore, durations=False)
    # Published files have a few segments without length; by the protocol they do not count, so they are no reason to
    # stop.
    if serious := [fault for fault in faults if fault.kind != "end before start"]:
        raise AnnotationError(path, serious)
    return found


class _Places:
    """The evaluated segments: numbers for videos, and for each class the segments (n, 2) of each video that has it;
    those that repeat another or have no length only where ``repeated``.
    """

    def __init__(self, truth: Annotations, blocked: Collection[str], repeated: bool) -> None:
        self.blocked = blocked
        self.videos = {bare(v.id): i for i, v in enumerate(truth.videos) if bare(v.id) not in blocked}
        numbered = [(self.videos[bare(v.id)], v) for v in truth.videos if bare(v.id) in self.videos]
        all_of = tuple if repeated else distinct
        kept = [(number, s) for number, video in numbered for s in all_of(video.segments)]
        labels = dict.fromkeys(segment.label for _, segment in kept)
        self.classes = tuple(truth.classes[label] for label in labels)
        self.numbers = {name: i for i, name in enumerate(self.classes)}
        column = {label: i for i, label in enumerate(labels)}
        lists: list[dict[int, list[tuple[float, float]]]] = [{} for _ in labels]
        for video, segment in kept:
            lists[column[segment.label]].setdefault(video, []).append((segment.start, segment.end))
        self.groups = [{video: np.array(spans) for video, spans in groups.items()} for groups in lists]
        self.doubtful = {number: np.array(video.doubtful) for number, video in numbered if video.doubtful}


def distinct(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Those that count: with a length, and each once."""
    kept: list[Segment] = []
    for new in segments:
        same = (
            abs(new.start - k.start) <= REPEATED and abs(new.end - k.end) <= REPEATED and new.label == k.label
            for k in kept
        )
        if new.start < new.end and not any(same):
            kept.append(new)
            yield new


# -- detections --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Of all detections: the video's number (−1: not evaluated), [start, end], the class's number, the score."""

    videos: NDArray[np.int64]
    spans: Array
    labels: NDArray[np.int64]
    scores: Array
    other_labels: dict[str, int]
    other_videos: dict[str, int]


def _columns(rows: Mapping[str, Sequence[Row]], places: _Places) -> _Columns:
    table: list[tuple[int, float, float, int, float]] = []
    other_labels: dict[str, int] = {}
    other_videos: dict[str, int] = {}
    for key, items in rows.items():
        if bare(key) in places.blocked:
            continue
        video = places.videos.get(bare(key), -1)
        for row in items:
            if (label := places.numbers.get(row.label)) is None:
                other_labels[row.label] = other_labels.get(row.label, 0) + 1
                continue
            table.append((video, row.start, row.end, label, row.score))
            if video < 0:
                other_videos[key] = other_videos.get(key, 0) + 1
    array = np.array(table, dtype=np.float64).reshape(-1, 5)
    integers = array[:, [0, 3]].astype(np.int64)
    return _Columns(integers[:, 0], array[:, 1:3], integers[:, 1], array[:, 4], other_labels, other_videos)


# -- matching ----------------------------------------------------------------------------------------------------------


def _last_of_ties(read: _Columns) -> NDArray[np.bool_]:
    """Detections that cannot be right in any order, or only in the place of another one: no length, or the same as one
    of equal score.
    """
    start, end = read.spans[:, 0], read.spans[:, 1]
    order = np.lexsort((end, start, read.scores, read.videos, read.labels))
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in (read.scores, read.videos, read.labels):
        same &= np.diff(column[order]) == 0
    for column in (start, end):
        same &= np.abs(np.diff(column[order])) <= REPEATED
    last = end <= start
    last[order[1:][same]] = True
    return last


def matches(videos: NDArray[np.int64], spans: Array, groups: Mapping[int, Array], tious: Array) -> NDArray[np.bool_]:
    """Which detections are right, (thresholds, detections).

    Args:
        videos, spans: (n,) and (n, 2), the detections of one class by descending score.
        groups: the class's segments (m, 2) by video.
        tious: (thresholds,)

    Videos do not affect each other, so the first detections of all videos are matched at once, then the second ones,
    and so on: as many vectorised steps as the video with the most detections has.
    """
    right = np.zeros((len(tious), len(spans)), dtype=bool)
    keys = np.fromiter(groups, np.int64, len(groups))
    row_of = {int(key): row for row, key in enumerate(keys)}
    rows = np.array([row_of.get(int(v), -1) for v in videos], dtype=np.int64)
    inside = np.flatnonzero(rows >= 0)
    if not len(inside):
        return right
    free = _free(groups.values(), len(tious))
    overlap, choice = _choices(rows, spans, list(groups.values()))
    rank = _rank(rows[inside], len(keys))
    by_rank = inside[np.argsort(rank, kind="stable")]
    for step in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):
        here = rows[step]
        taken = free[:, here[:, None], choice[step]] & (overlap[step] >= tious[:, None, None])
        threshold, column = np.nonzero(taken.any(2))
        right[threshold, step[column]] = True
        free[threshold, here[column], choice[step[column], taken[threshold, column].argmax(1)]] = False
    return right


def _free(groups: Collection[Array], thresholds: int) -> NDArray[np.bool_]:
    """Which segments no detection has taken, (thresholds, videos, most); what pads a video's segments is never free."""
    free = np.zeros((thresholds, len(groups), max(map(len, groups))), dtype=bool)
    for row, spans in enumerate(groups):
        free[:, row, : len(spans)] = True
    return free


def _choices(rows: NDArray[np.int64], spans: Array, groups: Sequence[Array]) -> tuple[Array, NDArray[np.int64]]:
    """For each detection, its video's segments from the highest overlap down: overlaps (n, most), padded with −1, and
    indices (n, most).
    """
    most = max(map(len, groups))
    overlap = np.full((len(rows), most), -1.0)
    choice = np.zeros((len(rows), most), dtype=np.int64)
    by_row = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[by_row], np.arange(len(groups) + 1))
    for row, segments in enumerate(groups):
        here = by_row[bounds[row] : bounds[row + 1]]
        values = iou(spans[here, None], segments)
        order = np.argsort(values, axis=1)[:, ::-1]
        choice[here, : len(segments)] = order
        overlap[here, : len(segments)] = np.take_along_axis(values, order, 1)
    return overlap, choice


def _rank(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many entries before each have the same value."""
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))[:-1]])
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - starts[rows[order]]
    return rank


def average_precision(right: NDArray[np.bool_], segments: int) -> Array:
    """Interpolated AP, (thresholds,), of detections (thresholds, n) by descending score, where there are so many
    segments.

    Recall grows by 1/segments at each right detection and nowhere else, so the area is the sum of the interpolated
    precisions there.
    """
    if not right.shape[1]:
        return np.zeros(len(right))
    precision = np.cumsum(right, 1) / np.arange(1, right.shape[1] + 1)
    highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    return np.where(right, highest, 0.0).sum(1) / segments
