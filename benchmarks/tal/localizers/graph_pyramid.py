"""The encoder and decoder of VSGN: a pyramid whose steps also look at those that resemble them most, wherever they are
in the video.

Source: Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network" (arXiv 2011.14598), cross-scale graph pyramid. All
tensors are (batch, channels, steps), masks (batch, steps), True where a step is valid. Parameters are named as in
OpenTAD.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Features -> one sequence per level, each with half the steps of the one before.

    Args:
        first_stride: steps per position of the finest level.
        neighbours: of each step in the graph; None for convolutions alone.
    """

    def __init__(self, in_channels: int, channels: int, levels: int, first_stride: int, neighbours: int | None) -> None:
        super().__init__()
        self.stem_convs = ConvUnit(in_channels, channels, first_stride // 2)
        blocks = [
            ConvUnit(channels, channels, 2) if neighbours is None else GraphUnit(channels, neighbours)
            for _ in range(levels)
        ]
        self.pyramid_convs = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x, mask = self.stem_convs(x, mask)
        levels, masks = [], []
        for block in self.pyramid_convs:
            x, mask = block(x, mask)
            levels.append(x)
            masks.append(mask)
        return levels, masks


class ConvUnit(nn.Module):
    """Convolution and ReLU; invalid steps are 0 after it."""

    def __init__(self, incoming: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(incoming, channels, 3, stride, 1)
        self.stride = stride

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask[:, :: self.stride]
        return F.relu(self.conv(x)) * mask.unsqueeze(1).to(x.dtype), mask


class GraphUnit(nn.Module):
    """relu(convolution + edge convolution), then the larger of neighbours in time at half the steps."""

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.tconv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.nconv1 = EdgeConv(channels, neighbours)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool1d(F.relu(self.tconv1(x) + self.nconv1(x)), 3, 2, 1)
        mask = F.max_pool1d(mask.to(x.dtype), 3, 2, 1) > 0
        return x * mask.unsqueeze(1).to(x.dtype), mask


class EdgeConv(nn.Module):
    """The maximum, over the steps that resemble a step most (itself among them), of a linear map of both.

    Source: Wang et al., "Dynamic Graph CNN" (arXiv 1801.07829), section 3.1. The map is a sum of one of the neighbour
    and one of the step, so each is computed once per step and not once per edge.
    """

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(2 * channels, channels)
        self.neighbours = neighbours

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        batch, steps, channels = x.shape
        if steps < self.neighbours:
            raise ValueError(
                f"VSGN: got a level of {steps} steps; expected at least the number of neighbours, {self.neighbours}"
            )
        index = nearest(x.detach(), self.neighbours)
        of_neighbour, of_step = self.mlp.weight.split(channels, 1)
        mapped = F.linear(x, of_neighbour)
        edges = mapped.gather(1, index.flatten(1).unsqueeze(2).expand(-1, -1, mapped.shape[2]))
        strongest = edges.view(batch, steps, self.neighbours, -1).amax(2)
        return (strongest + F.linear(x, of_step, self.mlp.bias)).transpose(1, 2)


def nearest(x: Tensor, count: int) -> Tensor:
    """The steps of (batch, steps, channels) that are nearest to each step: (batch, steps, count)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # products would cancel
    return distance.topk(count, 2, largest=False).indices


class Decoder(nn.Module):
    """The pyramid from its coarsest level down, each level joined with the one above it; invalid steps are 0 in the
    end.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels_transit = _same(channels)
        self.levels_enc = nn.ModuleList(_same(channels) for _ in range(levels - 1))
        self.levels_dec = nn.ModuleList(_doubled(channels) for _ in range(levels - 1))
        self.levels_fuse = nn.ModuleList(_same(channels) for _ in range(levels - 1))

    def forward(self, levels: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        *finer, coarsest = levels
        out = [self.levels_transit(coarsest)]
        for across, down, fuse, x in zip(
            self.levels_enc, self.levels_dec, self.levels_fuse, reversed(finer), strict=True
        ):
            out.append(fuse(across(x) + down(out[-1])))
        return [x * mask.unsqueeze(1).to(x.dtype) for x, mask in zip(reversed(out), masks, strict=True)]


def _same(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1), nn.ReLU())


def _doubled(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose1d(channels, channels, 3, 2, 1, output_padding=1), nn.ReLU())
