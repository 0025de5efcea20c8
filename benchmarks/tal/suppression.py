"""From a localizer's many overlapping segments to detections: non-maximum suppression, hard and soft, score voting, and
fused class scores.

Segments are ``[start, end]`` in any unit. The results are those of the field's compiled kernels; all classes of a video
go through one vectorised loop whose steps are as many as the detections that the largest class keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Decay = Literal["gaussian", "linear", "hard"]

LENGTH = np.float32(1e-6)
"""What is added to lengths, so that a segment of none has an overlap."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class Detections(NamedTuple):
    """``segments`` (n, 2), ``scores`` (n,) and ``labels`` (n,), by descending score."""

    segments: Tensor
    scores: Tensor
    labels: Tensor


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
        """(n, 2), (n,), (n,) → at most ``max_segments`` detections, on the CPU in float32, labels of their dtype."""
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
    start = torch.maximum(kept[:, None, 0], segments[None, :, 0])
    meet = (torch.minimum(kept[:, None, 1], segments[None, :, 1]) - start).clamp(min=0)
    lengths = segments[:, 1] - segments[:, 0]
    iou = meet / ((kept[:, 1] - kept[:, 0])[:, None] + lengths - meet)
    weights = (iou >= threshold).to(scores.dtype) * scores
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


def as_results(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A video's detections, in seconds, in the form that is evaluated and written to files."""
    rows = zip(detections.segments.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [{"segment": segment, "label": classes[int(label)], "score": score} for segment, score, label in rows]


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
        self.start, self.end = spans[self.index, 0], spans[self.index, 1]
        self.length = self.end - self.start + LENGTH
        self.scores = scores[self.index]

    def run(self, how: Suppression) -> tuple[Integers, Floats]:
        """Indices and scores of what is kept, in the order in which it is taken."""
        kept: list[Integers] = []
        values: list[Floats] = []
        for _ in range(how.max_segments):
            best = np.where(self.alive, self.scores, -np.inf).argmax(1)[:, None]
            kept.append(np.take_along_axis(self.index, best, 1)[:, 0])
            values.append(np.take_along_axis(self.scores, best, 1)[:, 0])
            self._suppress(best, how)
            if not self._compact():
                break
        return np.concatenate(kept), np.concatenate(values)

    def _suppress(self, best: Integers, how: Suppression) -> None:
        """Take the ``best`` (rows, 1) out, and let those that overlap it lose score, or go."""
        weight = _weights(self._overlap(best), how)
        self.scores *= weight
        self.alive &= self.scores >= np.float32(how.min_score) if how.soft else weight > 0
        np.put_along_axis(self.alive, best, False, axis=1)

    def _overlap(self, best: Integers) -> Floats:
        start, end, length = (np.take_along_axis(a, best, 1) for a in (self.start, self.end, self.length))
        meet = np.maximum(np.minimum(end, self.end) - np.maximum(start, self.start), np.float32(0))
        return meet / (length + self.length - meet)

    def _compact(self) -> bool:
        """Drop rows that are used up, and columns once half are; whether anything is left."""
        counts = self.alive.sum(1)
        most = int(counts.max())
        if most == 0:
            return False
        if not counts.all():
            self._take(counts > 0)
        if most <= self.alive.shape[1] // 2:
            order = np.argsort(~self.alive, axis=1, kind="stable")[:, :most]
            for name in self.__dict__:
                setattr(self, name, np.take_along_axis(getattr(self, name), order, 1))
        return True

    def _take(self, rows: NDArray[np.bool_]) -> None:
        for name in self.__dict__:
            setattr(self, name, getattr(self, name)[rows])


def _weights(overlap: Floats, how: Suppression) -> Floats:
    """What is left of the scores of those with such an ``overlap`` with a better one, between 0 and 1."""
    one = np.float32(1)
    if how.soft and how.decay == "gaussian":
        return np.exp(-(overlap * overlap) / np.float32(how.sigma))
    hit = overlap >= np.float32(how.iou_threshold)
    return np.where(hit, one - overlap if how.soft and how.decay == "linear" else np.float32(0), one)
