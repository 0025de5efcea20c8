"""Coupling schemes, one per file, the spelling users type, and what a scheme of one's own is written with.

A scheme is a frozen dataclass below `Coupling` that has a name, its `Coefficients` and a ``merge``; `revwire.testing`
measures whether it is what it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, nan
from typing import Any

from revwire._errors import CouplingError
from revwire.couplings.base import (
    FLOAT_TOLERANCE,
    MOST_BITS,
    Coefficients,
    Coupling,
    Kind,
    Move,
    Rule,
    StateMap,
    bits_of,
    named,
    nearest_power,
    random_signs,
)
from revwire.couplings.bdia import Bdia
from revwire.couplings.bdia_random import RandomBdia
from revwire.couplings.dr2net import Dr2Net
from revwire.couplings.innovation import Innovation
from revwire.couplings.maps import Affine
from revwire.couplings.midpoint import Midpoint
from revwire.couplings.momentum import Momentum
from revwire.couplings.re2tal import Re2TAL

__all__ = [
    "BY_PATTERN",
    "DEFAULT",
    "FLOAT_TOLERANCE",
    "MOST_BITS",
    "SPELLINGS",
    "Affine",
    "Bdia",
    "Coefficients",
    "Coupling",
    "Dr2Net",
    "Innovation",
    "Kind",
    "Midpoint",
    "Momentum",
    "Move",
    "RandomBdia",
    "Re2TAL",
    "Rule",
    "StateMap",
    "bits_of",
    "coupling_from",
    "named",
    "nearest_power",
    "random_signs",
]

DEFAULT = "bdia"
"""The coupling of `convert` where none is asked for; `BY_PATTERN` has its γ."""


BY_PATTERN: dict[str, Coupling] = {"residual": Bdia(1 / 16), "post-activation": Bdia(1 / 16), "block": Bdia(1 / 64)}
"""What `DEFAULT` stands for, by the pattern of a unit: the largest γ that keeps the pretrained function in the
retention benchmarks.

A post-normalised block moves its stream far at every unit, and so needs a smaller γ than the others do.
"""


SPELLINGS: dict[str, tuple[Callable[..., Coupling], int]] = {
    "re2tal": (Re2TAL, 0),
    "bdia": (Bdia, 1),
    "bdia-random": (RandomBdia, 1),
    "momentum": (Momentum, 1),
    "dr2net": (Dr2Net, 2),
    "midpoint": (Midpoint, 2),
    "innovation": (Innovation, 1),
}
"""What a name makes, and how many numbers may follow it."""


def coupling_from(spec: str | Coupling | Mapping[str, Any]) -> Coupling:
    """The coupling a user named: a `Coupling`, or a name with its parameters.

    ``"re2tal"``, ``"bdia:1/8"`` (γ), ``"bdia-random:1/2"`` (the magnitude of γ), ``"momentum:1/4"`` (γ),
    ``"dr2net:1,1/8"`` (α, β), ``"midpoint:1/2,3/2"`` (a, h), ``"innovation:1/2"`` (ε; without
    a number, calibration chooses), or what `Coupling.to_plain` made of one.

    Raises:
        CouplingError: the name or its parameter is unknown.

    Example:
        >>> coupling_from("bdia:1/8").coefficients
        Coefficients(a=0.875, b=0.125, c=1.125)
    """
    if isinstance(spec, Coupling):
        return spec
    if isinstance(spec, Mapping):
        return Innovation.from_plain(spec)
    name, colon, parameters = str(spec).partition(":")
    make, most = SPELLINGS.get(name, (None, 0))
    values = [_number(spec, text) for text in parameters.split(",")] if colon else []
    if make is None or len(values) > most:
        expected = ", ".join(
            f"{n!r}" + (f" with {k} number{'s' if k > 1 else ''} after a colon" if k else "")
            for n, (_, k) in SPELLINGS.items()
        )
        raise CouplingError(f"coupling: got {spec!r}; expected {expected}, or a revwire.Coupling")
    return make(*values)


def _number(spec: str | Coupling, text: str) -> float:
    """A number, or a fraction of two. (`fractions.Fraction` would compute 10 to the power of what is written.)"""
    above, slash, under = text.partition("/")
    try:
        value = float(above) / float(under if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = nan
    if not isfinite(value):
        raise CouplingError(f"coupling: got {spec!r}; expected finite numbers after the colon, as in 'bdia:1/8'")
    return value
