"""`plan`, `convert`, `report`, `revert`, `stored_activations`: the public doors, which add context to errors once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revwire._budget import Budget, Cutting, Picks, fit, parse_budget, serves_better
from revwire._checkpointed import CheckpointedForward, install_checkpoint
from revwire._choice import Anchors, Choice, Couplings, refuse_idle_globs
from revwire._chunks import Chunks, Prober, probed, refuse_no_chunks, wanted
from revwire._couplings import DEFAULT
from revwire._couplings.base import FLOAT_TOLERANCE
from revwire._errors import BudgetError, ConversionError, RevwireError
from revwire._forwards import InstanceForward, standing_forward, take_off
from revwire._fresh import fresh_arguments
from revwire._meter import ended, turn
from revwire._module import Chain
from revwire._parted import PartedForward, install_parts
from revwire._plan import Forecast, Plan, PlannedChain
from revwire._prepare import AUTO, Options, Planner, Prepared, chunks_of, with_costs
from revwire._recording import tensors_in
from revwire._replay import accelerators_of, random_states, set_random_states
from revwire._rewrite import install
from revwire._step import autocast_left, device_of, left_as_found, mean_square, own_leaves, run_model
from revwire._trace import left_alone, record
from revwire._unready import refuse_unready
from revwire._watch import python_random_kept, python_random_state, set_python_random_state

M = TypeVar("M", bound=nn.Module)
Patterns = str | Sequence[str] | None
_STATE = "_revwire"


@dataclass
class Converted:
    """What a converted model remembers."""

    plan: Plan
    chains: list[Chain]
    checkpointed: list[CheckpointedForward] = field(default_factory=list)
    parted: list[Parted] = field(default_factory=list)


@dataclass
class Parted:
    """A module whose core may run in parts, and the unit in whose branch it is: its chain, and its place in it."""

    forward: PartedForward
    chain: int
    place: int


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
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Anything else (a list,
            say) is passed as the one argument.
        coupling: ``"bdia"`` (γ = 1/16, and 1/64 for post-normalised blocks), ``"bdia:1/8"``, ``"re2tal"``, another name, or a
            `Coupling`; or a dict from globs over the names of units and hosts to couplings, where the first match counts, and
            what matches none has the default.
        exact: fixed-point streams (True), float streams (False), or what the coupling needs (None).
        include, exclude: globs over the qualified names of units and of their hosts, such as ``"blocks.1*"``.
        whole: globs over the qualified names of modules that are to be one unit each, whatever residual adds they hold: the outermost that
            matches and can be. Fewer units keep fewer bits, and each holds more when it is rebuilt. The function is another one, as the
            couplings stand elsewhere. ``"auto"``, with a memory budget: each residual add a unit, or each host, whichever serves it better.
        anchors: keep the true state every so many units of a chain, from which rebuilding then goes on; ``"auto"``: as often as
            the measured drift of float streams needs to stay within ``tolerance``.
        tolerance: largest relative error of a rebuilt state in float streams; more is refused here, and an error in backward.
        chunks: run each unit in so many chunks of the batch, or of tokens or windows where its branch treats each by itself: a backward
            pass then holds the activations of one chunk at a time. An int, or a dict from globs over the names of units and hosts to ints.
            Windows that cannot run together are a chunk each. What may be cut is found on the example, with the model in eval mode and
            once in train mode; other units run whole, but for products of activations in their branches that are larger than what goes
            in (the maps of attention): those run by heads, or queries. None: whole units, or under a memory budget, as few as fit it.
        checkpoint: globs over the qualified names of modules outside of chains that run under activation checkpointing, the outermost that
            match; ``"stays"``: the blocks whose residual adds stay, such as those that change shape. Their batch statistics count once.
            None: none, or under a memory budget, those that stay if it is better so; ``[]``: none in any case.
        memory_budget: bytes that a step (forward and backward on the example) may take above rest, where rest holds weights, ``.grad`` and
            inputs: an int, ``"6GiB"``, ``"512MB"``, or ``"least"`` for the fastest mix that needs least. A few steps are measured, with
            the mean square of the outputs as loss, in the mode that the model is in; then each unit is stored, checkpointed (with or
            without what its products gave) or reversible, so that the step is fastest within the budget. ``plan.forecast`` has the
            prediction. None: every unit is reversible.

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
        Choice.of(coupling, exact, anchors, tolerance), include, exclude, whole, chunks=chunks, checkpoint=checkpoint, budget=memory_budget
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
        model, example_inputs, coupling, exact, include, exclude, whole, anchors, tolerance, chunks, checkpoint, memory_budget: as for
            `plan`. Without ``example_inputs``, the first call of the model is the example.
        strict: raise if any residual add stays (other than by ``exclude``, or inside a rewired branch).

    Raises:
        ConversionError: as for `plan`; or ``strict`` and something stays. The model is then as before.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16))
        >>> net(torch.randn(3, 7, 16)).sum().backward()
    """
    options = _options(Choice.of(coupling, exact, anchors, tolerance), include, exclude, whole, strict, chunks, checkpoint, memory_budget)
    _refuse_converted(model)
    if example_inputs is None:
        vars(model)["forward"] = FirstCall(model, options, vars(model).get("forward"))
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
    found, chains, hosts, cores, known = _prepare(model, example_inputs, options)
    if options.strict:
        _refuse_skipped(found)
    for path, slots in hosts.items():
        install(model.get_submodule(path), path, slots)
    checkpointed = [install_checkpoint(model.get_submodule(path), path) for path in found.checkpointed]
    parted = [
        Parted(install_parts(model.get_submodule(path), path, chains[core.chain], core.sizes, known), core.chain, core.place)
        for path, core in cores.items()
    ]
    vars(model)[_STATE] = Converted(found, chains, checkpointed, parted)
    if chains and (options.chunks not in (None, 1) or options.budget is not None):
        try:
            _spend_less(model, as_call(example_inputs), options)
        except BaseException:
            revert(model)
            raise


