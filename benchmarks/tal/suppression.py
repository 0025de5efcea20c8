"""From a localizer's many overlapping segments to detections: non-maximum suppression, hard and soft, score voting, and
fused class scores.

Segments are ``[start, end]`` in any unit. The results are those of the field's compiled kernels. Soft suppression takes
equal scores of a class in their order, too (`suppression_kernels`, Note [Order of ties]). Hard suppression and the last
sorting of all classes are equal to theirs but for ties: they keep the order in which detections come, where that of the
field is left to its sort.
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
from benchmarks.tal.segments.overlap import iou

Decay = Literal["gaussian", "linear", "hard"]

_DECAYS = {"hard": 0, "linear": 1, "gaussian": 2}

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
        if self.decay not in _DECAYS:
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
        kept, values = self._keep(segments.numpy(), scores.numpy(), labels.numpy())
        order = np.argsort(-values, kind="stable")[: self.max_segments]
        indices = torch.from_numpy(kept[order])
        chosen = segments[indices]
        if self.voting > 0 and not self.multiclass:
            chosen = vote(chosen, segments, scores, self.voting)
        return Detections(chosen, torch.from_numpy(values[order]), labels[indices])

    def _keep(self, spans: Floats, scores: Floats, labels: NDArray[Any]) -> tuple[Integers, Floats]:
        """(indices, scores) of what is kept of all groups, each group's by descending score."""
        from benchmarks.tal import suppression_kernels as kernels  # Numba takes a second to import

        labels = labels if self.multiclass else np.zeros(len(scores), np.int64)
        keys = (labels,) if self.soft else (-scores, labels)
        order = np.lexsort(keys)
        if not self.soft and self.min_score > 0:
            order = order[scores[order] > np.float32(self.min_score)]
        if not len(order):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        ends = np.flatnonzero(np.diff(labels[order])) + 1
        bounds = np.concatenate([[0], ends, [len(order)]])
        kept, values = np.empty(len(order), np.int64), np.empty(len(order), np.float32)
        rest = (self.max_segments, kept, values)
        threshold = np.float32(self.iou_threshold)
        if self.soft:
            how = (_DECAYS[self.decay], np.float32(self.sigma), threshold, np.float32(self.min_score))
            count = kernels.soft(spans, scores, order, bounds, *how, *rest)
        else:
            count = kernels.hard(spans, scores, order, bounds, threshold, *rest)
        return kept[:count], values[:count]


def vote(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Each of ``kept`` (k, 2) as the mean of those of ``segments`` (n, 2) with at least this IoU, weighted by
    ``scores`` (n,).

    A segment that no other one reaches stays as it is (the reference makes NaN of one without length).
    """
    weights = (iou(kept[:, None], segments) >= threshold).to(scores.dtype) * scores
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
