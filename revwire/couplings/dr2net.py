"""Dynamic reversible dual-residual networks: two coefficients that move, during training, from the pretrained network
to a reversible one.

    x_i = F_i(x_{i-1}) + α·x_{i-1} + y_{i-1},   y_i = β·x_{i-1}               (the paper's letters)
    x_{k+1} = α·x_k + β·x_{k-1} + F_k(x_k)                                    (a, b, c) = (α, β, 1)
    output  = x_K

At (α, β) = (1, 0) it is the pretrained network, which cannot be inverted; at (0, 1) it is the rewiring of Re2TAL, whose
inverse loses nothing. `revwire.CouplingSchedule` moves it from (1, small) to (0, 1). β = 2^-m is exact in fixed point
with m bits, so in exact mode a schedule moves β in powers of two, and α freely. The rule is not consistent (a + b = α +
β is not 1): it does not keep the pretrained function, however small its step.

Reference: Zhao, Liu, Mangalam, Ghanem, "Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient
Finetuning", CVPR 2024, arXiv 2401.04105.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import Coefficients, Coupling, is_number, named


@dataclass(frozen=True)
class Dr2Net(Coupling):
    """(a, b, c) = (α, β, 1); ends in the last stream.

    Args:
        alpha: α, the factor of the pretrained network's own skip.
        beta: β, the factor of the skip over one unit, 0 < β <= 1.

    Raises:
        CouplingError: β is not in (0, 1], or α is no finite number.

    Example:
        >>> Dr2Net(alpha=1, beta=1 / 8).kept_bits
        3
    """

    alpha: float = 1.0
    beta: float = 1 / 8

    backward_parameter: ClassVar[str | None] = "beta"

    def __post_init__(self) -> None:
        if not is_number(self.alpha):
            raise CouplingError(f"dr2net: got alpha = {self.alpha}; expected a finite number")
        if not is_number(self.beta) or not 0 < self.beta <= 1:
            raise CouplingError(
                f"dr2net: got beta = {self.beta}; expected 0 < beta <= 1 (at 0 nothing can be inverted)"
            )

    @property
    def name(self) -> str:
        return f"dr2net:{named(self.alpha)},{named(self.beta)}"

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(self.alpha, self.beta, 1.0)

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
