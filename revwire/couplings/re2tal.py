"""The rewiring of Re2TAL: the skip of every unit jumps over one unit.

    x_{k+1} = x_{k-1} + F_k(x_k)             (a, b, c) = (0, 1, 1)
    output  = (x_{K-1} + x_K) / 2

A post-activation block act(x + F(x)) loses its skip and moves the activation into the branch,
x_{k+1} = x_{k-1} + act(F(x_k)), as published, so that published checkpoints mean the same here.
The pretrained *function* is not kept: the paper fine-tunes the rewired backbone first.

Reference: Zhao, Liu, Mangalam, Ghanem, "Re2TAL", CVPR 2023, arXiv 2211.14053.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from revwire.couplings.base import Coefficients, Coupling


@dataclass(frozen=True)
class Re2TAL(Coupling):
    """(a, b, c) = (0, 1, 1), ends in the mean of both streams, keeps no bits.

    Example:
        >>> Re2TAL().coefficients
        Coefficients(a=0.0, b=1.0, c=1.0)
    """

    @property
    def name(self) -> str:
        return "re2tal"

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(0.0, 1.0, 1.0)

    @property
    def error_growth(self) -> float:
        return 1.0

    @property
    def drops_skip(self) -> bool:
        return True

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return (previous + current) / 2
