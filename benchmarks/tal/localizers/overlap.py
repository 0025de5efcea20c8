"""Losses of overlap between segments (..., 2), and the count of what they are divided by."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_EPSILON = 1e-7


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (distance of the centres / length of the hull)², of each pair; Zheng et al. (arXiv 1911.08287),
    equation 7.
    """
    inter, union, hull = _measures(predicted, target)
    centres = predicted.mean(-1) - target.mean(-1)
    return 1 - inter / union.clamp(min=_EPSILON) + centres.square() / hull.square().clamp(min=_EPSILON)


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − IoU + (hull − union) / hull, of each pair, predicted ends in either order; Rezatofighi et al. (arXiv
    1902.09630), alg. 1.
    """
    inter, union, hull = _measures(torch.stack([predicted.amin(-1), predicted.amax(-1)], -1), target)
    union, hull = union + _EPSILON, hull + _EPSILON
    return 1 - inter / union + (hull - union) / hull


def _measures(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of intersection, union and hull of each pair."""
    inter = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return inter, union, hull


def over_processes(count: Tensor) -> Tensor:
    """A count, summed over all processes and divided by their number.

    A loss that each process divides by this has, averaged over processes, the gradients that one process with the whole
    batch would have.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def processes() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def moved(average: Tensor, count: Tensor, momentum: float) -> Tensor:
    """The moving average of the number of positives in a batch over all processes, after one more batch.

    Args:
        average: so far.
        count: positives of this process, a scalar.
        momentum: weight of what was before.
    """
    total = over_processes(count.to(average.dtype)) * processes()
    return momentum * average + (1 - momentum) * total.clamp(min=1)
