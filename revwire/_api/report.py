"""`report`: the plan by which a model was converted."""

from __future__ import annotations

from torch import nn

from revwire._forwards.converted import converted
from revwire._plan.plan import Plan


def report(model: nn.Module) -> Plan:
    """The plan by which ``model`` was converted.

    Raises:
        ConversionError: it is not converted, or has not been called since ``convert(model)`` without an example.
    """
    return converted(model).plan
