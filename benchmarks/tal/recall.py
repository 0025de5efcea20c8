"""How many annotated segments are found at all: by so many proposals a video (AR@AN), and by the best k of each class.

AR@AN, the protocol of ActivityNet's proposal task: AN proposals a video on average. A video gives in proportion to how
many proposals it has, not the same number as any other. Labels do not matter.

Recall at k: of each class and video, the best k detections for each of its segments; one of them may find several
segments.

What counts as a segment is as in `evaluation`. Where scores are equal, the order is numpy's, as in the field's
evaluators.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tal.annotations import Annotations, bare
from benchmarks.tal.evaluation import ACTIVITYNET, Array, distinct
from benchmarks.tal.segments.overlap import iou

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""``{video id: [{"segment": [start, end], "label": name, "score": number}, …]}``, in seconds."""

MOST = 100
"""Proposals a video, on average."""


@dataclass(frozen=True)
class AverageRecall:
    """Recall by 1, 2, .. proposals a video, on average.

    Attributes:
        recall: (thresholds, numbers of proposals), from 0 to 1.
        proposals: (numbers of proposals,): how many a video they are.
    """

    recall: Array
    proposals: Array

    def at(self, count: int) -> float:
        """Mean over thresholds, of so many proposals a video."""
        return float(self.recall[:, count - 1].mean())

    @property
    def area(self) -> float:
        """Under the mean over thresholds, by proposals; from 0 to 1, and from the first number of proposals on."""
        mean = self.recall.mean(0)
        trapezoids = (mean[1:] + mean[:-1]) / 2 * np.diff(self.proposals)
        return float(trapezoids.sum() / self.proposals[-1]) if self.proposals[-1] else 0.0


def average_recall(
    truth: Annotations,
    detections: Results,
    tious: Sequence[float] = ACTIVITYNET,
    *,
    most: int = MOST,
    blocked: Collection[str] = (),
) -> AverageRecall:
    """AR@AN.

    Args:
        truth: of the videos that are evaluated.
        tious: thresholds.
        most: proposals a video; recall is found for each number up to it.
        blocked: ids of videos that are left out.
    """
    left_out = {bare(video) for video in blocked}
    segments = {video: spans for video, spans in _segments(truth).items() if video not in left_out}
    detections = _by_video(detections)
    count = sum(len(rows) for video, rows in detections.items() if video not in left_out)
    best = {video: _best(detections.get(video, ())) for video in segments}
    ratio = most * len(segments) / max(count, 1)
    kept = {video: spans[: min(int(len(spans) * ratio), len(spans))] for video, spans in best.items()}
    total = sum(map(len, kept.values()))
    found = np.zeros((len(tious), most))
    shares = np.arange(1, most + 1) / most * (most * len(segments) / max(total, 1))
    for video, spans in kept.items():
        if len(spans):
            reached = np.maximum.accumulate(iou(segments[video][:, None], spans), 1)
            first = np.minimum((len(spans) * shares).astype(int), len(spans))
            reached = np.where(first > 0, reached[:, first - 1], -1.0)  # (segments, numbers of proposals)
            found += (reached >= np.reshape(tious, (-1, 1, 1))).sum(1)
    per_video = shares * (total / max(len(segments), 1))
    return AverageRecall(found / max(sum(map(len, segments.values())), 1), per_video)


def recall_at(truth: Annotations, detections: Results, tious: Sequence[float], counts: Sequence[int]) -> Array:
    """(thresholds, counts, classes): recall by the best ``k`` x segments detections of each class and video, for each
    ``k`` of ``counts``. Classes are those that have segments, in order of appearance; their mean is what is published.
    """
    columns, detections = [], _by_video(detections)
    for label in dict.fromkeys(s.label for v in truth.videos for s in distinct(v.segments)):
        name, found, total = truth.classes[label], np.zeros((len(tious), len(counts))), 0
        for video, spans in _segments(truth, label).items():
            total += len(spans)
            best = _best([row for row in detections.get(video, ()) if row["label"] == name])
            reached = iou(spans[:, None], best) >= np.reshape(tious, (-1, 1, 1))
            found += np.stack([reached[:, :, : k * len(spans)].any(2).sum(1) for k in counts], 1)
        columns.append(found / total)
    return np.stack(columns, 2) if columns else np.zeros((len(tious), len(counts), 0))


def means_at(
    truth: Annotations, detections: Results, tious: Sequence[float], counts: Sequence[int]
) -> dict[str, float]:
    """Means over classes of :func:`recall_at`, by names such as ``R1@0.50``."""
    if not counts:
        return {}
    of_classes = recall_at(truth, detections, tious, counts)
    means = of_classes.mean(2) if of_classes.shape[2] else np.zeros(of_classes.shape[:2])
    rows = zip(tious, means, strict=True)
    return {f"R{k}@{t:.2f}": float(value) for t, row in rows for k, value in zip(counts, row, strict=True)}


def summary(truth: Annotations, detections: Results, tious: Sequence[float], counts: Sequence[int] = (1, 5)) -> str:
    """AR@AN, and :func:`means_at`, as lines of text, in per cent."""
    average = average_recall(truth, detections, tious)
    lines = [f"AR@{count:<7}{100 * average.at(count):6.2f}" for count in (1, 5, 10, MOST)]
    lines.append(f"AR, area  {100 * average.area:6.2f}")
    means = means_at(truth, detections, tious, counts)
    return "\n".join([*lines, *(f"{name:<10}{100 * value:6.2f}" for name, value in means.items())])


def _by_video(detections: Results) -> Results:
    """By ids without ActivityNet's ``v_``."""
    return {bare(video): rows for video, rows in detections.items()}


def _segments(truth: Annotations, label: int | None = None) -> dict[str, Array]:
    """(n, 2) of each video that has some, of a class or of all."""
    found = {
        bare(video.id): [(s.start, s.end) for s in distinct(video.segments) if label is None or s.label == label]
        for video in truth.videos
    }
    return {video: np.array(spans) for video, spans in found.items() if spans}


def _best(rows: Sequence[Mapping[str, Any]]) -> Array:
    """Segments (n, 2) by descending score."""
    order = np.argsort([float(row["score"]) for row in rows])[::-1]
    spans = np.array([row["segment"] for row in rows], dtype=np.float64).reshape(-1, 2)
    return spans[order.astype(int)]
