"""Anchors of a feature pyramid, and which ground truth each box is matched with.

Sources: Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network" (arXiv 2011.14598); Ren et al., "Faster R-CNN"
(arXiv 1506.01497), section 3.1.2, for matching and for the encoding of offsets. Boxes are (..., 2), in steps; a box of
the network covers end − start + 1 steps, a ground truth end − start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.tal.segments.overlap import intersection, lengths

LARGEST_GROWTH = math.log(1000 / 16)
"""Of the logarithm of a box's length, so that its exponential stays finite."""


def anchors(strides: Sequence[int], steps: int, scales: Sequence[float]) -> Tensor:
    """(boxes, 2), float32: level after level, position after position, scale after scale; lengths are scales in
    strides.
    """
    boxes = []
    for stride in strides:
        centre = torch.arange(-(-steps // stride))[:, None] * stride + 0.5 * (1 + stride) - 0.5
        half = (torch.tensor(scales) * stride - 1) / 2
        boxes.append(torch.stack([centre - half, centre + half], -1).flatten(0, 1))
    return torch.cat(boxes)


def boxes_of(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Boxes from offsets (..., 2) of the centre (in tenths of the anchor's length) and of the logarithm of the length
    (in fifths).
    """
    length = anchors[..., 1] - anchors[..., 0] + 1
    centre = anchors.mean(-1) + offsets[..., 0] / 10 * length
    half = (length * (offsets[..., 1] / 5).clamp(max=LARGEST_GROWTH).exp() - 1) / 2
    return torch.stack([centre - half, centre + half], -1)


@dataclass(frozen=True)
class Matches:
    """Of the boxes of a batch.

    Attributes:
        labels: (batch, boxes), int64: 0 for background, else 1 + class.
        segments: (batch, boxes, 2), the ground truth of each positive box, in steps; for background, some other.
    """

    labels: Tensor
    segments: Tensor

    @property
    def positive(self) -> Tensor:
        """(batch, boxes)."""
        return self.labels > 0

    @classmethod
    @torch.no_grad()
    def of(cls, boxes: Tensor, segments: Sequence[Tensor], labels: Sequence[Tensor], threshold: float) -> Matches:
        """Match boxes (batch, n, 2) with each video's segments (m, 2) and labels (m,).

        A box takes the segment with which its IoU is largest, if that is ``threshold`` or more, or if no box has a
        larger IoU with some segment. In a video without segments all boxes are background.
        """
        matched = [_match(b, s.to(b), c, threshold) for b, s, c in zip(boxes, segments, labels, strict=True)]
        return cls(*(torch.stack(parts) for parts in zip(*matched, strict=True)))


def _match(boxes: Tensor, segments: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    if not len(segments):
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), torch.zeros_like(boxes)
    overlap = iou(boxes, segments)
    best, chosen = overlap.max(1)
    positive = (best >= threshold) | (overlap == overlap.amax(0)).any(1)
    return torch.where(positive, labels[chosen] + 1, 0), segments[torch.where(positive, chosen, 0)]


def iou(boxes: Tensor, segments: Tensor) -> Tensor:
    """(boxes, segments): of a box of the network with a ground truth."""
    inter = intersection(boxes[:, None], segments)
    union = (lengths(boxes) + 1)[:, None] + lengths(segments) - inter
    return inter / union.clamp(min=0)
