"""Losses of overlap between segments (..., 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tal.segments.overlap import areas, hull, iou

EPSILON = 1e-7
"""What divides is as much at least."""


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (distance of the centres / length of the hull)², of each pair; Zheng et al. (arXiv 1911.08287),
    equation 7.
    """
    centres = predicted.mean(-1) - target.mean(-1)
    diagonal = hull(predicted, target).square().clamp(min=EPSILON)
    return 1 - iou(predicted, target, EPSILON) + centres.square() / diagonal


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (hull − union) / hull, of each pair, predicted ends in either order; Rezatofighi et al. (arXiv
    1902.09630), alg. 1.
    """
    predicted = torch.stack([predicted.amin(-1), predicted.amax(-1)], -1)
    inter, union = areas(predicted, target)
    union, whole = union + EPSILON, hull(predicted, target) + EPSILON
    return 1 - inter / union + (whole - union) / whole
