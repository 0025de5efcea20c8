"""SlowFast in the layout of mmaction2, whose Re2TAL twin OpenTAD publishes.

An ordinary network: but for the first of each stage, a block is relu(x + F(x)), which `revwire.convert(...,
coupling="re2tal")` makes x_{k-1} + relu(F(x_k)). The first block changes shape and stays as it is, so it is written as
published: relu(F(x)) + projection(x).

Sources: Feichtenhofer et al., "SlowFast Networks for Video Recognition" (arXiv 1812.03982), section 3 and table 1; Zhao
et al., "Re2TAL" (arXiv 2211.14053), section 3, for the place of the activations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGE_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4

Kernel = tuple[int, int, int]


@dataclass(frozen=True)
class PathwaySpec:
    """What tells the two pathways apart.

    Attributes:
        base_channels: channels after the first convolution.
        conv1_kernel: its extent along time, height and width.
        inflate: for each stage, whether its blocks convolve along time.
    """

    base_channels: int
    conv1_kernel: Kernel
    inflate: tuple[int, ...]


@dataclass(frozen=True)
class BlockSpec:
    """What both pathways have in common.

    Attributes:
        temporal_style: which convolution of a block goes along time: the first ("3x1x1") or the second ("3x3x3").
        activation: of the first block of a stage: Re2TAL's "branch", relu(F(x)) + projection(x), or "sum", relu(F(x) +
            projection(x)), as in the network that Re2TAL began from.
        conv1_stride, pool1_stride: (along time, along space), of the first convolution and of the pooling after it.
        temporal_strides, spatial_strides: of each stage.
    """

    temporal_style: Literal["3x1x1", "3x3x3"] = "3x1x1"
    activation: Literal["branch", "sum"] = "branch"
    conv1_stride: tuple[int, int] = (1, 2)
    pool1_stride: tuple[int, int] = (1, 2)
    temporal_strides: tuple[int, ...] = (1, 1, 1, 1)
    spatial_strides: tuple[int, ...] = (1, 2, 2, 2)


@dataclass(frozen=True)
class LateralSpec:
    """Connections from the fast pathway to the slow one.

    Attributes:
        channel_ratio: slow channels / fast channels (1/β in the paper).
        speed_ratio: steps of the fast pathway / steps of the slow one (α).
        kernel: length of the convolutions along time.
    """

    channel_ratio: int = 8
    speed_ratio: int = 4
    kernel: int = 7


SLOW = PathwaySpec(64, (1, 7, 7), (0, 0, 1, 1))
FAST = PathwaySpec(8, (5, 7, 7), (1, 1, 1, 1))


class SlowFast(nn.Module):
    """(batch, 3, frames, height, width) -> (slow, fast), each (batch, channels, time, height / 32, width / 32).

    The slow pathway gives 32 times its base channels at frames / resample_rate steps, the fast one at speed_ratio times
    as many steps.

    Args:
        depth: 50, 101 or 152 layers, or the number of blocks of each stage.
        resample_rate: the slow pathway sees one of so many frames (τ in the paper); the number of frames must be
            divisible by it.
        slow, fast, lateral, blocks: see there.

    Raises:
        ValueError: the pathways' channels or rates do not fit each other, or the frames the resample rate.
    """

    anchor = "slow_path.conv1.conv.weight"
    """A parameter that only this network has, by which it is found in a checkpoint of something larger."""

    def __init__(
        self,
        depth: int | tuple[int, ...] = 101,
        resample_rate: int = 4,
        slow: PathwaySpec = SLOW,
        fast: PathwaySpec = FAST,
        lateral: LateralSpec = LateralSpec(),
        blocks: BlockSpec = BlockSpec(),
    ) -> None:
        super().__init__()
        if slow.base_channels != lateral.channel_ratio * fast.base_channels:
            raise ValueError(
                f"SlowFast: got {slow.base_channels} slow and {fast.base_channels} fast channels; expected a ratio of "
                f"{lateral.channel_ratio}"
            )
        if resample_rate % lateral.speed_ratio:
            raise ValueError(
                f"SlowFast: got resample rate {resample_rate}; expected a multiple of the speed ratio, "
                f"{lateral.speed_ratio}"
            )
        counts = STAGE_BLOCKS[depth] if isinstance(depth, int) else depth
        self.slow_path = Pathway(slow, counts, blocks, lateral)
        self.fast_path = Pathway(fast, counts, blocks, None)
        self.resample_rate = self.frame_stride = resample_rate
        self.fast_rate = resample_rate // lateral.speed_ratio
        self.channels = self.slow_path.channels + self.fast_path.channels

    @staticmethod
    def own_name(published: str) -> str:
        """A parameter's name here; published: ``slow_path.layer1.blocks.2.inv_block.Fm.conv1.bn.weight``, or
        ``layer1.blocks.0.Fm.``
        """
        return re.sub(r"\.blocks\.(\d+)\.(inv_block\.)?(Fm\.)?", r".\1.", published)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        if frames.shape[2] % self.resample_rate:
            raise ValueError(
                f"SlowFast: got {frames.shape[2]} frames; expected a multiple of the resample rate, "
                f"{self.resample_rate}"
            )
        slow = self.slow_path.stem(frames[:, :, :: self.resample_rate])
        fast = self.fast_path.stem(frames[:, :, :: self.fast_rate])
        for stage in self.slow_path.stages:
            slow = torch.cat([slow, self.slow_path.lateral_of(stage)(fast)], 1)
            slow = self.slow_path.get_submodule(stage)(slow)
            fast = self.fast_path.get_submodule(stage)(fast)
        return slow, fast


class Pathway(nn.Module):
    """A ResNet over time and space; its stages are `layer1`, `layer2` .., and laterals are named after what they
    follow.
    """

    def __init__(
        self, spec: PathwaySpec, counts: tuple[int, ...], blocks: BlockSpec, lateral: LateralSpec | None
    ) -> None:
        super().__init__()
        (conv_t, conv_s), (pool_t, pool_s) = blocks.conv1_stride, blocks.pool1_stride
        self.conv1 = ConvUnit(3, spec.base_channels, spec.conv1_kernel, (conv_t, conv_s, conv_s), relu=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (pool_t, pool_s, pool_s), (0, 1, 1))
        self.stages = [f"layer{number + 1}" for number in range(len(counts))]
        before, channels = "conv1", spec.base_channels
        for number, (name, count) in enumerate(zip(self.stages, counts, strict=True)):
            incoming = channels
            if lateral is not None:
                self.add_module(f"{before}_lateral", Lateral(channels // lateral.channel_ratio, lateral))
                incoming += 2 * channels // lateral.channel_ratio
            width = spec.base_channels * 2**number
            stride = (blocks.temporal_strides[number], blocks.spatial_strides[number], blocks.spatial_strides[number])
            self.add_module(name, stage(incoming, width, count, stride, bool(spec.inflate[number]), blocks))
            before, channels = name, EXPANSION * width
        self.channels = channels

    def stem(self, frames: Tensor) -> Tensor:
        return self.maxpool(self.conv1(frames))

    def lateral_of(self, name: str) -> nn.Module:
        """The connection whose result is concatenated to the input of a stage."""
        index = self.stages.index(name)
        return self.get_submodule(f"{self.stages[index - 1] if index else 'conv1'}_lateral")


class Lateral(nn.Module):
    """From the fast pathway to the steps of the slow one: twice the channels, no norm, no activation."""

    def __init__(self, channels: int, spec: LateralSpec) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            channels,
            2 * channels,
            (spec.kernel, 1, 1),
            (spec.speed_ratio, 1, 1),
            ((spec.kernel - 1) // 2, 0, 0),
            bias=False,
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, fast: Tensor) -> Tensor:
        return self.conv(fast)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, and a ReLU if asked for."""

    def __init__(
        self, incoming: int, channels: int, kernel: Kernel, stride: Kernel = (1, 1, 1), relu: bool = False
    ) -> None:
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = nn.Conv3d(incoming, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(channels)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class Bottleneck(nn.Module):
    """Three convolutions and a skip: relu(x + F(x)), or, where the shape changes, relu(F(x)) + projection(x)."""

    def __init__(
        self, incoming: int, width: int, stride: Kernel, temporal: bool, spec: BlockSpec, projected: bool
    ) -> None:
        super().__init__()
        first, second = (temporal and spec.temporal_style == style for style in ("3x1x1", "3x3x3"))
        self.conv1 = ConvUnit(incoming, width, (3 if first else 1, 1, 1), relu=True)
        self.conv2 = ConvUnit(width, width, (3 if second else 1, 3, 3), stride, relu=True)
        self.conv3 = ConvUnit(width, EXPANSION * width, (1, 1, 1))
        self.downsample = ConvUnit(incoming, EXPANSION * width, (1, 1, 1), stride) if projected else None
        self.activation = spec.activation

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is None:
            return F.relu(x + out)
        if self.activation == "sum":
            return F.relu(out + self.downsample(x))
        return F.relu(out) + self.downsample(x)


def stage(incoming: int, width: int, count: int, stride: Kernel, temporal: bool, spec: BlockSpec) -> nn.Sequential:
    """Blocks of one resolution; the first changes shape, unless there is nothing to change."""
    projected = incoming != EXPANSION * width or stride != (1, 1, 1)
    first = Bottleneck(incoming, width, stride, temporal, spec, projected)
    rest = [Bottleneck(EXPANSION * width, width, (1, 1, 1), temporal, spec, False) for _ in range(count - 1)]
    return nn.Sequential(first, *rest)
