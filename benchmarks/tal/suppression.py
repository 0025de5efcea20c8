"""From a localizer's many overlapping segments to detections: non-maximum suppression, hard and soft, score voting, and
fused class scores.

Segments are ``[start, end]`` in any unit. The results are those of the field's compiled kernels; all classes of a video
go through one vectorised loop whose steps are as many as the detections that the largest class keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tal.segments.detections import Detections
from benchmarks.tal.segments.overlap import areas, intersection, lengths

Decay = Literal["gaussian", "linear", "hard"]

LENGTH = np.float32(1e-6)
"""What is added to lengths, so that a segment of none has an overlap."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Suppression:
    """How overlapping detections are thinned out; a call does it.

    Soft (Bodla et al., arXiv 1704.04503): the best detection is taken, and those that overlap it lose score, by
    exp(−IoU²/sigma) (``gaussian``), by 1 − IoU from ``iou_threshold`` on (``linear``), or all of it from there on
    (``hard``); and so on with those that
    still have ``min_score``. The best detection of all is kept whatever its score. Not soft: those above ``min_score``
    that do not overlap a better one by ``iou_threshold`` are kept as they are.

    ``multiclass`` treats each class by itself. Otherwise labels do not matter, and ``voting`` above 0 moves each kept
    segment to the mean of all segments that overlap it so much, weighted by their scores; with ``multiclass`` there is
    no voting, as in the reference. ``max_segments`` is kept of each class, and of all.
    """

    soft: bool = True
    decay: Decay = "gaussian"
    sigma: float = 0.5
    iou_threshold: float = 0.0
    min_score: float = 0.0
    max_segments: int = 100
    multiclass: bool = True
    voting: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in ("gaussian", "linear", "hard"):
            raise ValueError(f"unknown decay {self.decay!r}; expected 'gaussian', 'linear' or 'hard'")
        if self.max_segments < 1 or self.sigma <= 0 or self.min_score < 0:
            raise ValueError(f"expected max_segments ≥ 1, sigma > 0 and min_score ≥ 0; got {self}")

    def __call__(self, segments: Tensor, scores: Tensor, labels: Tensor) -> Detections:
        """(n, 2), (n,), (n,) → at most ``max_segments`` detections, best first, on the CPU in float32, labels of their
        dtype.
        """
        segments, scores, labels = segments.detach().cpu().float(), scores.detach().cpu().float(), labels.detach().cpu()
        if segments.shape != (len(scores), 2) or labels.shape != scores.shape:
            raise ValueError(
                f"expected (n, 2), (n,) and (n,), got {tuple(segments.shape)}, {tuple(scores.shape)}, "
                f"{tuple(labels.shape)}"
            )
        groups = _by_label(labels.numpy()) if self.multiclass else [np.arange(len(scores))]
        kept, values = self._keep(segments.numpy(), scores.numpy(), groups)
        order = np.argsort(-values, kind="stable")[: self.max_segments]
        indices = torch.from_numpy(kept[order])
        chosen = segments[indices]
        if self.voting > 0 and not self.multiclass:
            chosen = vote(chosen, segments, scores, self.voting)
        return Detections(chosen, torch.from_numpy(values[order]), labels[indices])

    def _keep(self, spans: Floats, scores: Floats, groups: Sequence[Integers]) -> tuple[Integers, Floats]:
        """(indices, scores) of what is kept of all groups, each group's by descending score."""
        if not self.soft and self.min_score > 0:
            groups = [group[scores[group] > np.float32(self.min_score)] for group in groups]
        groups = [group for group in groups if len(group)]
        if not groups:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return _Pool(spans, scores, groups).run(self)


def vote(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Each of ``kept`` (k, 2) as the mean of those of ``segments`` (n, 2) with at least this IoU, weighted by
    ``scores`` (n,).

    A segment that no other one reaches stays as it is (the reference makes NaN of one without length).
    """
    meet, union = areas(kept[:, None], segments)
    weights = (meet / union >= threshold).to(scores.dtype) * scores
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, (weights / total) @ segments, kept)


def fuse(segments: Tensor, scores: Tensor, classes: Sequence[tuple[int, float]]) -> Detections:
    """Class-agnostic detections (n, 2), (n,) once for each (label, score) of their video, the scores multiplied; not
    sorted again.
    """
    count = len(scores)
    labels = torch.tensor([label for label, _ in classes], dtype=torch.long).repeat_interleave(count)
    factors = [scores * score for _, score in classes]
    return Detections(segments.repeat(len(classes), 1), torch.cat(factors) if factors else scores[:0], labels)


# -- the loop ----------------------------------------------------------------------------------------------------------


def _by_label(labels: NDArray[Any]) -> list[Integers]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


class _Pool:
    """Groups side by side, a row each: (rows, width), padded where ``alive`` is false. Rows and columns go as they are
    used up.
    """

    def __init__(self, spans: Floats, scores: Floats, groups: Sequence[Integers]) -> None:
        width = max(map(len, groups))
        self.index = np.zeros((len(groups), width), dtype=np.int64)
        self.alive = np.zeros((len(groups), width), dtype=bool)
        for row, group in enumerate(groups):
            self.index[row, : len(group)] = group
            self.alive[row, : len(group)] = True
        self.spans, self.scores = spans[self.index], scores[self.index]

    def run(self, how: Suppression) -> tuple[Integers, Floats]:
        """Indices and scores of what is kept, in the order in which it is taken."""
        kept: list[Integers] = []
        values: list[Floats] = []
        for _ in range(how.max_segments):
            best = np.arange(len(self.alive)), np.where(self.alive, self.scores, -np.inf).argmax(1)
            kept.append(self.index[best])
            values.append(self.scores[best])
            weight = _weights(_overlap(self.spans[best][:, None], self.spans), how)
            self.scores *= weight
            self.alive &= self.scores >= np.float32(how.min_score) if how.soft else weight > 0
            self.alive[best] = False
            if not self.alive.any():
                break
            self._compact()
        return np.concatenate(kept), np.concatenate(values)

    def _compact(self) -> None:
        """Drop rows that are used up, and columns once half are."""
        counts = self.alive.sum(1)
        if not counts.all():
            self._take(np.flatnonzero(counts))
        if (most := int(counts.max())) <= self.alive.shape[1] // 2:
            columns = np.argsort(~self.alive, axis=1, kind="stable")[:, :most]
            self._take((np.arange(len(columns))[:, None], columns))

    def _take(self, places: Any) -> None:
        self.index, self.alive = self.index[places], self.alive[places]
        self.spans, self.scores = self.spans[places], self.scores[places]


def _overlap(spans: Floats, others: Floats) -> Floats:
    meet = intersection(spans, others)
    return meet / ((lengths(spans) + LENGTH) + (lengths(others) + LENGTH) - meet)


def _weights(overlap: Floats, how: Suppression) -> Floats:
    """What is left of the scores of those with such an ``overlap`` with a better one, between 0 and 1."""
    one = np.float32(1)
    if how.soft and how.decay == "gaussian":
        return np.exp(-(overlap * overlap) / np.float32(how.sigma))
    hit = overlap >= np.float32(how.iou_threshold)
    return np.where(hit, one - overlap if how.soft and how.decay == "linear" else np.float32(0), one)
