"""The midpoint family: a step of size h that begins between the last two states.

    p_{k+1} = a·p_{k-1} + (1−a)·p_k + h·F_k(p_k)                              (a, b, c) = (1−a, a, h)
    output  = p_K

a = 1, h = 2 is the leapfrog (explicit midpoint) rule. The rule is consistent where h = 1 + a, and then it is `bdia`
with γ = a, for any a; other h scale the branches. a = 2^-m is exact in fixed point with m bits.

Reference: Gal, Eliasof, Treister, Haber, "Reversing Large Language Models for Efficient Training and Fine-Tuning",
arXiv 2512.02056.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import Coefficients, Coupling, is_number, named


@dataclass(frozen=True)
class Midpoint(Coupling):
    """(a, b, c) = (1−a, a, h); ends in the last stream.

    Args:
        a: the weight of the state before the last, 0 < a <= 1.
        h: the step size; None for 1 + a, which keeps the pretrained function best.

    Raises:
        CouplingError: a is not in (0, 1], or h is no finite number.

    Example:
        >>> Midpoint(a=1 / 2).coefficients
        Coefficients(a=0.5, b=0.5, c=1.5)
    """

    a: float = 1 / 8
    h: float | None = None

    backward_parameter: ClassVar[str | None] = "a"

    def __post_init__(self) -> None:
        if not is_number(self.a) or not 0 < self.a <= 1:
            raise CouplingError(f"midpoint: got a = {self.a}; expected 0 < a <= 1 (at 0 nothing can be inverted)")
        if self.h is not None and not is_number(self.h):
            raise CouplingError(f"midpoint: got h = {self.h}; expected a finite number, or None for 1 + a")
        if self.h is None:
            object.__setattr__(self, "h", 1 + self.a)

    @property
    def name(self) -> str:
        assert self.h is not None
        return f"midpoint:{named(self.a)},{named(self.h)}"

    @property
    def coefficients(self) -> Coefficients:
        assert self.h is not None
        return Coefficients(1 - self.a, self.a, self.h)

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
