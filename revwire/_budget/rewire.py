"""Rewire a model as the caller's options say, and give each unit what its budget allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from revwire._budget.apply import spend_less
from revwire._budget.outlook import refuse_hopeless
from revwire._capture.arguments import as_call
from revwire._errors import BudgetError, RevwireError
from revwire._forwards.converted import converted, is_converted
from revwire._forwards.install import prepared, put_on, take_all_off
from revwire._plan.options import AUTO, Options
from revwire._plan.plan import Forecast
from revwire._surroundings.interrupts import let_through, uninterrupted
from revwire._torch import disable_dynamo


@disable_dynamo
def rewire(model: nn.Module, example_inputs: Any, options: Options) -> None:
    """Convert ``model``, which is as before where that fails, or is interrupted.

    Raises:
        ConversionError: as for `revwire.convert`.
        BudgetError: no mix fits the memory budget.
    """
    how = _rewire_better if options.whole == AUTO else _rewire_as
    uninterrupted(how, model, example_inputs, options)


def _rewire_better(model: nn.Module, example_inputs: Any, options: Options) -> None:
    """Make whole hosts units, or residual adds, whichever serves the budget better."""
    coarse, fine = (replace(options, whole=wish) for wish in (None, ()))
    forecasts: dict[str, Forecast] = {}
    errors: list[RevwireError] = []
    for name, tried in (("coarse", coarse), ("fine", fine)):
        if is_converted(model):
            take_all_off(model)
        try:
            _rewire_as(model, example_inputs, tried)
        except RevwireError as error:  # the other may do
            errors.append(error)
            continue
        forecast = converted(model).plan.forecast
        if forecast is None:  # there is no chain
            return
        forecasts[name] = forecast
    if not forecasts:
        raise min(errors, key=lambda error: (error.smallest or 0) if isinstance(error, BudgetError) else -1)
    if "fine" not in forecasts or ("coarse" in forecasts and _serves_better(forecasts["coarse"], forecasts["fine"])):
        if is_converted(model):
            take_all_off(model)
        _rewire_as(model, example_inputs, coarse)


def _rewire_as(model: nn.Module, example_inputs: Any, options: Options) -> None:
    ready = prepared(model, example_inputs, options)
    refuse_hopeless(ready.plan, options.budget, ready.hints)
    let_through()
    state = put_on(model, ready, strict=options.strict)
    if state.chains and options.spends_less:
        try:
            spend_less(model, as_call(example_inputs), options, ready.hints)
        except BaseException:
            take_all_off(model)
            raise


def _serves_better(a: Forecast, b: Forecast) -> bool:
    """Whether ``a`` is clearly the better plan for the same budget: faster; or, where the least memory was asked for,
    smaller.
    """
    if a.budget is not None:
        return a.seconds < 0.98 * b.seconds
    return a.peak_bytes < 0.98 * b.peak_bytes or (a.peak_bytes <= b.peak_bytes and a.seconds < 0.98 * b.seconds)
