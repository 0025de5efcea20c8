"""Hypothesis strategies: random residual networks, as chains that are driven directly, and as plain modules for
`revwire.convert`.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cases import CASES, EXACT
from toys import Toy


@dataclass(frozen=True)
class Shape:
    """What a random network is made of."""

    seed: int
    depth: int
    width: int
    batch: int
    tokens: int  # or height and width of an image
    image: bool
    norm: str  # "none", "layer", "batch"
    post: bool  # post-activation blocks instead of residual units
    dropout: float
    extra: bool
    shared: bool  # all blocks are the same module
    frozen: int  # that many first blocks
    narrow: bool  # branches compute in bfloat16
    training: bool

    def input(self, dtype=torch.float32):
        shape = (
            (self.batch, self.width, self.tokens, self.tokens) if self.image else (self.batch, self.tokens, self.width)
        )
        return (
            torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)
            .to(dtype)
            .requires_grad_()
        )

    def extras(self, dtype=torch.float32):
        return (
            (torch.linspace(0.5, 1.5, self.tokens, dtype=dtype).requires_grad_(),)
            if self.extra and not self.image
            else ()
        )


shapes = st.builds(
    Shape,
    seed=st.integers(0, 1000),
    depth=st.integers(1, 7),
    width=st.sampled_from([2, 5, 8]),
    batch=st.integers(2, 4),
    tokens=st.integers(2, 5),
    image=st.booleans(),
    norm=st.sampled_from(["none", "layer", "batch"]),
    post=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    extra=st.booleans(),
    shared=st.booleans(),
    frozen=st.integers(0, 2),
    narrow=st.booleans(),
    training=st.booleans(),
)


class Branch(nn.Module):
    """F: norm, mix, nonlinearity, dropout, scaled by the extra input if there is one."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.norm = {"none": nn.Identity, "layer": self.layer_norm, "batch": self.batch_norm}[shape.norm]()
        self.mix = (
            nn.Conv2d(shape.width, shape.width, 3, padding=1) if shape.image else nn.Linear(shape.width, shape.width)
        )
        self.dropout = nn.Dropout(shape.dropout)

    def layer_norm(self):
        return nn.GroupNorm(1, self.shape.width) if self.shape.image else nn.LayerNorm(self.shape.width)

    def batch_norm(self):
        return nn.BatchNorm2d(self.shape.width) if self.shape.image else nn.BatchNorm1d(self.shape.tokens)

    def forward(self, x, gate=None):
        mix = self.half if self.shape.narrow else self.mix
        h = self.dropout(F.gelu(mix(self.norm(x))))
        return h if gate is None else h * gate[:, None].to(h.dtype)

    def half(self, h):
        h, weight, bias = h.bfloat16(), self.mix.weight.bfloat16(), self.mix.bias.bfloat16()
        return F.conv2d(h, weight, bias, padding=1) if self.shape.image else F.linear(h, weight, bias)


def branches_of(shape):
    torch.manual_seed(shape.seed)
    made = [Branch(shape) for _ in range(1 if shape.shared else shape.depth)]
    made = made * shape.depth if shape.shared else made
    for branch in made[: shape.frozen]:
        branch.requires_grad_(False)
    return made


def chain_of(shape, case):
    """The network as a chain that is driven without the graph side."""
    model = Toy(branches_of(shape), case, "block" if shape.post else "residual", largest=4.0)
    return model.train(shape.training)


class Block(nn.Module):
    """x + F(x), or tanh(x + F(x))."""

    def __init__(self, branch, post):
        super().__init__()
        self.branch, self.post = branch, post

    def forward(self, x, *extras):
        y = x + self.branch(x, *extras)
        return torch.tanh(y) if self.post else y


class Network(nn.Module):
    """The network as anybody would write it, with a stem and a head that are not residual."""

    def __init__(self, shape):
        super().__init__()
        branches = branches_of(shape)
        self.stem = nn.Conv2d(shape.width, shape.width, 1) if shape.image else nn.Linear(shape.width, shape.width)
        self.blocks = nn.ModuleList(Block(branch, shape.post) for branch in branches)
        self.train(shape.training)

    def forward(self, x, *extras):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *extras)
        return x.sin()


cases = st.sampled_from(CASES)
exact_cases = st.sampled_from(EXACT)
