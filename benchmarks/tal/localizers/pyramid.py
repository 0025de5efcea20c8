"""What localizers over a pyramid of points share: the pyramid, the norms of its levels, and the stacks of a head.

Source: ActionFormer (arXiv 2202.07925). Parameters are named as in OpenTAD.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tal.localizers.transformer import ChannelNorm, ConvUnit

PRIOR = 0.01
"""Probability of each class at a point of a new model; Lin et al., "Focal Loss" (arXiv 1708.02002), section 3.3."""


class Pyramid(nn.Module):
    """Features -> one sequence per level, each with half the steps of the one before.

    Args:
        in_channels: of the features. channels: of all levels.
        embed_layers: convolutions before the first block.
        stem, branch: blocks (features, mask) -> (features, mask); those of the branch halve the steps, and begin a
            level each.
        positions: whether a sinusoid is added to the embedded features, of as many as ``max_steps``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        embed_layers: int,
        stem: Iterable[nn.Module],
        branch: Iterable[nn.Module],
        positions: bool,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.embed = nn.ModuleList(ConvUnit(channels if i else in_channels, channels) for i in range(embed_layers))
        self.stem = nn.ModuleList(stem)
        self.branch = nn.ModuleList(branch)
        self.register_buffer("positions", sinusoid(max_steps, channels) if positions else None, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        for unit in self.embed:
            x = unit(x, mask)
        if self.positions is not None:
            x = x + self._positions(x.shape[2]).to(x.dtype) * mask.unsqueeze(1).to(x.dtype)
        for block in self.stem:
            x, mask = block(x, mask)
        levels, masks = [x], [mask]
        for block in self.branch:
            x, mask = block(x, mask)
            levels.append(x)
            masks.append(mask)
        return levels, masks

    def _positions(self, steps: int) -> Tensor:
        """(1, channels, steps); a longer input than in training has the same positions, stretched."""
        known = self.positions.shape[2]
        if steps <= known:
            return self.positions[:, :, :steps]
        if self.training:
            raise ValueError(
                f"Pyramid: got {steps} steps in training; expected at most max_steps, {known}, as positions are encoded"
            )
        return F.interpolate(self.positions, steps, mode="linear", align_corners=False)


class Norms(nn.Module):
    """A norm for each level."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.fpn_norms = nn.ModuleList(ChannelNorm(channels, eps=1e-6) for _ in range(levels))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.fpn_norms, levels, strict=True)]


class Scale(nn.Module):
    """A learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def through(units: nn.ModuleList, x: Tensor, mask: Tensor) -> Tensor:
    """One after the other."""
    for unit in units:
        x = unit(x, mask)
    return x


def doubling(levels: int) -> list[tuple[float, float]]:
    """Distances to the farther end of a segment, by level: (0, 4), (4, 8), (8, 16) .., the last without an end."""
    ends = [0.0, *(4.0 * 2**level for level in range(levels - 1)), 10000.0]
    return list(pairwise(ends))


def sinusoid(steps: int, channels: int) -> Tensor:
    """Positions (1, channels, steps): Vaswani et al. (arXiv 1706.03762), section 3.5, sine and cosine in turn, divided
    by √channels.
    """
    channel = torch.arange(channels, dtype=torch.float64)
    rate = 10000 ** (-2 * (channel // 2) / channels)
    angle = torch.arange(steps, dtype=torch.float64) * rate[:, None]
    wave = torch.where((channel % 2 == 0)[:, None], angle.sin(), angle.cos())
    return wave.float().unsqueeze(0) / channels**0.5