def _spend_less(model: nn.Module, call: _Call, options: Options) -> None:
    """Cut the units of a converted model into chunks, and give each its mode, as the caller or the planner wants it."""
    state = converted(model)
    if options.budget is None:
        next(iter(_Ways(model, state, call, options.chunks))).apply()
        found = state.plan
    else:
        wanted = options.checkpoint is None and bool(state.checkpointed)  # the planner's to decide
        _switch(state.checkpointed, on=not wanted)
        found = _fitted(model, state, call, options.budget, _Ways(model, state, call, options.chunks, choose=wanted))
    for forward in [f for f in state.checkpointed if not f.on]:
        take_off(forward.module)
        state.checkpointed.remove(forward)
    for one in [p for p in state.parted if p.forward.count == 1]:
        take_off(one.forward.module)
        state.parted.remove(one)
    names = tuple(forward.path for forward in state.checkpointed)
    planned = map(with_costs, found.chains, state.chains)
    chains = tuple(_with_parts(chain, number, state.parted) for number, chain in enumerate(planned))
    state.plan = replace(found, chains=chains, checkpointed=names)


def _switch(checkpointed: Iterable[CheckpointedForward], *, on: bool) -> None:
    for forward in checkpointed:
        forward.on = on


class _Ways:
    """Ways to cut the units, the coarsest first: the one that the caller wants, or those among which a budget may choose.

    Whether what lies outside of chains is checkpointed is another choice, where there is one to ``choose``.
    How units may be cut is looked at when a way is asked for that cuts some: that takes several runs of each.
    """

    def __init__(self, model: nn.Module, state: Converted, call: _Call, chunks: Chunks | None, *, choose: bool = False) -> None:
        self.model, self.state, self.call, self.chunks, self.choose = model, state, call, chunks, choose
        self.names = [[(u.path, u.host) for u in planned.units] for planned in state.plan.chains]
        self.tried: list[tuple[Prober, Chunks]] = []
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext  # a forward
        refuse_idle_globs("chunks", chunks if isinstance(chunks, Mapping) else (), [n for several in self.names for n in several])

    def __iter__(self) -> Iterator[Cutting]:
        chunks = self.chunks
        others = [Cutting(self.switched(True), self.switched(False))] if self.choose else []
        if chunks in (None, 1):
            yield self.way(Prober([1]), 1)
            yield from others
        wishes = [w for w in ((2, 4, 8, 16) if chunks is None else (chunks,)) if w != 1]
        counts = {wanted(wish, n) for wish in wishes for several in self.names for n in several}
        if not counts:
            return
        try:
            prober = probed(self.model, self.state.chains, self.run, counts)
        except ConversionError:
            if chunks is not None:
                raise
            return  # it does not run in eval mode: whole units are what there is
        if prober.cuts_something or self.state.parted or chunks is not None:
            yield from (self.way(prober, wish) for wish in wishes)
            yield from others if chunks not in (None, 1) else ()

    def run(self) -> None:
        given = fresh_arguments((self.call.args, self.call.kwargs))
        with self.around(), left_alone(self.model, accelerators_of([*tensors_in(given), *self.model.parameters()])):
            run_model(self.model, given)

    def switched(self, on: bool) -> Callable[[], None]:
        return lambda: _switch(self.state.checkpointed, on=on)

    def way(self, prober: Prober, wish: Chunks) -> Cutting:
        def cut() -> None:
            self.tried.append((prober, wish))
            last = len(self.tried) - 1
            self.mix({(c, place): last for c, several in enumerate(self.names) for place in range(len(several))})

        return Cutting(cut)

    def mix(self, picks: Picks) -> None:
        """Cut each unit in one of the ways that were tried; where it is not cut into as many chunks, the rest is left to its cores."""
        for number, (chain, names) in enumerate(zip(self.state.chains, self.names, strict=True)):
            ways = [self.tried[picks.get((number, place), 0)] for place in range(len(names))]
            chain.cuts = tuple(prober.cut(chain, place, wanted(wish, names[place])) for place, (prober, wish) in enumerate(ways))
        for parted in self.state.parted:
            place, chain = (parted.chain, parted.place), self.state.chains[parted.chain]
            count = wanted(self.tried[picks.get(place, 0)][1], self.names[parted.chain][parted.place])
            unit = self.state.plan.chains[parted.chain].units[parted.place]
            parted.forward.cut(-(-count // chunks_of(unit, chain, parted.place)))


def _fitted(model: nn.Module, state: Converted, call: _Call, budget: Budget, ways: _Ways) -> Plan:
    """The plan in which each unit has the mode, and the chunks, that the planner picks."""
    leaves = own_leaves((call.args, call.kwargs))
    device = device_of(model, leaves)
    drawn, python_drawn = random_states(accelerators_of(model.parameters())), python_random_state()

    def step() -> None:
        set_random_states(drawn)  # each draws the same: which layers it leaves out, say
        set_python_random_state(python_drawn)
        with entered():
            output = run_model(model, leaves)
            ended(state.chains)
            loss = mean_square(output)
            del output
        if not loss.requires_grad:
            raise BudgetError(f"{state.plan.model}: got outputs that need no gradient; expected a step to measure; unfreeze some weights")
        turn(state.chains)
        loss.backward()  # type: ignore[no-untyped-call]

    with left_as_found(model), python_random_kept(), torch.enable_grad(), autocast_left(device) as entered:
        ways.around = entered
        return fit(state.plan, state.chains, step, device, budget, ways, ways.mix)


def report(model: nn.Module) -> Plan:
    """The plan by which ``model`` was converted.

    Raises:
        ConversionError: it is not converted, or has not been called since ``convert(model)`` without an example.
    """
    return converted(model).plan


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
    del vars(model)[_STATE]
    return model


@contextmanager
def stored_activations(model: nn.Module) -> Iterator[None]:
    """Within this context the converted model computes the same function with ordinary autograd, which stores activations.

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


class FirstCall:
    """Stands in for the forward of a model that is converted by its first call."""

    def __init__(self, model: nn.Module, options: Options, original: Any) -> None:
        self.model = model
        self.options = options
        self.original = original

    @_disable_dynamo  # a compiled model that is still to be converted breaks its graph here, and runs on real values
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        try:
            _rewire(self.model, _Call(args, kwargs), self.options)
        except BaseException:
            vars(self.model)["forward"] = self
            raise
        return self.model.forward(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        vars(self.model).pop("forward")
        if self.original is not None:
            vars(self.model)["forward"] = self.original


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example_inputs: Any) -> _Call:
    """A user's example as positional and keyword arguments."""
    if isinstance(example_inputs, _Call):
        return example_inputs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return _Call(example_inputs, {})
    if hasattr(example_inputs, "keys") and not isinstance(example_inputs, Tensor):
        return _Call((), dict(example_inputs))
    return _Call((example_inputs,), {})


def _options(
    choice: Choice,
    include: Patterns,
    exclude: Patterns,
    whole: Patterns,
    strict: bool = False,
    chunks: Chunks | None = None,
    checkpoint: Patterns = None,
    budget: Budget = None,
) -> Options:
    if chunks is not None:
        refuse_no_chunks(chunks)
    if budget is not None:
        parse_budget(budget)

    def listed(name: str, patterns: Patterns) -> tuple[str, ...]:
        found: tuple[Any, ...] = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
        if not patterns:
            return ()
        if not all(isinstance(glob, str) for glob in found):
            raise ConversionError(f"{name}: got {patterns!r}; expected a glob over qualified names, or several")
        return found

    globs = listed("whole", whole)
    wish = AUTO if globs == (AUTO,) else globs
    if wish == AUTO and budget is None:
        raise ConversionError("whole: got 'auto' without a memory_budget; expected a budget to choose by, or globs over names of modules")
    kept = None if checkpoint is None else listed("checkpoint", checkpoint)
    return Options(choice, listed("include", include), listed("exclude", exclude), strict, chunks, budget, wish, kept)


def _refuse_converted(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert: got {name}; expected a torch.nn.Module")
    refuse_unready(model)
    taken = [n for n, m in model.named_modules() if isinstance(standing_forward(m), (FirstCall, InstanceForward))]
    if taken:
        raise ConversionError(
            f"{name}: got a model that is converted already (at {taken[0] or 'its root'!r}); call revwire.revert(model) first"
        )


def converted(model: nn.Module) -> Converted:
    state = vars(model).get(_STATE)
    if state is None:
        waiting = isinstance(vars(model).get("forward"), FirstCall)
        got = "a model that waits for its first call to be converted" if waiting else "a model that is not converted"
        raise ConversionError(
            f"{type(model).__name__}: got {got}; expected one that convert() has rewired; "
            + ("call it once" if waiting else "call revwire.convert(model, example_inputs)")
        )
    return state  # type: ignore[no-any-return]


def chains_of(model: nn.Module) -> list[Chain]:
    return converted(model).chains


def _refuse_skipped(found: Plan) -> None:
    left = [s for s in found.skipped if not s.inside_unit and not s.reason.startswith("excluded")]
    if left or not found.chains:
        what = "; ".join(f"{s.path}: {s.reason}" for s in left[:5]) or "no chain of residual units was found"
        raise ConversionError(
            f"{found.model}: strict=True, and {len(left)} residual adds would stay: {what}; exclude them, or pass strict=False"
        )


def _prepare(model: nn.Module, example_inputs: Any, options: Options) -> Prepared:
    _refuse_converted(model)
    call = as_call(example_inputs)
    try:
        recording = record(model, call.args, call.kwargs)
    except RevwireError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__}: the model failed on the example inputs ({type(error).__name__}: {error}); pass what its forward "
            "takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from error
    return Planner(recording, options).run()


def _with_parts(planned: PlannedChain, number: int, parted: Iterable[Parted]) -> PlannedChain:
    """The plan of a chain with the parts of its cores."""
    parts = {p.place: p.forward.parts for p in parted if p.chain == number}
    return replace(planned, units=tuple(replace(u, parts=parts.get(i, 1)) for i, u in enumerate(planned.units)))
