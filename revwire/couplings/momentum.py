"""Momentum residual networks: the residual flow with a velocity.

    v_{n+1} = γ·v_n + (1−γ)·f(x_n),   x_{n+1} = x_n + v_{n+1},   v_0 = 0      (the paper's letters)
    x_{k+1} = (1+γ)·x_k − γ·x_{k-1} + (1−γ)·F_k(x_k)                          (a, b, c) = (1+γ, −γ, 1−γ)
    output  = x_K

a + b = 1 and c = 1 + b, so the rule integrates the residual flow of the plain network, with inertia; γ → 0 *is* the
plain network. The roots of λ² = aλ + b are 1 and γ: a float inverse multiplies errors by 1/γ per unit. γ = 2^-m is
exact in fixed point with m bits; γ near 1 can be inverted in floating point.

Reference: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import Coefficients, Coupling, is_number, named


@dataclass(frozen=True)
class Momentum(Coupling):
    """(a, b, c) = (1+γ, −γ, 1−γ); ends in the last stream.

    Args:
        gamma: γ, the momentum, 0 < γ < 1. The function is kept the better the smaller it is.

    Raises:
        CouplingError: γ is not between 0 and 1.

    Example:
        >>> Momentum(gamma=1 / 4).kept_bits
        2
    """

    gamma: float = 1 / 8

    backward_parameter: ClassVar[str | None] = "gamma"
    fewest_bits: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0 < self.gamma < 1:
            raise CouplingError(f"momentum: got gamma = {self.gamma}; expected 0 < gamma < 1")

    @property
    def name(self) -> str:
        return f"momentum:{named(self.gamma)}"

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(1 + self.gamma, -self.gamma, 1 - self.gamma)

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
