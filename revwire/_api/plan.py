"""`plan`: what `convert` would do to a model, without doing it."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import nn

from revwire._budget.rewire import rewire as convert_as
from revwire._capture.twin import twin_of
from revwire._errors import ConversionError
from revwire._forwards.converted import converted
from revwire._forwards.install import prepared, refuse_converted
from revwire._plan.options import (
    AUTO,
    Anchors,
    Budget,
    Choice,
    Chunks,
    Couplings,
    Options,
    Patterns,
    Rewire,
    options_of,
)
from revwire._plan.plan import Plan
from revwire.couplings import DEFAULT
from revwire.couplings.base import FLOAT_TOLERANCE


def plan(
    model: nn.Module,
    example_inputs: Any,
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
    memory_budget: Budget = None,
    rewire: Rewire = None,
) -> Plan:
    """What `convert` would do, without doing it.

    Args:
        model: any module; it is run once on ``example_inputs`` and left as found. It is never converted: where steps
            have to be measured, a twin is, with modules and buffers of its own and the same weights.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Anything else (a
            list, say) is passed as the one argument.
        coupling: ``"bdia"`` (γ = 1/16, and 1/64 for post-normalised blocks), ``"bdia:1/8"``, ``"re2tal"``, another
            name, or a `Coupling`; or a dict from globs over the names of units and hosts to couplings, where the first
            match counts, and what matches none has the default.
        exact: fixed-point streams (True), float streams (False), or what the coupling needs (None).
        include, exclude: globs over the qualified names of units and of their hosts, such as ``"blocks.1*"``.
        whole: globs over the qualified names of modules that are to be one unit each, whatever residual adds they hold:
            the outermost that matches and can be. Fewer units keep fewer bits, and each holds more when it is rebuilt.
            The function is another one, as the couplings stand elsewhere. ``"auto"``, with a memory budget: each
            residual add a unit, or each host, whichever serves it better.
        anchors: keep the true state every so many units of a chain, from which rebuilding then goes on; ``"auto"``: as
            often as the measured drift of float streams needs to stay within ``tolerance``.
        tolerance: largest relative error of a rebuilt state in float streams; more is refused here, and an error in
            backward.
        chunks: run each unit in so many chunks of the batch, or of tokens or windows where its branch treats each by
            itself: a backward pass then holds the activations of one chunk at a time. An int, or a dict from globs over
            the names of units and hosts to ints. Windows that cannot run together are a chunk each. What may be cut is
            found on the example, with the model in eval mode and once in train mode; other units run whole, but for
            products of activations in their branches that are larger than what goes in (the maps of attention): those
            run by heads, queries, or windows. None: whole units, or under a memory budget, as few as fit it.
        checkpoint: globs over the qualified names of modules outside of chains that run under activation checkpointing,
            the outermost that match; ``"stays"``: the blocks whose residual adds stay, such as those that change shape.
            Their batch statistics count once. None: as ``rewire`` decides, or under a memory budget, those that stay if
            it is better so; ``[]``: none in any case.
        memory_budget: bytes that a step (forward and backward on the example) may take above rest, where rest holds
            weights, ``.grad`` and inputs: an int, ``"6GiB"``, ``"512MiB"``, or ``"least"`` for the fastest mix that
            needs least. A few steps are measured, with the mean square of the outputs as loss, in the mode that the
            model is in; then each unit is stored, checkpointed (with or without what its products gave) or reversible,
            so that the step is fastest within the budget. ``plan.forecast`` has the prediction. None: ``rewire``
            decides.
        rewire: ``"leanest"``: of all layouts that cost one more forward at most, the one whose step needs least on the
            example, found on paper: for each chain reversible units, checkpointed blocks or stored ones, and for each
            module outside of chains whether it is checkpointed. A chain that does not pay stays what it was.
            ``"everywhere"``: every chain. None: the leanest, unless other options say which units are wanted
            (``include``, ``whole``, ``anchors``, ``chunks``, ``memory_budget``, ``strict``) or mean a network of their
            own (``coupling="re2tal"``): then everywhere.

    Returns:
        The plan: chains, units, each residual add that stays, with its reason, and the peaks of a step.

    Raises:
        ConversionError: the model is converted already, or fails on the example; or a twin of it is another model.
        CouplingError: no such coupling, or no such arithmetic for it.
        BudgetError: no mix fits the memory budget; names the smallest that one does.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> [unit.path for unit in revwire.plan(net, torch.randn(1, 4, 16)).chains[0].units][:2]
        ['layers.0.self_attn', 'layers.0.linear1']
    """
    options = options_of(
        Choice.of(coupling, exact, anchors, tolerance),
        include,
        exclude,
        whole,
        chunks=chunks,
        checkpoint=checkpoint,
        budget=memory_budget,
        rewire=rewire,
    )
    if memory_budget is None and chunks in (None, 1):  # nothing has to run
        return prepared(model, example_inputs, options).plan
    refuse_converted(model)
    twin = twin_of(model)
    bare = replace(options, whole=() if options.whole == AUTO else options.whole, chunks=1, budget=None)
    _refuse_other(model, twin, example_inputs, bare)
    convert_as(twin, example_inputs, options)
    return converted(twin).plan


def _refuse_other(model: nn.Module, twin: nn.Module, example_inputs: Any, options: Options) -> None:
    """Raise where a twin is another model; see Note [A twin] in `twin`."""
    plans = [prepared(m, example_inputs, options).plan for m in (model, twin)]
    mine, other = ([*((u.path, u.host) for u in p.units), *((s.path, s.reason) for s in p.skipped)] for p in plans)
    first = next((pair for pair in zip_longest(mine, other) if pair[0] != pair[1]), None)
    if first is not None:
        there, here = ("nothing" if one is None else one[0] for one in first)
        raise ConversionError(
            f"{type(model).__name__}: steps are measured on a copy of its modules, which got {here} for {there}; "
            "expected modules that reach each other by attributes, not by closures; call revwire.convert(model, "
            "example_inputs, ...), which measures the model itself, and then revwire.report(model)"
        )
