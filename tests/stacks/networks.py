"""Two small residual networks: every stack trains one of these, or a small one of its own kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, TOKENS, CLASSES = 16, 6, 5


class Attention(nn.Module):
    """Attention with its projections apart, as tensor parallelism and adapters want them; as many heads as the
    projections are wide.
    """

    head = 8

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers, with dropout between them."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    """Pre-norm transformer block: two units."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width), Mlp(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stem, blocks, a head. ``x``: (batch, TOKENS, WIDTH) → logits (batch, CLASSES)."""

    def __init__(self, depth: int = 3, *, width: int = WIDTH, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

    @staticmethod
    def example(batch: int = 4) -> Tensor:
        return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


class ConvolutionBlock(nn.Module):
    """x + F(x), with batch normalisation in F: its statistics are buffers that a step writes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(F.relu(self.norm(x)))


class ConvolutionNet(nn.Module):
    """``x``: (batch, 3, 8, 8) → logits (batch, CLASSES)."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvolutionBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    @staticmethod
    def example(batch: int = 4) -> Tensor:
        return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class WideningBlock(ConvolutionBlock):
    """Twice as many channels come out, by way of a shortcut that is computed: no reversible unit."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.convolution = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.convolution(F.relu(self.norm(x)))


class StagedNet(ConvolutionNet):
    """Two stages, of which the second is twice as wide."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(3, width)
        stages = [*self.blocks, WideningBlock(width), ConvolutionBlock(2 * width), ConvolutionBlock(2 * width)]
        self.blocks, self.head = nn.Sequential(*stages), nn.Linear(2 * width, CLASSES)


Network = Transformer | ConvolutionNet
