"""Bidirectional integration approximation with a fixed, positive γ = 2^-m.

    x_{k+1} = γ·x_{k-1} + (1−γ)·x_k + (1+γ)·F_k(x_k)      (a, b, c) = (1−γ, γ, 1+γ)
    output  = x_K

a + b = 1 and c = 1 + b, so the rule integrates the residual flow of the plain network, and γ → 0
*is* the plain network. The roots of λ² = aλ + b are 1 and −γ: a float inverse multiplies errors by
1/γ per unit, so the scheme lives in fixed point, where it keeps m bits per element and unit.

Reference: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
Architectures", arXiv 2407.09093.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import MOST_BITS, Coefficients, Coupling, bits_of, is_number, named


@dataclass(frozen=True)
class Bdia(Coupling):
    """(a, b, c) = (1−γ, γ, 1+γ) with γ = 2^-m, m = 1..7; ends in the last stream.

    Args:
        gamma: γ, one of 1/2, 1/4, 1/8 .. 1/128. Smaller keeps the pretrained function better and
            keeps more bits: m = 1, 2, 3 .. 7 per element and unit.

    Raises:
        CouplingError: γ is none of these.

    Example:
        >>> Bdia(gamma=1 / 8).kept_bits
        3
    """

    gamma: float = 1 / 16

    backward_parameter: ClassVar[str | None] = "gamma"
    fewest_bits: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0 < self.gamma < 1 or bits_of(self.gamma) is None:
            raise CouplingError(f"bdia: got gamma = {self.gamma}; expected a power of two from 1/2 to 1/{2**MOST_BITS}")

    @property
    def name(self) -> str:
        return f"bdia:{named(self.gamma)}"

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(1 - self.gamma, self.gamma, 1 + self.gamma)

    @property
    def error_growth(self) -> float:
        return 1 / self.gamma

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
