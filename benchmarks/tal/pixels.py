"""What is done to the pixels of a clip: one random choice for all of its frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]
"""Frames uint8 (frames, 3, height, width) → the same, of the size that the backbone gets."""

BINS = 30
"""Of magnitudes of RandAugment in torchvision, the last of which is 10 in the paper."""


def augmentation(
    size: int,
    *,
    scale: tuple[float, float] | None = (0.08, 1.0),
    flip: bool = True,
    operations: int = 0,
    magnitude: int = 9,
    jitter: float = 0.0,
) -> Transform:
    """For training: a random part of the picture (``scale``: its share of the area; None: a random square) scaled to
    ``size`` pixels.

    ``flip`` mirrors half of the clips; so many ``operations`` are drawn as in RandAugment (arXiv 1909.13719), with a
    ``magnitude`` from 0 to 10; ``jitter`` changes brightness, contrast and saturation by up to this share.
    """
    cut: v2.Transform = (
        v2.RandomCrop(size) if scale is None else v2.RandomResizedCrop(size, scale=scale, antialias=True)
    )
    steps: list[v2.Transform] = [cut]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if operations:
        steps.append(v2.RandAugment(operations, magnitude * BINS // 10, BINS + 1))
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose(steps)


def centre(size: int) -> Transform:
    """For testing: the square of ``size`` pixels in the middle."""
    return v2.CenterCrop(size)


def transformed(transform: Transform, pixels: Tensor, seeds: np.random.SeedSequence) -> Tensor:
    """The frames of a clip, transformed: (3, frames, height, width). Its random choices come from ``seeds``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generate_state(2, np.uint64)[1]) % 2**63)
        return transform(pixels).transpose(0, 1).contiguous()
