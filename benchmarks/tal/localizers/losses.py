"""Losses of overlap between segments (..., 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tal.segments.overlap import areas, iou

EPSILON = 1e-7
"""What divides is as much at least."""


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (distance of the centres / length of the hull)², of each pair; Zheng et al. (arXiv 1911.08287),
    equation 7.
    """
    centres = predicted.mean(-1) - target.mean(-1)
    hull = _hull(predicted, target).square().clamp(min=EPSILON)
    return 1 - iou(predicted, target, EPSILON) + centres.square() / hull


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (hull − union) / hull, of each pair, predicted ends in either order; Rezatofighi et al. (arXiv
    1902.09630), alg. 1.
    """
    predicted = torch.stack([predicted.amin(-1), predicted.amax(-1)], -1)
    inter, union = areas(predicted, target)
    union, hull = union + EPSILON, _hull(predicted, target) + EPSILON
    return 1 - inter / union + (hull - union) / hull


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """The length from the first start to the last end of each pair."""
    return torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
