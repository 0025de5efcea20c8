"""How far segments [start, end] overlap: arrays of NumPy or tensors (..., 2), broadcast against each other."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Spans = TypeVar("Spans", Tensor, NDArray[Any])


def lengths(spans: Spans) -> Spans:
    """(...)"""
    return spans[..., 1] - spans[..., 0]


def intersection(a: Spans, b: Spans) -> Spans:
    """The length that both cover, 0 where they do not meet."""
    library: Any = torch if isinstance(a, Tensor) else np
    return (library.minimum(a[..., 1], b[..., 1]) - library.maximum(a[..., 0], b[..., 0])).clip(0)


def areas(a: Spans, b: Spans) -> tuple[Spans, Spans]:
    """The lengths that both cover, and that either covers."""
    meet = intersection(a, b)
    return meet, lengths(a) + lengths(b) - meet


def hull(a: Spans, b: Spans) -> Spans:
    """The length from the first start to the last end."""
    library: Any = torch if isinstance(a, Tensor) else np
    return library.maximum(a[..., 1], b[..., 1]) - library.minimum(a[..., 0], b[..., 0])


def iou(a: Spans, b: Spans, smallest: float = 1e-8) -> Spans:
    """Intersection over union, 0 where they do not meet; a union counts as ``smallest`` at least."""
    meet, union = areas(a, b)
    return meet / union.clip(smallest)
