"""`plan`, `convert`, `report`, `revert`, `stored_activations`: the public doors, which add context to errors once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from torch._compile import _disable_dynamo

from revwire._budget.apply import _spend_less
from revwire._budget.fit import serves_better
from revwire._capture.arguments import as_call
from revwire._capture.run import fullest_recording
from revwire._errors import BudgetError, ConversionError, RevwireError
from revwire._forwards.base import InstanceForward, standing_forward, take_off
from revwire._forwards.checkpointed import install_checkpoint
from revwire._forwards.converted import _STATE, Converted, Parted, _switch, converted, report
from revwire._forwards.first_call import FirstCall
from revwire._forwards.in_parts import install_parts
from revwire._forwards.leaf import unmake_leaf
from revwire._forwards.live import install_live
from revwire._forwards.rewired import install
from revwire._plan.options import AUTO, Anchors, Budget, Choice, Chunks, Couplings, Options, Patterns, _options
from revwire._plan.plan import Forecast, Plan
from revwire._plan.ready import refuse_unready
from revwire._plan.survey import Planner, Prepared
from revwire.couplings import DEFAULT
from revwire.couplings.base import FLOAT_TOLERANCE

M = TypeVar("M", bound=nn.Module)


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
) -> Plan:
    """What `convert` would do, without doing it.

    Args:
        model: any module; it is run once on ``example_inputs`` and left as found.
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
            run by heads, or queries. None: whole units, or under a memory budget, as few as fit it.
        checkpoint: globs over the qualified names of modules outside of chains that run under activation checkpointing,
            the outermost that match; ``"stays"``: the blocks whose residual adds stay, such as those that change shape.
            Their batch statistics count once. None: none, or under a memory budget, those that stay if it is better so;
            ``[]``: none in any case.
        memory_budget: bytes that a step (forward and backward on the example) may take above rest, where rest holds
            weights, ``.grad`` and inputs: an int, ``"6GiB"``, ``"512MB"``, or ``"least"`` for the fastest mix that
            needs least. A few steps are measured, with the mean square of the outputs as loss, in the mode that the
            model is in; then each unit is stored, checkpointed (with or without what its products gave) or reversible,
            so that the step is fastest within the budget. ``plan.forecast`` has the prediction. None: every unit is
            reversible.

    Returns:
        The plan: chains, units, and each residual add that stays, with its reason.

    Raises:
        ConversionError: the model is converted already, or fails on the example.
        CouplingError: no such coupling, or no such arithmetic for it.
        BudgetError: no mix fits the memory budget; names the smallest that one does.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> [unit.path for unit in revwire.plan(net, torch.randn(1, 4, 16)).chains[0].units][:2]
        ['layers.0.self_attn', 'layers.0.linear1']
    """
    options = _options(
        Choice.of(coupling, exact, anchors, tolerance),
        include,
        exclude,
        whole,
        chunks=chunks,
        checkpoint=checkpoint,
        budget=memory_budget,
    )
    if memory_budget is None and chunks in (None, 1):  # nothing has to run
        return _prepare(model, example_inputs, options).plan
    _refuse_converted(model)
    _rewire(model, example_inputs, options)
    found = report(model)
    revert(model)
    return found


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
) -> M:
    """Rewire the residual chains of ``model`` into reversible ones, in place, and return it.

    Its class, methods, parameters and ``state_dict`` keys stay as they are. Source: Re2TAL (arXiv 2211.14053) for the
    rewiring, BDIA (arXiv 2407.09093) for the default coupling.

    Args:
        model, example_inputs, coupling, exact, include, exclude, whole, anchors, tolerance, chunks, checkpoint,
            memory_budget: as for `plan`. Without ``example_inputs``, the first call of the model is the example.
        strict: raise if any residual add stays (other than by ``exclude``, or inside a rewired branch).

    Raises:
        ConversionError: as for `plan`; or ``strict`` and something stays. The model is then as before.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16))
        >>> net(torch.randn(3, 7, 16)).sum().backward()
    """
    options = _options(
        Choice.of(coupling, exact, anchors, tolerance),
        include,
        exclude,
        whole,
        strict,
        chunks,
        checkpoint,
        memory_budget,
    )
    _refuse_converted(model)
    if example_inputs is None:
        vars(model)["forward"] = FirstCall(model, options, vars(model).get("forward"), _rewire)
        return model
    _rewire(model, example_inputs, options)
    return model


@_disable_dynamo
def _rewire(model: nn.Module, example_inputs: Any, options: Options) -> None:
    if options.whole == AUTO:
        _rewire_better(model, example_inputs, options)
    else:
        _rewire_as(model, example_inputs, options)


def _rewire_better(model: nn.Module, example_inputs: Any, options: Options) -> None:
    """Cut the chains into residual adds, or into whole hosts, whichever serves the budget better."""
    coarse, fine = (replace(options, whole=wish) for wish in (None, ()))
    forecasts: dict[str, Forecast] = {}
    errors: list[RevwireError] = []
    for name, cut in (("coarse", coarse), ("fine", fine)):
        if _STATE in vars(model):
            revert(model)
        try:
            _rewire_as(model, example_inputs, cut)
        except RevwireError as error:  # the other may do
            errors.append(error)
            continue
        forecast = report(model).forecast
        if forecast is None:  # there is no chain
            return
        forecasts[name] = forecast
    if not forecasts:
        raise min(errors, key=lambda error: (error.smallest or 0) if isinstance(error, BudgetError) else -1)
    if "fine" not in forecasts or ("coarse" in forecasts and serves_better(forecasts["coarse"], forecasts["fine"])):
        if _STATE in vars(model):
            revert(model)
        _rewire_as(model, example_inputs, coarse)


def _rewire_as(model: nn.Module, example_inputs: Any, options: Options) -> None:
    found, chains, hosts, layouts, cores, known = _prepare(model, example_inputs, options)
    if options.strict:
        _refuse_skipped(found)
    for path, slots in hosts.items():
        if path in layouts:
            install_live(model.get_submodule(path), path, slots, layouts[path])
        else:
            install(model.get_submodule(path), path, slots)
    checkpointed = [install_checkpoint(model.get_submodule(path), path) for path in found.checkpointed]
    parted = [
        Parted(
            install_parts(model.get_submodule(path), path, chains[core.chain], core.sizes, known),
            core.chain,
            core.place,
        )
        for path, core in cores.items()
    ]
    vars(model)[_STATE] = Converted(found, chains, checkpointed, parted)
    if chains and (options.chunks not in (None, 1) or options.budget is not None):
        try:
            _spend_less(model, as_call(example_inputs), options)
        except BaseException:
            revert(model)
            raise


def revert(model: M) -> M:
    """Give ``model`` its original wiring back, in place, with its weights as they are now, and return it.

    Raises:
        ConversionError: it is not converted.
    """
    if isinstance(vars(model).get("forward"), FirstCall):
        vars(model)["forward"].remove()
        return model
    converted(model)
    for module in model.modules():
        if isinstance(standing_forward(module), InstanceForward):
            take_off(module)
        unmake_leaf(module)
    del vars(model)[_STATE]
    return model


@contextmanager
def stored_activations(model: nn.Module) -> Iterator[None]:
    """Within this context the converted model computes the same function with ordinary autograd, which stores
    activations.

    For checking: outputs and gradients are those of the reversible run, in exact mode to the bit.

    Raises:
        ConversionError: ``model`` is not converted.
    """
    state = converted(model)
    before = [chain.stored for chain in state.chains]
    on = [forward for forward in state.checkpointed if forward.on]
    try:
        for chain in state.chains:
            chain.stored = True
        _switch(on, on=False)
        yield
    finally:
        for chain, stored in zip(state.chains, before, strict=True):
            chain.stored = stored
        _switch(on, on=True)


def _refuse_converted(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert: got {name}; expected a torch.nn.Module")
    refuse_unready(model)
    taken = [n for n, m in model.named_modules() if isinstance(standing_forward(m), (FirstCall, InstanceForward))]
    if taken:
        raise ConversionError(
            f"{name}: got a model that is converted already (at {taken[0] or 'its root'!r}); call "
            "revwire.revert(model) first"
        )


def _refuse_skipped(found: Plan) -> None:
    left = [s for s in found.skipped if not s.inside_unit and not s.reason.startswith("excluded")]
    if left or not found.chains:
        what = "; ".join(f"{s.path}: {s.reason}" for s in left[:5]) or "no chain of residual units was found"
        raise ConversionError(
            f"{found.model}: strict=True, and {len(left)} residual adds would stay: {what}; exclude them, or pass "
            "strict=False"
        )


def _prepare(model: nn.Module, example_inputs: Any, options: Options) -> Prepared:
    _refuse_converted(model)
    call = as_call(example_inputs)
    try:
        recording = fullest_recording(model, call.args, call.kwargs)
    except RevwireError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__}: the model failed on the example inputs ({type(error).__name__}: {error}); pass "
            "what its forward "
            "takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from error
    return Planner(recording, options).run()
