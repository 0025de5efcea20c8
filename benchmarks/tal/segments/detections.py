"""Scored segments of one video: what a localizer gives, and what is left of it after suppression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Detections(NamedTuple):
    """Of one video.

    Attributes:
        segments: (n, 2), start and end: in steps of the feature grid, or in seconds.
        scores: (n,), from 0 to 1.
        labels: (n,), int64.
    """

    segments: Tensor
    scores: Tensor
    labels: Tensor

    def as_results(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Those in seconds, in the form that is evaluated and written to files."""
        rows = zip(*(part.tolist() for part in self), strict=True)
        return [{"segment": segment, "label": classes[int(label)], "score": score} for segment, score, label in rows]


@dataclass(frozen=True)
class Selection:
    """Which candidates become detections. With one class all of them do, in the order of their places.

    Attributes:
        min_score: with several classes, what a score must exceed.
        most: with several classes, how many of the best are kept.
    """

    min_score: float = 0.001
    most: int = 2000

    def __call__(self, segments: Tensor, scores: Tensor) -> Detections:
        """From segments (places, 2), or (places, classes, 2), and scores (places, classes): a place may become a
        detection of each class.
        """
        classes = scores.shape[1]
        segments = segments if segments.ndim == 3 else segments[:, None].expand(-1, classes, -1)
        if classes == 1:
            return Detections(segments[:, 0], scores[:, 0], torch.zeros_like(scores[:, 0], dtype=torch.int64))
        flat = scores.flatten()
        kept = (flat > self.min_score).nonzero()[:, 0]
        best = flat[kept].topk(min(self.most, len(kept))).indices
        chosen = kept[best]
        return Detections(segments[chosen // classes, chosen % classes], flat[chosen], chosen % classes)
