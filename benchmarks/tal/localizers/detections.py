"""What a localizer gives: scored segments, before any suppression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """Of one video.

    Attributes:
        segments: (n, 2), start and end in steps of the feature grid.
        scores: (n,), from 0 to 1.
        labels: (n,), int64.
    """

    segments: Tensor
    scores: Tensor
    labels: Tensor


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
        """From segments (places, 2) and scores (places, classes): a place may become a detection of each class."""
        classes = scores.shape[1]
        if classes == 1:
            return Detections(
                segments, scores[:, 0], torch.zeros(len(segments), dtype=torch.int64, device=segments.device)
            )
        flat = scores.flatten()
        kept = (flat > self.min_score).nonzero()[:, 0]
        best = flat[kept].topk(min(self.most, len(kept))).indices
        chosen = kept[best]
        return Detections(segments[chosen // classes], flat[chosen], chosen % classes)
