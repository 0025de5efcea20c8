"""The one table that every law draws from: coupling × arithmetic × dtype, each with its declared tolerances and their
reasons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from revwire import Bdia, Coupling, Dr2Net, Innovation, Midpoint, Momentum, Re2TAL
from revwire.couplings import StateMap

DEPTH = 8
"""Units of the chains that the tolerances are declared for."""


@dataclass(frozen=True)
class Case:
    """A coupling held in an arithmetic.

    Attributes:
        stored: relative difference to the same units with stored activations; 0 means to the bit.
        oracle: relative difference to an independent loop in plain floating point.
        reason: why these tolerances.
    """

    coupling: Coupling
    exact: bool
    dtype: torch.dtype
    stored: float
    oracle: float
    reason: str

    def __str__(self):
        return f"{self.coupling.name}-{'exact' if self.exact else 'float'}-{str(self.dtype)[6:]}"


class Bent(StateMap):
    """A map that is neither affine nor one of revwire's own, for states of any shape."""

    def __repr__(self):
        return "Bent()"  # names of tests are the same in every process

    def value(self, y):
        return torch.tanh(y) / 4


BENT = Bent()


_BIT = (
    "rebuilt states have the bits of the forward pass; the oracle sums in another order and does not round to the grid"
)
_SINGLE = "each rebuilt state is off by a rounding error of float32 (1e-7) per unit after it"
_DOUBLE = "as in float32, with a rounding error of 1e-16"

CASES = [
    Case(Re2TAL(), False, torch.float32, 2e-6, 1e-6, _SINGLE),
    Case(Re2TAL(), False, torch.float64, 1e-14, 1e-12, _DOUBLE),
    *(
        Case(coupling, True, dtype, 0.0, oracle, _BIT)
        for coupling in (Re2TAL(), Bdia(1 / 2), Bdia(1 / 4), Bdia(1 / 8), Bdia(1 / 16))
        for dtype, oracle in ((torch.float32, 1e-6), (torch.float64, 1e-12))
    ),
    *(
        Case(coupling, True, torch.float32, 0.0, 1e-6, _BIT)
        for coupling in (Momentum(1 / 8), Dr2Net(7 / 8, 1 / 8), Midpoint(1 / 2))
    ),
    *(
        Case(coupling, True, dtype, 0.0, oracle, _BIT)
        for coupling in (Innovation(1.0, BENT), Innovation(1 / 2, BENT), Innovation(-1 / 4))
        for dtype, oracle in ((torch.float32, 2e-6), (torch.float64, 1e-12))  # two steps a unit, with a rounding each
    ),
]
EXACT = [case for case in CASES if case.exact]

FAST = [c for c in CASES if c.dtype == torch.float32 and c.coupling in (Re2TAL(), Bdia(1 / 16))]
"""Float, exact without kept bits, exact with kept bits: for laws that do not depend on more."""

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_exact_case = pytest.mark.parametrize("case", EXACT, ids=str)
each_fast_case = pytest.mark.parametrize("case", FAST, ids=str)
each_fast_exact_case = pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)


def spread(*axes: Sequence[Any], one_in: int = 2) -> list[tuple[Any, ...]]:
    """One in so many combinations of values, evenly: every value of an axis meets every value of any other axis that is
    joined by a further one of at least ``one_in`` values.
    """
    numbered = product(*(enumerate(axis) for axis in axes))
    return [tuple(v for _, v in values) for values in numbered if sum(i for i, _ in values) % one_in == 0]
