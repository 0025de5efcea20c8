"""The abstract coupling: one linear two-step rule with three coefficients per unit.

    x_{k+1} = a·x_k + b·x_{k-1} + c·F_k(x_k),   x_{-1} = x_0            (step)
    x_{k-1} = (x_{k+1} − a·x_k − c·F_k(x_k)) / b                        (unstep)

Laws, measured on every scheme by the tests:

1. ``unstep(step(x_{k-1}, x_k, f), x_k, f) == x_{k-1}`` in exact arithmetic, for every f.
2. In floating point the error of law 1 grows by at most ``error_growth`` per unit.
3. In fixed point law 1 holds to the bit, at the price of ``kept_bits`` bits per element and unit.
4. ``consistent`` schemes have a + b = 1 and c = 1 + b: they integrate the same residual flow as
   the plain network, and so keep its function up to the order of the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log2
from typing import NamedTuple

from torch import Tensor

from revwire._errors import CouplingError

FLOAT_TOLERANCE = 1e-4
"""Float mode is the default only where the rebuilt input of a chain is expected within this relative error."""

_EPSILON = 2.0**-23
"""One unit in the last place of float32: the rounding error that every unit adds in float mode."""


class Coefficients(NamedTuple):
    """(a, b, c) of the recurrence; b is never zero."""

    a: float
    b: float
    c: float

    @property
    def for_block(self) -> Coefficients:
        """The same rule written for a whole block B(x) = x + F(x): F = B − x moves −c into a."""
        return Coefficients(self.a - self.c, self.b, self.c)


@dataclass(frozen=True)
class Coupling(ABC):
    """A scheme: how the two streams of a chain are coupled. Subclasses hold their parameters only."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The spelling that `convert(coupling=...)` accepts."""

    @property
    @abstractmethod
    def coefficients(self) -> Coefficients:
        """(a, b, c) of one unit."""

    @property
    @abstractmethod
    def error_growth(self) -> float:
        """1 / min|λ| over the roots of λ² = aλ + b: what one float unstep multiplies an error by."""

    @abstractmethod
    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        """The output of a chain from its two streams (x_{K-1}, x_K), both of the chain's shape."""

    @property
    def drops_skip(self) -> bool:
        """Whether a post-activation block act(x + F(x)) is rewired as x_{k-1} + act(F(x_k))."""
        return False

    @property
    def kept_bits(self) -> int:
        """Bits kept per element and unit in fixed point: m, where |b| = 2^-m.

        Raises:
            CouplingError: |b| is not 2^-m for a whole m from 0 to 7, so no fixed-point form exists.
        """
        m = -log2(abs(self.coefficients.b))
        if not m.is_integer() or not 0 <= m <= 7:
            raise CouplingError(
                f"coupling {self.name!r}: got b = {self.coefficients.b}; exact arithmetic needs |b| = 2^-m with m = 0..7; "
                "choose such a coefficient, or pass exact=False"
            )
        return int(m)

    def float_error(self, units: int) -> float:
        """Expected relative error of the rebuilt input of a chain of ``units`` units in float32."""
        return float(sum(_EPSILON * self.error_growth**k for k in range(1, units + 1)))

    def exact_by_default(self, units: int) -> bool:
        """Whether fixed-point streams are the default: wherever the scheme has an exact form.

        Float inversion of ``re2tal`` loses about 1e-7 as long as branches compute in float32; in bfloat16 (autocast) a
        last-bit difference of the rebuilt input flips roundings in the branch, and the loss passes `FLOAT_TOLERANCE`.
        That is not known at conversion, and exactness costs ``re2tal`` no bits.
        """
        try:
            return self.kept_bits >= 0
        except CouplingError:
            return self.float_error(units) > FLOAT_TOLERANCE

    def step(self, previous: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """x_{k+1} from (x_{k-1}, x_k, F_k(x_k)), all of one shape, in ordinary differentiable arithmetic."""
        a, b, c = self.coefficients
        return a * current + b * previous + c * branch

    def unstep(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """x_{k-1} from (x_{k+1}, x_k, F_k(x_k)): the inverse of `step`."""
        a, b, c = self.coefficients
        return (following - a * current - c * branch) / b
