"""Ridge regression of reduced rank, from sums over examples: how `Affine` maps are fitted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from revwire.couplings.maps import Affine

FULL_RANK = 64
"""Up to so many channels the rank is full."""


_LEAST_RANK, _CHANNELS_PER_RANK = 32, 16
"""Of wider states: the rank is a sixteenth of the channels, and at least this."""


_LEAST_RIDGE, _MOST_RIDGE = 1e-2, 1e-1
"""The ridge as a share of the mean variance of a channel; between them, channels per token."""


def rank_for(channels: int) -> int:
    """The rank of a map of so many channels."""
    return channels if channels <= FULL_RANK else max(_LEAST_RANK, channels // _CHANNELS_PER_RANK)


class Moments:
    """What is known of a state y and a target t: their sums and products over the rows seen so far.

    Args:
        channels: D.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.origin: tuple[Tensor, Tensor] | None = None  # near the means, so that sums of products keep their digits
        self.sums = torch.zeros(2, channels)
        self.products = torch.zeros(2, channels, channels)  # yᵀy, yᵀt

    def add(self, y: Tensor, t: Tensor) -> None:
        """Take up rows: (n, D) each."""
        if self.origin is None:
            self.origin = y.mean(0), t.mean(0)
            self.sums, self.products = self.sums.to(y), self.products.to(y)
        y, t = y - self.origin[0], t - self.origin[1]
        self.count += len(y)
        self.sums += torch.stack([y.sum(0), t.sum(0)])
        self.products[0].addmm_(y.t(), y)
        self.products[1].addmm_(y.t(), t)

    def fitted(self, dim: int) -> Affine:
        """The map of reduced rank from y to t; ``dim``: the dimension of states that holds the channels."""
        assert self.origin is not None, "rows have been taken up"
        (y, t), channels = self.sums / self.count, self.sums.shape[1]
        variance = (self.products[0] / self.count - torch.outer(y, y)).double()
        common = (self.products[1] / self.count - torch.outer(y, t)).double()
        ridge = max(_LEAST_RIDGE, min(_MOST_RIDGE, channels / self.count)) * variance.diagonal().mean().clamp_min(1e-30)
        weight = torch.linalg.solve(variance + ridge * torch.eye(channels).to(variance), common)
        rank = rank_for(channels)
        if rank < channels:  # the directions in which what is fitted varies most
            _, directions = torch.linalg.eigh(weight.t() @ variance @ weight)
            up = directions[:, -rank:].t()
            down = weight @ up.t()
        else:
            down, up = weight, torch.eye(channels).to(weight)
        bias = (t + self.origin[1]).double() - (y + self.origin[0]).double() @ down @ up
        kind = self.sums.dtype
        return Affine(dim, *(t.to("cpu", kind).contiguous() for t in (down, up, bias)))


def missed(p: Affine, y: Tensor, t: Tensor) -> tuple[float, float]:
    """(Σ|t − p(y)|², Σ|t|²) of rows (n, D)."""
    rest = t - replace(p, dim=-1).value(y)
    return float(rest.square().sum()), float(t.square().sum())
