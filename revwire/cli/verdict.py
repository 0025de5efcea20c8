"""Whether what `verify` measured is what the conversion promised."""

from __future__ import annotations

from torch import nn

from revwire._api.report import report
from revwire._api.verify import Check

FLOAT_TOLERANCE = 1e-3
"""Relative error at which float streams still pass: states within 1e-4 by the library's own limit, gradients ten times
that.
"""


def holds(model: nn.Module, check: Check) -> bool:
    """Exact chains must be exact to the bit; where a chain is in floating point, small errors pass."""
    if all(chain.exact for chain in report(model).chains):
        return check.bit_exact
    return max(check.reconstruction_error, check.gradient_error) <= FLOAT_TOLERANCE
