"""Video Swin Transformer in the layout of mmaction2, whose Re2TAL twin OpenTAD publishes.

An ordinary network: a block is two residual units,

    x ← x + Attention(LayerNorm(x)),   x ← x + MLP(LayerNorm(x)),

and `revwire.convert(..., coupling="re2tal")` makes Re2TAL's Re2Swin of it: two streams per stage, whose mean is then
down-sampled. Sources: Liu et al., "Video Swin Transformer" (arXiv 2106.13230), sections 3.1 to 3.3; Liu et al., "Swin
Transformer" (arXiv 2103.14030), equation 4 for the position bias; Zhao et al., "Re2TAL" (arXiv 2211.14053), section 3.

Two habits of the published networks are kept, as their weights were trained with them: tokens of the padding take part
in attention, and a window that is smaller than the full one uses the position bias of the first tokens of the full
window, not that of its own offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

Size = tuple[int, int, int]
"""Extents along time, height and width."""

APART = -100.0
"""Added to the logit of two tokens that should not see each other."""


class VideoSwin(nn.Module):
    """(batch, 3, frames, height, width) -> (batch, 2^(stages-1)·embed_dim, frames / 2, height / 32, width / 32).

    Sizes are rounded up: inputs are padded with zeros at the end. Swin-T is the default; Swin-S has depths (2, 2, 18,
    2), and Swin-B also embed_dim 128 and heads (4, 8, 16, 32).

    Args:
        patch_size: frames, rows and columns that make one token.
        embed_dim: channels of the first stage; each further one doubles them and halves height and width.
        depths, num_heads: blocks and attention heads of each stage.
        window_size: tokens along time, height and width that attend to each other; every second block shifts the
            windows by half of it.
        mlp_ratio: hidden channels of the MLPs / channels.
        qkv_bias, patch_norm: whether queries, keys and values have a bias, and patches a norm.
        drop_path_rate: probability that the last residual branch is dropped, per sample; it grows linearly from 0 at
            the first block.
        weight_std: of the first weights of linear maps; narrow networks learn sooner from larger ones, about 1 /
            √channels.
    """

    anchor = "patch_embed.proj.weight"
    """A parameter that only this network has, by which it is found in a checkpoint of something larger."""

    def __init__(
        self,
        patch_size: Sequence[int] = (2, 4, 4),
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        drop_path_rate: float = 0.0,
        weight_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(_size(patch_size), embed_dim, patch_norm)
        rates = torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64).tolist()
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**stage
            first = sum(depths[:stage])
            blocks = [
                Block(dim, heads, _size(window_size), bool(i % 2), mlp_ratio, qkv_bias, rate)
                for i, rate in enumerate(rates[first : first + depth])
            ]
            self.layers.append(Stage(blocks, PatchMerging(dim) if stage < len(depths) - 1 else None))
        self.channels = embed_dim * 2 ** (len(depths) - 1)
        self.norm3 = nn.LayerNorm(self.channels)
        self.frame_stride = patch_size[0]
        self.apply(partial(_initialise, std=weight_std))

    @staticmethod
    def own_name(published: str) -> str:
        """A parameter's name here; published: ``layers.0.blocks.1.inv_block.Fm.norm1.weight`` (reversible), or without
        ``inv_block.Fm``.
        """
        return re.sub(r"\.inv_block\.[FG]m\.", ".", published)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.patch_embed(frames)
        for layer in self.layers:
            x = layer(x)
        return self.norm3(x).permute(0, 4, 1, 2, 3)


class PatchEmbedding(nn.Module):
    """(batch, 3, frames, height, width) -> tokens (batch, time, height, width, channels)."""

    def __init__(self, patch: Size, dim: int, norm: bool) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, frames: Tensor) -> Tensor:
        width, height, time = (-s % p for s, p in zip(frames.shape[:1:-1], self.patch[::-1], strict=True))
        x = self.proj(F.pad(frames, (0, width, 0, height, 0, time)))
        return self.norm(x.permute(0, 2, 3, 4, 1))


class Stage(nn.Module):
    """Blocks at one resolution, and the step to the next."""

    def __init__(self, blocks: list[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Block(nn.Module):
    """Window attention and an MLP, each a residual unit with a norm at its head; tokens (batch, time, height, width,
    channels).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Size,
        shifted: bool,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shifted, qkv_bias)
        self.drop_path_attn = StochasticDepth(drop_path, "row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path_mlp = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path_attn(self.attn(self.norm1(x)))
        return x + self.drop_path_mlp(self.mlp(self.norm2(x)))


class MLP(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    """Multi-head attention inside (shifted) windows of tokens (batch, time, height, width, channels)."""

    def __init__(self, dim: int, heads: int, window: Size, shifted: bool, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.shifted = shifted
        self.relative_position_bias_table = nn.Parameter(torch.zeros(_offsets(window), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = _size(x.shape[1:4])
        window, shift = fit_window(size, self.window, self.shifted)
        padded = _size([s + -s % w for s, w in zip(size, window, strict=True)])
        x = F.pad(x, (0, 0, 0, padded[2] - size[2], 0, padded[1] - size[1], 0, padded[0] - size[0]))
        if any(shift):
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        apart = strangers(padded, window, shift, x.device) if any(shift) else None
        x = join_windows(self.attend(split_windows(x, window), apart), padded, window)
        if any(shift):
            x = torch.roll(x, shift, (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    def attend(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """Attention among the tokens of each window.

        Args:
            x: (batch, windows, tokens, channels)
            apart: (windows, tokens, tokens), True for pairs that should not see each other.
        """
        batch, windows, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch * windows, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.position_bias(tokens).to(q.dtype)
        if (
            apart is not None
        ):  # the sum is the largest tensor here: it is made once, and copied only for further samples of a batch
            bias = (bias + APART * apart.to(q.dtype).unsqueeze(1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(out.transpose(1, 2).reshape(batch, windows, tokens, dim))

    def position_bias(self, tokens: int) -> Tensor:
        """The bias of each pair among the first ``tokens`` tokens of a full window, (heads, tokens, tokens)."""
        index = self.relative_position_index[:tokens, :tokens]
        bias = self.relative_position_bias_table[index.reshape(-1)]
        return bias.view(tokens, tokens, self.heads).permute(2, 0, 1)


class PatchMerging(nn.Module):
    """Two by two tokens become one with twice the channels; time stays."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


def fit_window(size: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
    """(window, shift) for tokens of an extent: along an axis that one window covers, it is as large as the axis, and
    not shifted.
    """
    covered = [s <= w for s, w in zip(size, window, strict=True)]
    fitted = [s if c else w for s, w, c in zip(size, window, covered, strict=True)]
    shift = [w // 2 if shifted and not c else 0 for w, c in zip(window, covered, strict=True)]
    return _size(fitted), _size(shift)


def split_windows(x: Tensor, window: Size) -> Tensor:
    """(batch, time, height, width, channels) -> (batch, windows, tokens, channels)."""
    x = x.unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def join_windows(x: Tensor, size: Size, window: Size) -> Tensor:
    """The inverse of `split_windows`, for tokens of extent ``size``."""
    counts = [s // w for s, w in zip(size, window, strict=True)]
    x = x.unflatten(2, window).unflatten(1, counts)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def strangers(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Pairs of tokens that only the cyclic shift brought into one window, bool (windows, tokens, tokens); arXiv
    2103.14030, figure 4.
    """
    regions = torch.zeros((1, *size, 1), dtype=torch.int64, device=device)
    for axis, (length, extent, step) in enumerate(zip(size, window, shift, strict=True)):
        position = torch.arange(length, device=device)
        number = (position >= length - extent).to(regions.dtype) + (position >= length - step).to(regions.dtype)
        regions = 3 * regions + number.view([-1 if a == axis else 1 for a in range(3)] + [1])
    of_token = split_windows(regions, window)[0, :, :, 0]
    return of_token.unsqueeze(1) != of_token.unsqueeze(2)


def relative_positions(window: Size) -> Tensor:
    """Row of the bias table for each pair (query, key) of tokens of a full window, int64 (tokens, tokens)."""
    position = torch.stack(torch.meshgrid([torch.arange(w) for w in window], indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None, :]
    row = torch.zeros_like(offset[0])
    for axis, extent in enumerate(window):
        row = row * (2 * extent - 1) + offset[axis] + extent - 1
    return row


def _offsets(window: Size) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)


def _size(values: Sequence[int]) -> Size:
    time, height, width = values
    return time, height, width


def _initialise(module: nn.Module, std: float) -> None:
    """Truncated normal weights and no bias, as published (with 0.02)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
