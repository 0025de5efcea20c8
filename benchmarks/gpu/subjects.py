"""The networks that are run on a device, and small stand-ins of the same kinds for a dry run. Random weights, in train
mode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.video import swin_transformer as swin

from benchmarks.harness.llama import Llama
from benchmarks.memory.networks import Pathways

LOW = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """Where all is run, and whether with the small stand-ins."""

    device: torch.device
    tiny: bool


@dataclass(frozen=True)
class Subject:
    """A network and what it is trained on.

    Attributes:
        build: makes it.
        example: (batch, length) → its input, on the CPU; the length is in tokens or frames, or the side of an image.
        batch, length: of a step that is measured.
        dtype: of its weights; None: float32, under bfloat16 autocast.
    """

    build: Callable[[], nn.Module]
    example: Callable[[int, int], Tensor]
    batch: int
    length: int
    dtype: torch.dtype | None = None

    def made(self, device: torch.device) -> nn.Module:
        """The network on a device, always with the same weights."""
        torch.manual_seed(0)
        return self.build().train().to(device, self.dtype)

    def input(self, device: torch.device, batch: int | None = None, length: int | None = None) -> Tensor:
        """An input on a device, in the dtype of the weights where it is no integer."""
        x = self.example(batch or self.batch, length or self.length)
        return x.to(device, self.dtype if x.is_floating_point() else None)

    def around(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around a forward, and a conversion."""
        return nullcontext() if self.dtype else torch.autocast(device.type, LOW)


def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def _clips(side: int) -> Callable[[int, int], Tensor]:
    return lambda batch, frames: torch.randn(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(0))


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def _slowfast() -> nn.Module:
    from pytorchvideo.models.hub import slowfast_r50

    return Pathways(slowfast_r50(pretrained=False, head_pool_kernel_sizes=((None, 1, 1), (None, 1, 1))))


def _small_slowfast() -> nn.Module:
    from pytorchvideo.models.slowfast import create_slowfast

    model = Pathways(create_slowfast(stem_dim_outs=(16, 2), head_pool_kernel_sizes=((1, 1, 1), (1, 1, 1))))
    model.blocks = model.blocks[:2]  # the stem and the first stage
    return model


def _small_swin() -> nn.Module:
    return swin.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 2], [4, 2, 2], num_classes=8)


_LLAMA = partial(Llama, 24, 2048, 16, 5504)
_FULL = {
    "ViT-B/16": Subject(partial(timm.create_model, "vit_base_patch16_224"), _images, 16, 224),
    "ViT-L/16": Subject(partial(timm.create_model, "vit_large_patch16_224"), _images, 64, 224),
    "Swin3D-T": Subject(partial(swin.swin3d_t, weights=None), _clips(224), 2, 16),
    "Swin3D-B": Subject(partial(swin.swin3d_b, weights=None), _clips(224), 4, 32),
    "SlowFast-R50": Subject(_slowfast, _clips(224), 2, 32),
    "Llama-like, 8k tokens": Subject(_LLAMA, _tokens, 1, 8192, LOW),
    "Llama-like, 32k tokens": Subject(_LLAMA, _tokens, 1, 32768, LOW),
}

_SMALL_VIT = partial(
    timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=3
)
_SMALL_LLAMA = partial(Llama, 3, 32, 2, 64, 256)
_SMALL = {
    "ViT-B/16": Subject(_SMALL_VIT, _images, 2, 32),
    "ViT-L/16": Subject(_SMALL_VIT, _images, 4, 32),
    "Swin3D-T": Subject(_small_swin, _clips(32), 1, 8),
    "Swin3D-B": Subject(_small_swin, _clips(32), 1, 8),
    "SlowFast-R50": Subject(_small_slowfast, _clips(32), 1, 8),
    "Llama-like, 8k tokens": Subject(_SMALL_LLAMA, _tokens, 1, 64, LOW),
    "Llama-like, 32k tokens": Subject(_SMALL_LLAMA, _tokens, 1, 128, LOW),
}


def subject(name: str, setting: Setting) -> Subject:
    """A network by name, or its stand-in."""
    return (_SMALL if setting.tiny else _FULL)[name]


def in_precision(found: Subject, precision: str) -> Subject:
    """The same network with weights in bfloat16, or in float32 under bfloat16 autocast."""
    return replace(found, dtype=LOW if precision == "bfloat16" else None)
