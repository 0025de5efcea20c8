"""Rewire a model as a plan says: nothing is measured, and nothing decided."""

from __future__ import annotations

from typing import Any

from torch import nn

from revwire._forwards.install import prepared_again, put_on
from revwire._plan.plan import Plan
from revwire._surroundings.interrupts import let_through, uninterrupted
from revwire._torch import disable_dynamo


@disable_dynamo
def rewire_as_planned(model: nn.Module, example_inputs: Any, plan: Plan) -> None:
    """Convert ``model`` as a plan says; it is as before where that fails, or is interrupted.

    Raises:
        ConversionError: the plan is that of another model.
    """
    uninterrupted(_rewire, model, example_inputs, plan)


def _rewire(model: nn.Module, example_inputs: Any, plan: Plan) -> None:
    ready = prepared_again(model, example_inputs, plan)
    let_through()
    put_on(model, ready, strict=False)
