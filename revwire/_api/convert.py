"""`convert`: rewire the residual chains of a model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from revwire._api.calibrate import calibrate as fit
from revwire._budget.rewire import rewire as convert_as
from revwire._errors import ConversionError, NothingToRewireWarning
from revwire._forwards.converted import converted
from revwire._forwards.first_call import FirstCall
from revwire._forwards.install import refuse_converted, take_all_off
from revwire._forwards.planned import rewire_as_planned
from revwire._plan.options import Anchors, Budget, Choice, Chunks, Couplings, Patterns, Rewire, options_of
from revwire._plan.plan import Plan
from revwire._plan.stays import why_nothing
from revwire.couplings import DEFAULT
from revwire.couplings.base import FLOAT_TOLERANCE

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    example_inputs: Any = None,
    *,
    coupling: Couplings = DEFAULT,
    exact: bool | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    whole: Patterns = None,
    anchors: Anchors = None,
    tolerance: float = FLOAT_TOLERANCE,
    chunks: Chunks | None = None,
    checkpoint: Patterns = None,
    strict: bool = False,
    memory_budget: Budget = None,
    rewire: Rewire = None,
    plan: Plan | None = None,
    calibrate: Iterable[Any] | None = None,
) -> M:
    """Rewire the residual chains of ``model`` into reversible ones, where that pays, in place, and return it.

    Its class, methods, parameters and ``state_dict`` keys stay as they are. Source: Re2TAL (arXiv 2211.14053) for the
    rewiring, BDIA (arXiv 2407.09093) for the default coupling.

    Args:
        model, example_inputs, coupling, exact, include, exclude, whole, anchors, tolerance, chunks, checkpoint,
            memory_budget, rewire: as for `plan`. Without ``example_inputs``, the first call of the model is the
            example.
        strict: raise if any residual add stays (other than by ``exclude``, or inside a rewired branch).
        plan: do what this plan says, and measure nothing: one that `plan` made of the same network, `Plan.load` has
            read, or `report` gives. Whatever shapes the example has, the layout is that of the plan, in every process.
            All other options are then the plan's.
        calibrate: examples of real data for couplings that predict (``"innovation"``), each as ``example_inputs``; the
            example alone where that is None. ``()``: none, until `revwire.calibrate` is called.

    Warns:
        NothingToRewireWarning: there is no chain, so the model stays as it was; says why.

    Raises:
        ConversionError: as for `plan`; or ``strict`` and something stays; or the plan is that of another model, or was
            given together with other options. The model is then as before.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16))
        >>> net(torch.randn(3, 7, 16)).sum().backward()
    """
    if plan is not None:
        arithmetic = {"coupling": coupling, "exact": exact, "anchors": anchors, "tolerance": tolerance}
        where = {"include": include, "exclude": exclude, "whole": whole, "strict": strict, "rewire": rewire}
        memory = {"chunks": chunks, "checkpoint": checkpoint, "memory_budget": memory_budget}
        _refuse_both(plan, {**arithmetic, **where, **memory})
        how: Callable[..., None] = partial(rewire_as_planned, plan=plan)
    else:
        choice = Choice.of(coupling, exact, anchors, tolerance)
        options = options_of(choice, include, exclude, whole, strict, chunks, checkpoint, memory_budget, rewire)
        how = partial(convert_as, options=options)
    refuse_converted(model)
    rewired = partial(_rewire, how=how, examples=calibrate)
    if example_inputs is None:
        vars(model)["forward"] = FirstCall(model, vars(model).get("forward"), rewired)
        return model
    rewired(model, example_inputs)
    return model


def _refuse_both(plan: Any, others: Mapping[str, Any]) -> None:
    """Raise where a plan is none, or comes with other options than their defaults."""
    if not isinstance(plan, Plan):
        raise ConversionError(
            f"plan: got {type(plan).__name__}; expected a revwire.Plan, as revwire.plan(model, example_inputs) makes "
            "it, or Plan.load(path) reads it"
        )
    for name, value in others.items():
        if value != signature(convert).parameters[name].default:
            raise ConversionError(
                f"convert: got both plan= and {name}={value!r}; expected one of them, as a plan holds all choices; "
                f"leave {name}= out, or make the plan with it"
            )


def _rewire(model: nn.Module, example_inputs: Any, *, how: Callable[..., None], examples: Iterable[Any] | None) -> None:
    """Convert ``model``, calibrate it, and say so where that changes nothing."""
    how(model, example_inputs)
    plan = converted(model).plan
    waits = any(c == c.bare and c.move is not None for chain in converted(model).chains for c in chain.couplings)
    none = isinstance(examples, tuple) and not examples
    if plan.chains and not none and (waits or examples is not None):
        try:
            fit(model, [example_inputs] if examples is None else examples)
        except BaseException:
            take_all_off(model)
            raise
    if plan.chains or plan.checkpointed:
        return
    said = f"{plan.model}: nothing was rewired, and the model runs as before: {why_nothing(plan.skipped)}"
    try:
        warnings.warn(said, NothingToRewireWarning, stacklevel=3)
    except Warning:  # where warnings are errors, the model is as before
        take_all_off(model)
        raise
