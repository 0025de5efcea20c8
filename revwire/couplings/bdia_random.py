"""Bidirectional integration approximation as published: the sign of γ is drawn at random for each sample and unit.

    x_{k+1} = γ·x_{k-1} + (1−γ)·x_k + (1+γ)·F_k(x_k),   γ = ±|γ| at random     (training)
    x_{k+1} = x_k + F_k(x_k)                                                  (evaluation: E[γ] = 0)
    output  = x_K

Training with random signs regularises; evaluation *is* the original network, to the bit in the stream's dtype. A model
counts as in evaluation where the module that begins a chain is in eval mode; with gradients enabled its activations are
then stored, as γ = 0 cannot be inverted. The default generator of the stream's device gives the signs, one draw per
unit.

Reference: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing Architectures", arXiv
2407.09093.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import Coefficients, Coupling, Kind, Rule, named, random_signs


@dataclass(frozen=True)
class RandomBdia(Coupling):
    """(a, b, c) = (1−γ, γ, 1+γ) with γ = ±1/2 or ±1/4, a sign per sample (dimension 0 of the stream) and unit; plain in
    eval mode.

    Args:
        gamma: |γ|, 1/2 or 1/4: 1 or 2 bits per element and unit.

    Raises:
        CouplingError: |γ| is neither.

    Example:
        >>> RandomBdia(gamma=1 / 4).kept_bits
        2
    """

    gamma: float = 1 / 2

    backward_parameter: ClassVar[str | None] = "gamma"
    fewest_bits: ClassVar[int] = 1
    plain_in_eval: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gamma not in (1 / 2, 1 / 4):
            raise CouplingError(f"bdia-random: got gamma = {self.gamma}; expected 1/2 or 1/4")

    @property
    def name(self) -> str:
        return f"bdia-random:{named(self.gamma)}"

    @property
    def coefficients(self) -> Coefficients:
        """Those of the positive sign."""
        return Coefficients(1 - self.gamma, self.gamma, 1 + self.gamma)

    def rule(self, kind: Kind, x: Tensor) -> Rule:
        signs = random_signs(x)
        gammas = signs * self.gamma
        a = 1 - gammas if kind == "residual" else -2 * gammas
        return Rule(a, self.gamma, 1 + gammas, bits=self.kept_bits, signs=signs)

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
