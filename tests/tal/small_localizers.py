"""Localizers that train in seconds, and videos for them."""

import pytest
import torch

from benchmarks.tal.localizers import VSGN, ActionFormer, TriDet

STEPS, CHANNELS = 64, 8


def actionformer(classes=3, **options):
    torch.manual_seed(0)
    return ActionFormer(
        CHANNELS, classes, **{"channels": 32, "window": 5, "max_steps": STEPS, "levels": 4, "drop_path": 0.0} | options
    )


def vsgn(classes=3, **options):
    torch.manual_seed(0)
    options = {
        "channels": 32,
        "max_steps": STEPS,
        "strides": (2, 4, 8, 16),
        "scales": (3.0, 5.0),
        "layers": 1,
        "neighbours": 3,
    } | options
    return VSGN(CHANNELS, classes, **options)


def tridet(classes=3, **options):
    torch.manual_seed(0)
    options = {"channels": 32, "hidden": 64, "window": 5, "wide": 1.3, "bins": 8, "max_steps": STEPS} | options
    return TriDet(CHANNELS, classes, **{"levels": 4, "drop_path": 0.0} | options)


MAKERS = [pytest.param(make, id=make.__name__) for make in (actionformer, tridet, vsgn)]


def batch(videos=2, steps=STEPS, seed=0):
    """Features in which an action of class c raises channels 2c and, towards its end, 2c + 1."""
    generator = torch.Generator().manual_seed(seed)
    features = 0.1 * torch.randn(videos, CHANNELS, steps, generator=generator)
    segments, labels = [], []
    for video in range(videos):
        starts = torch.tensor([4.0, 34.0]) + 4 * torch.rand(2, generator=generator)
        of_video = torch.stack([starts, starts + torch.tensor([8.0, 18.0]) + 4 * torch.rand(2, generator=generator)], 1)
        of_label = torch.randint(0, 3, (2,), generator=generator)
        for (start, end), label in zip(of_video.round().int().tolist(), of_label.tolist(), strict=True):
            features[video, 2 * label, start:end] += 1
            features[video, 2 * label + 1, (start + end) // 2 : end] += 1
        segments.append(of_video)
        labels.append(of_label)
    mask = torch.ones(videos, steps, dtype=torch.bool)
    return features, mask, segments, labels
