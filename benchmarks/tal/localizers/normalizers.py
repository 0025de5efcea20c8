"""What losses are divided by: counts of positives, over all processes that share a batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_processes(count: Tensor) -> Tensor:
    """A count, summed over all processes and divided by their number.

    A loss that each process divides by this has, averaged over processes, the gradients that one process with the whole
    batch would have.
    """
    if processes() == 1:
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total / processes()


def moved(average: Tensor, count: Tensor, momentum: float) -> Tensor:
    """The moving average of the number of positives in a batch over all processes, after one more batch.

    Args:
        average: so far.
        count: positives of this process, a scalar.
        momentum: weight of what was before.
    """
    total = over_processes(count.to(average.dtype)) * processes()
    return momentum * average + (1 - momentum) * total.clamp(min=1)
