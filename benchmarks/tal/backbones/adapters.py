"""Temporal adapters inside transformer blocks, which train while the rest of the block stays as it is.

Source: Liu, Zhang, Zhao, Ghanem, "End-to-End Temporal Action Detection with 1B Parameters Across 1000 Frames" (arXiv
2311.17241), section 3.3. Parameters are named as in OpenTAD.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import VideoMAEConfig
from transformers.models.videomae.modeling_videomae import VideoMAELayer

Grid = tuple[int, int, int]
"""Of a video's tokens: times, over all of its clips, rows, columns."""


class Adapter(nn.Module):
    """Tokens of clips (clips, tokens, channels) -> what is added to them: narrowed, told of what the same place shows
    before and after, widened again. Clips of one video follow one another, and are joined in time.

    A new one adds nothing.

    Args:
        ratio: of the narrow channels to all.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        narrow = int(channels * ratio)
        self.gamma = nn.Parameter(torch.ones(1))
        self.dwconv = nn.Conv1d(narrow, narrow, 3, padding=1, groups=narrow)
        self.conv = nn.Conv1d(narrow, narrow, 1)
        self.down_proj = nn.Linear(channels, narrow)
        self.up_proj = nn.Linear(narrow, channels)
        nn.init.normal_(self.dwconv.weight, std=(2 / 3) ** 0.5)
        nn.init.normal_(self.conv.weight, std=(2 / narrow) ** 0.5)
        nn.init.trunc_normal_(self.down_proj.weight, std=0.02)
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.dwconv, self.conv, self.down_proj, self.up_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        narrow = F.gelu(self.down_proj(x))
        of_place = narrow.reshape(-1, *grid, narrow.shape[2]).permute(
            0, 2, 3, 4, 1
        )  # video, row, column, channel, time
        told = self.conv(self.dwconv(of_place.flatten(0, 2))).view(of_place.shape)
        return self.up_proj(narrow + told.permute(0, 4, 1, 2, 3).reshape(narrow.shape)) * self.gamma


class AdaptedLayer(VideoMAELayer):
    """A block of Hugging Face's VideoMAE, and an adapter behind it, or None."""

    def __init__(self, config: VideoMAEConfig, ratio: float | None) -> None:
        super().__init__(config)
        self.adapter = None if ratio is None else Adapter(config.hidden_size, ratio)

    def forward(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        hidden_states = super().forward(hidden_states)
        if self.adapter is None:
            return hidden_states
        return hidden_states + self.adapter(hidden_states, grid)
