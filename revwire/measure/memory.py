"""Bytes of a step: the most at once, and what a forward pass leaves alive."""

from __future__ import annotations

from collections.abc import Callable

import torch

from revwire.measure._trace import traced


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory that ``step`` holds at once, in bytes above the level at which it starts.

    ``step`` runs twice. The first run allocates what stays (gradients, caches), and is not measured.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).exp())
        8000
    """
    step()
    (held,) = traced(lambda _: step(), torch.device(device))
    return held.peak


def saved_bytes(forward: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """What a forward pass leaves alive for as long as its result is: the result, and all that its graph saves, in
    bytes.

    ``forward`` runs twice, as in `peak_bytes`. Tensors that were there before (weights, inputs) cost nothing.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> saved_bytes(lambda: x.exp())
        4000
    """
    forward()
    (held,) = traced(lambda _: forward(), torch.device(device))
    return held.end
