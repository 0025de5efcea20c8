"""pytorchvideo: slow, slowfast, x3d, mvit, csn, r2plus1d, c2d, i3d, on small clips.

The heads of the convolutional networks pool windows of the size that a clip of 224 pixels leaves; here they pool
whatever is left, so that the clip can be small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Built, Case

ZOO = "pytorchvideo_models"


def cases(everything: bool = False) -> list[Case]:
    """Every family; ``everything`` adds nothing to them."""
    return [Case(name, ZOO, partial(_build, name)) for name in _CLIPS]


def _clip(frames: int, side: int) -> torch.Tensor:
    return torch.randn(1, 3, frames, side, side)


def _box() -> torch.Tensor:
    """One box in picture 0."""
    return torch.tensor([[0.0, 10.0, 10.0, 80.0, 80.0]])


def _pathways(frames: int, side: int) -> tuple[list[torch.Tensor]]:
    """The one argument of a two-pathway network: the slow and the fast clip."""
    return ([_clip(frames // 4, side), _clip(frames, side)],)


_CLIPS: dict[str, Callable[[], Any]] = {
    "slow_r50": lambda: _clip(4, 96),
    "slow_r50_detection": lambda: (_clip(4, 96), _box()),
    "slowfast_r50": lambda: _pathways(16, 96),
    "slowfast_r101": lambda: _pathways(16, 96),
    "slowfast_16x8_r101_50_50": lambda: _pathways(16, 96),
    "slowfast_r50_detection": lambda: (*_pathways(32, 96), _box()),
    "x3d_xs": lambda: _clip(4, 96),
    "x3d_s": lambda: _clip(8, 96),
    "x3d_m": lambda: _clip(8, 96),
    "x3d_l": lambda: _clip(8, 96),
    "mvit_base_16x4": lambda: _clip(8, 96),
    "mvit_base_32x3": lambda: _clip(16, 96),
    "mvit_base_16": lambda: torch.randn(1, 3, 96, 96),
    "csn_r101": lambda: _clip(8, 96),
    "r2plus1d_r50": lambda: _clip(8, 96),
    "c2d_r50": lambda: _clip(4, 96),
    "i3d_r50": lambda: _clip(4, 96),
    "efficient_x3d_xs": lambda: _clip(4, 160),
    "efficient_x3d_s": lambda: _clip(13, 160),
}


_SIZES: dict[str, dict[str, Any]] = {
    "mvit_base_16x4": {"spatial_size": 96, "temporal_size": 8},
    "mvit_base_32x3": {"spatial_size": 96, "temporal_size": 16},
    "mvit_base_16": {"spatial_size": 96},
}
"""What networks with position tables of a fixed size must be told."""


def _build(name: str) -> Built:
    from pytorchvideo.models import hub

    torch.manual_seed(0)
    model: nn.Module = getattr(hub, name)(pretrained=False, **_SIZES.get(name, {}))
    if not name.endswith("detection"):
        _pool_all(model)
    return Built(model.train(), _CLIPS[name]())


def _pool_all(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AvgPool3d):
                setattr(module, name, nn.AdaptiveAvgPool3d(1))
