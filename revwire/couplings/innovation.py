"""Innovation: two streams, of which one adds up the branches, and the other is where they are evaluated.

    y_{k+1} = y_k + F_k(z_k)                                            y_0 = z_0 = x
    z_{k+1} = y_{k+1} + ε·(z_k − q_{k+1}(y_{k+1})),  q(y) = y − p(y)     ε = ±2^-m
    output  = y_K

q(y) predicts z_k from y_{k+1}: the branch sees y plus ε times what a predictor of the point before misses, its
*innovation*. p is affine, of low rank, over the channels, and fitted by ridge regression on examples, unit by unit, in
the rewired network (`revwire.calibrate`). Where it predicts well, ε may be 1/2 or 1: m = 1 bit per element and unit is
kept, or none. Without a predictor, ε = −γ is `Bdia` in other variables, and ε = γ is `Momentum`.

The rule is the project's own; it has been published nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import (
    KEEPING,
    MOST_BITS,
    Coefficients,
    Coupling,
    Move,
    StateMap,
    bits_of,
    is_number,
    named,
    nearest_power,
)
from revwire.couplings.maps import Affine

UNCALIBRATED = -1 / 16
"""ε where none was given, and no example has chosen it: `Bdia` with γ = 1/16."""


@dataclass(frozen=True)
class Innovation(Coupling):
    """(a, b, c) = (0, 1, 1), and a step between two units; ends in the last y.

    Args:
        epsilon: ε, a power of two from 1/128 to 1, or one times −1: m = 7 .. 0 bits per element and unit. A positive ε
            is the safe one; a negative one may serve pre-normalised blocks better. None: calibration chooses, unit by
            unit.
        map: p, as `revwire.calibrate` has fitted it; None: none.
        chosen: ε, as it has chosen it.

    Raises:
        CouplingError: ε is none of these.

    Example:
        >>> Innovation(epsilon=1 / 2).kept_bits
        1
    """

    epsilon: float | None = None
    map: StateMap | None = None
    chosen: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and (not is_number(self.epsilon) or bits_of(self.epsilon) is None):
            raise CouplingError(
                f"innovation: got epsilon = {self.epsilon}; expected a power of two from 1/{2**MOST_BITS} to 1, or one "
                "times -1"
            )

    @property
    def name(self) -> str:
        known = self.chosen is not None or self.epsilon is not None
        return f"innovation:{named(self._epsilon)}" if known else "innovation"

    @property
    def coefficients(self) -> Coefficients:
        """Those of the unit's own step, y + F(z)."""
        return Coefficients(0.0, 1.0, 1.0)

    @cached_property
    def move(self) -> Move:
        return Move.innovation(self._epsilon, self.map)

    @property
    def _epsilon(self) -> float:
        return next(e for e in (self.chosen, self.epsilon, UNCALIBRATED) if e is not None)

    @property
    def kept_bits(self) -> int:
        m = bits_of(self._epsilon)
        assert m is not None
        return m

    @property
    def error_growth(self) -> float:
        return 1 / abs(self._epsilon)

    @property
    def keeps_function(self) -> bool:
        return abs(self._epsilon) <= KEEPING or self.map is not None

    def between(self, other: Coupling, share: float, *, exact: bool) -> Innovation:
        """Magnitudes go from this ε to the other, in powers of two, with the other's sign; what was fitted stays."""
        if not isinstance(other, Innovation):
            return super().between(other, share, exact=exact)  # raises
        start, end = self._epsilon, other._epsilon
        wanted = abs(start) + share * (abs(end) - abs(start))
        return replace(self, epsilon=nearest_power(wanted) if end > 0 else -nearest_power(wanted), chosen=None)

    def to_plain(self) -> Any:
        if self == self.bare:
            return self.name
        return {
            "name": self.name,
            "epsilon": self.epsilon,
            "chosen": self.chosen,
            "map": None if self.map is None else self.map.to_plain(),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Innovation:
        """What `to_plain` gave.

        Raises:
            CouplingError: it is something else.
        """
        if data.keys() != {"name", "epsilon", "chosen", "map"}:
            raise CouplingError(f"innovation: got data with {sorted(data)}; expected what a plan has saved of it")
        return cls(data["epsilon"], None if data["map"] is None else Affine.from_plain(data["map"]), data["chosen"])

    @property
    def bare(self) -> Innovation:
        return replace(self, map=None, chosen=None)

    def in_place_of(self, old: Coupling) -> Innovation:
        if not isinstance(old, Innovation) or self.map is not None:
            return self
        return replace(self, map=old.map, chosen=old.chosen if self.epsilon is None else None)

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current
