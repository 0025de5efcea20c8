"""The networks of the sweeps: how they are built, what they are given, and where their blocks stand. Random weights, in
train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import resnet152
from torchvision.models.video import swin3d_b, swin3d_t

from benchmarks.harness.gpt import GPT


@dataclass(frozen=True)
class Network:
    """A family of networks.

    Attributes:
        build: depth → network (those of one depth ignore it).
        example: (batch, length) → input; the length is that of ``axis``.
        containers: the names of the modules whose children are the blocks, in order.
        axis: what the length counts: the side of an image, frames of a clip, tokens.
        autocast: the dtype of the autocast that it is trained under, if any.
    """

    build: Callable[[int], nn.Module]
    example: Callable[[int, int], Tensor]
    containers: Callable[[nn.Module], list[str]]
    axis: str
    autocast: torch.dtype | None = None

    def around(self) -> AbstractContextManager[Any]:
        """Around a forward, and a conversion."""
        return torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()

    def blocks(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """(container, name in it, block) of each block."""
        for name in self.containers(model):
            container = model.get_submodule(name)
            yield from ((container, child, block) for child, block in container.named_children())


def inflated_resnet152() -> nn.Module:
    """ResNet-152 with every kernel inflated to three dimensions (depth 1, and 3 in the first of each bottleneck)."""
    model = resnet152(weights=None)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(module, name, _inflated(child, 3 if name == "conv1" and child is not model.conv1 else 1))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm3d(child.num_features))
    model.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    model.avgpool = nn.AdaptiveAvgPool3d(1)
    return model


def _inflated(flat: nn.Conv2d, depth: int) -> nn.Conv3d:
    sizes = {"stride": (1, *flat.stride), "padding": (depth // 2, *flat.padding), "groups": flat.groups}
    return nn.Conv3d(
        flat.in_channels, flat.out_channels, (depth, *flat.kernel_size), bias=flat.bias is not None, **sizes
    )


def slowfast(depth: int) -> nn.Module:
    """SlowFast-R101 of pytorchvideo, for clips of any length: one clip in, both pathways made from it."""
    from pytorchvideo.models.hub import slowfast_r101

    return Pathways(slowfast_r101(pretrained=False, head_pool_kernel_sizes=((None, 1, 1), (None, 1, 1))))


class Pathways(nn.Module):
    """A clip (batch, 3, frames, height, width) → the model on every fourth frame and on all of them, pooled over what
    is left.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = model.blocks[:-2]

    def forward(self, clip: Tensor) -> Tensor:
        x: Any = [clip[:, :, ::4], clip]
        for block in self.blocks:
            x = block(x)
        return torch.cat([t.mean((2, 3, 4)) for t in x], 1)


def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=_generator())


def _clips(side: int) -> Callable[[int, int], Tensor]:
    return lambda batch, frames: torch.randn(batch, 3, frames, side, side, generator=_generator())


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _vit(name: str) -> Network:
    def build(depth: int) -> nn.Module:
        return timm.create_model(name, depth=depth)

    return Network(build, _images, lambda _: ["blocks"], "side")


def _with_maps(name: str) -> Network:
    """A ViT for images of any size that spells its attention out, as networks do that bias their maps, or return
    them.
    """

    def build(depth: int) -> nn.Module:
        model = timm.create_model(name, depth=depth, dynamic_img_size=True)
        for block in model.blocks:
            block.attn.fused_attn = False
        return model

    return Network(build, _images, lambda _: ["blocks"], "side")


def _containers(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda _: list(names)


def _pathways(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_modules() if n.endswith("res_blocks")]


_SWIN = _containers("features.0", "features.2", "features.4", "features.6")
_STAGES = _containers("layer1", "layer2", "layer3", "layer4")
_FOUR_STAGES = _containers(*(f"stages.{i}.blocks" for i in range(4)))

NETWORKS: dict[str, Network] = {
    "ViT-S/16": _vit("vit_small_patch16_224"),
    "ViT-S/16, bfloat16 autocast": replace(_vit("vit_small_patch16_224"), autocast=torch.bfloat16),
    "ViT-S/16, attention maps": _with_maps("vit_small_patch16_224"),
    "ViT-B/16": _vit("vit_base_patch16_224"),
    "ViT-L/16": _vit("vit_large_patch16_224"),
    "swin3d_t": Network(lambda _: swin3d_t(weights=None), _clips(112), _SWIN, "frames"),
    "swin3d_t 224": Network(lambda _: swin3d_t(weights=None), _clips(224), _SWIN, "frames"),
    "swin3d_b": Network(lambda _: swin3d_b(weights=None), _clips(112), _SWIN, "frames"),
    "slowfast_r101": Network(slowfast, _clips(64), _pathways, "frames"),
    "convnext_tiny": Network(lambda _: timm.create_model("convnext_tiny"), _images, _FOUR_STAGES, "side"),
    "davit_tiny, bfloat16 autocast": Network(
        lambda _: timm.create_model("davit_tiny"), _images, _FOUR_STAGES, "side", torch.bfloat16
    ),
    "GPT": Network(GPT, _tokens, _containers("layers"), "tokens"),
    "inflated ResNet-152": Network(lambda _: inflated_resnet152(), _clips(64), _STAGES, "frames"),
}


def network(name: str, depth: int = 12) -> nn.Module:
    """A network by name, always with the same weights."""
    torch.manual_seed(0)
    return NETWORKS[name].build(depth).train()
