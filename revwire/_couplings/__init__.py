"""Coupling schemes, one per file, and the spelling users type."""

from __future__ import annotations

from fractions import Fraction

from revwire._couplings.base import Coefficients as Coefficients
from revwire._couplings.base import Coupling as Coupling
from revwire._couplings.bdia import Bdia as Bdia
from revwire._couplings.re2tal import Re2TAL as Re2TAL
from revwire._errors import CouplingError

DEFAULT = "bdia"


def coupling_from(spec: str | Coupling) -> Coupling:
    """The coupling a user named: a `Coupling`, ``"re2tal"``, ``"bdia"`` or ``"bdia:1/8"`` (γ after the colon).

    Raises:
        CouplingError: the name or its parameter is unknown.

    Example:
        >>> coupling_from("bdia:1/8").coefficients
        Coefficients(a=0.875, b=0.125, c=1.125)
    """
    if isinstance(spec, Coupling):
        return spec
    name, _, parameter = str(spec).partition(":")
    if name == "re2tal" and not parameter:
        return Re2TAL()
    if name == "bdia":
        return Bdia(_gamma(spec, parameter)) if parameter else Bdia()
    raise CouplingError(f"coupling: got {spec!r}; expected 're2tal', 'bdia', 'bdia:1/2' .. 'bdia:1/16', or a revwire.Coupling")


def _gamma(spec: str, text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise CouplingError(f"coupling: got {spec!r}; expected a number after the colon, as in 'bdia:1/8'") from None
