"""`convert`: rewire the residual chains of a model, in place."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from revwire._budget.rewire import rewire
from revwire._errors import NothingToRewireWarning
from revwire._forwards.converted import converted
from revwire._forwards.first_call import FirstCall
from revwire._forwards.install import refuse_converted, take_all_off
from revwire._plan.options import Anchors, Budget, Choice, Chunks, Couplings, Options, Patterns, Rewire, options_of
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
) -> M:
    """Rewire the residual chains of ``model`` into reversible ones, where that pays, in place, and return it.

    Its class, methods, parameters and ``state_dict`` keys stay as they are. Source: Re2TAL (arXiv 2211.14053) for the
    rewiring, BDIA (arXiv 2407.09093) for the default coupling.

    Args:
        model, example_inputs, coupling, exact, include, exclude, whole, anchors, tolerance, chunks, checkpoint,
            memory_budget, rewire: as for `plan`. Without ``example_inputs``, the first call of the model is the
            example.
        strict: raise if any residual add stays (other than by ``exclude``, or inside a rewired branch).

    Warns:
        NothingToRewireWarning: there is no chain, so the model stays as it was; says why.

    Raises:
        ConversionError: as for `plan`; or ``strict`` and something stays. The model is then as before.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16))
        >>> net(torch.randn(3, 7, 16)).sum().backward()
    """
    options = options_of(
        Choice.of(coupling, exact, anchors, tolerance),
        include,
        exclude,
        whole,
        strict,
        chunks,
        checkpoint,
        memory_budget,
        rewire,
    )
    refuse_converted(model)
    if example_inputs is None:
        vars(model)["forward"] = FirstCall(model, options, vars(model).get("forward"), _rewire)
        return model
    _rewire(model, example_inputs, options)
    return model


def _rewire(model: nn.Module, example_inputs: Any, options: Options) -> None:
    """Convert ``model``, and say so where that changes nothing."""
    rewire(model, example_inputs, options)
    plan = converted(model).plan
    if plan.chains or plan.checkpointed:
        return
    said = f"{plan.model}: nothing was rewired, and the model runs as before: {why_nothing(plan.skipped)}"
    try:
        warnings.warn(said, NothingToRewireWarning, stacklevel=3)
    except Warning:  # where warnings are errors, the model is as before
        take_all_off(model)
        raise
