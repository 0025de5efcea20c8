"""Transformer blocks over a sequence of steps with a mask, which may halve its length.

Source: Zhang, Wu, Li, "ActionFormer" (arXiv 2202.07925). All tensors are (batch, channels, steps), masks (batch,
steps), True where a step is valid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

INVALID = -1e4
"""Added to the logit of an invalid step within a window: finite, so that a window without any valid step is no 0 /
0.
"""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvUnit(nn.Module):
    """Convolution, norm, ReLU; invalid steps are 0 before and after."""

    def __init__(self, incoming: int, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(incoming, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        valid = mask.unsqueeze(1).to(x.dtype)
        return F.relu(self.norm(self.conv(x) * valid)) * valid


class Depthwise(nn.Module):
    """A convolution of three steps in each channel, which may halve the length; invalid steps are 0 after it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.conv(x) * valid


class ScaledPath(nn.Module):
    """A residual branch with a learned scale per channel, dropped at random per sample; Touvron et al., CaiT (arXiv
    2103.17239).
    """

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1), 1e-4))
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_depth(self.scale * x, self.rate, "row", self.training)


class ConvAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from depthwise convolutions, among all steps or within
    local windows.

    Args:
        window: a step attends to window // 2 steps on either side; 1 or less: to all.
        stride: 2 halves the number of steps first.
    """

    def __init__(self, channels: int, heads: int, window: int, stride: int) -> None:
        super().__init__()
        self.heads = heads
        self.reach = window // 2 if window > 1 else None
        for name in ("query", "key", "value"):
            self.add_module(f"{name}_conv", Depthwise(channels, stride))
            self.add_module(f"{name}_norm", ChannelNorm(channels))
            self.add_module(name, nn.Conv1d(channels, channels, 1))
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            mask: of the steps that come out.
        """
        valid = mask.unsqueeze(1).to(x.dtype)
        query, key, value = (self._projected(name, x, valid) for name in ("query", "key", "value"))
        if self.reach is None:
            out = F.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        else:
            out = local_attention(query, key, value, mask, self.reach)
        return self.proj(out.transpose(2, 3).flatten(1, 2)) * valid

    def _projected(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        """(batch, heads, steps, channels of a head)."""
        x = self.get_submodule(f"{name}_norm")(self.get_submodule(f"{name}_conv")(x, valid))
        return self.get_submodule(name)(x).unflatten(1, (self.heads, -1)).transpose(2, 3)


def local_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, reach: int) -> Tensor:
    """Attention among steps at most ``reach`` apart, in time and memory proportional to steps · reach.

    Queries are cut into pieces of ``reach`` steps; each sees the three pieces around it, of which a band is left.
    Invalid queries give 0.

    Args:
        query, key, value: (batch, heads, steps, channels)
        mask: (batch, steps)
    """
    steps = query.shape[2]
    rest = -steps % reach
    pieces = F.pad(query, (0, 0, 0, rest)).unflatten(2, (-1, reach))
    around = (0, 0, reach, reach + rest)
    key, value = (
        F.pad(x, around).unfold(2, 3 * reach, reach) for x in (key, value)
    )  # (batch, heads, pieces, channels, 3 reach)
    logits = pieces @ key * query.shape[-1] ** -0.5
    invalid = F.pad(~mask, (reach, reach + rest), value=True).unfold(1, 3 * reach, reach)
    logits = logits + INVALID * invalid[:, None, :, None, :].to(logits.dtype)
    logits = logits.masked_fill(_outside(steps, reach, mask.device), float("-inf"))
    out = logits.softmax(-1) @ value.transpose(3, 4)
    return out.flatten(2, 3)[:, :, :steps] * mask[:, None, :, None].to(out.dtype)


def _outside(steps: int, reach: int, device: torch.device) -> Tensor:
    """Which of the three pieces' steps are too far from a query, or beyond the ends: (pieces, reach, 3 reach).

    A query that only fills the last piece keeps itself, so that its weights, which nobody uses, are numbers.
    """
    pieces = -(-steps // reach)
    query = torch.arange(pieces * reach, device=device).view(pieces, reach, 1)
    key = torch.arange(-reach, 2 * reach, device=device) + reach * torch.arange(pieces, device=device).view(
        pieces, 1, 1
    )
    far = (key - query).abs() > reach
    return (far | (key < 0) | (key >= steps)) & (key != query)


class Block(nn.Module):
    """Attention and an MLP, each a residual branch with a norm at its head; with stride 2, half as many steps come
    out.
    """

    def __init__(self, channels: int, heads: int, window: int, stride: int, drop_path: float, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.ln1 = ChannelNorm(channels)
        self.attn = ConvAttention(channels, heads, window, stride)
        self.ln2 = ChannelNorm(channels)
        hidden = 4 * channels
        self.mlp = nn.Sequential(
            nn.Conv1d(channels, hidden, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv1d(hidden, channels, 1),
            nn.Dropout(dropout),
        )
        self.drop_path_attn = ScaledPath(channels, drop_path) if drop_path else nn.Identity()
        self.drop_path_mlp = ScaledPath(channels, drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask[:, :: self.stride]
        valid = mask.unsqueeze(1).to(x.dtype)
        skip = x if self.stride == 1 else F.max_pool1d(x, 3, self.stride, 1)
        x = skip * valid + self.drop_path_attn(self.attn(self.ln1(x), mask))
        return x + self.drop_path_mlp(self.mlp(self.ln2(x)) * valid), mask
