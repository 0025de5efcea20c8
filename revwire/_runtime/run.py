"""Run the units of a chain, and join them at run time.

Note [Grad mode]
    A chain computes the same function in every grad mode, also if the mode changes between two of its units: the
    streams go on, in a tape that keeps records or does not. What must not happen is that a part of a chain runs under
    ``no_grad`` and gets its gradient from elsewhere, which is what `torch.utils.checkpoint` does with a part of it: the
    gradient of the second stream would be lost, and a recompute would begin new streams in the middle. Both are
    refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revwire._errors import ConversionError, RangeError, ReconstructionError, UnsupportedTransformError
from revwire._runtime.autograd_graph import NO_PASS, edge_behind, recording_nothing, running_pass
from revwire._runtime.chain import Chain
from revwire._runtime.chunks import Chunk, SharedDraws, concatenated, parts_of, views_of
from revwire._runtime.functions import comes_from_chain, enter, gated, later, runs_again, step
from revwire._runtime.kinds import Kind, dressed, kind_of
from revwire._runtime.kinds import plain as plain_tensor
from revwire._runtime.links import Link, crosses_region, link_of, linked, linked_view
from revwire._runtime.move import next_point
from revwire._runtime.observer import Inputs, Outcome
from revwire._runtime.range import magnitude, warn_of_what_is_not_finite
from revwire._runtime.regions import HERE
from revwire._runtime.rewind import source_of
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit
from revwire._runtime.unit_run import UnitRun
from revwire._streams.base import Streams, canonical, stream_dtype
from revwire._streams.fixed import FixedStreams, asks_for_wide
from revwire._streams.floats import FloatStreams
from revwire._streams.samples import usual_magnitude
from revwire._surroundings.inventory import version_of
from revwire._surroundings.modes import exporting, stalls, transformed
from revwire._torch import disable_dynamo

_HEADROOM_UNCALIBRATED = 2.0**6


T = TypeVar("T")


_eager = (
    disable_dynamo  # torch.compile would trace into the tape; as with torch.utils.checkpoint, it breaks its graph here
)


@_eager
def apply(
    chain: Chain, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...] = ()
) -> tuple[Tensor, tuple[Any, ...]]:
    """As `run`, from anywhere.

    Raises:
        UnsupportedTransformError: under forward-mode AD or a `torch.func` transform.
    """
    refuse_transforms(chain.name)
    return run(chain, unit, host, x, extras)


def run(
    chain: Chain, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...] = ()
) -> tuple[Tensor, tuple[Any, ...]]:
    """Run one unit on the streams behind ``x`` (any shape): (the unit's output, side outputs of its branch).

    Raises:
        RangeError: a value left the range of the fixed-point streams, and it was known too late.
        ReconstructionError: the streams were written in place, or `torch.utils.checkpoint` holds a part of the chain.
    """
    x, link = entered(chain, unit, host, x, link_of(x, chain, unit), extras)
    previous, current = link.carriers(x)
    chunks = chain.chunks(unit.place(link.tape.position), link.tape.plain, x, extras)
    out, dtype, sides = _run(UnitRun(link.tape, unit, host, chunks), x, extras, previous, current)
    return left(link, unit, out, current, dtype, kind_of(x)), sides


def entered(
    chain: Chain, unit: Unit, host: nn.Module, x: Tensor, link: Link | None, extras: tuple[Any, ...]
) -> tuple[Tensor, Link]:
    """A unit is called on ``x``: what it runs on, and its link. Without a link, a chain begins."""
    if chain.observer:
        chain.observer.on_enter(chain, unit)
    if link is None:
        x, link = _begin(chain, unit, host, x)
    elif link.tape.keep != torch.is_grad_enabled():
        link = _in_grad_mode(chain, unit.path, link, x)
    if chain.observer:
        chain.observer.on_inputs(Inputs(chain, unit, host, x, extras))
    return x, link


def left(link: Link, unit: Unit, out: Tensor, current: Tensor, dtype: torch.dtype, kind: Kind | None) -> Tensor:
    """What a unit hands on, whose state ``out`` carries; ``current``: that of its input."""
    tape, chain = link.tape, link.tape.chain
    place = tape.position - 1
    out = outside_inference_mode(_give_out, link, unit, out, current, dtype, kind)
    if chain.observer:
        chain.observer.on_leave(Outcome(chain, place, tape.couplings[place], tape.streams, out))
    return out


@_eager
def relayout(chain: Chain, view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a view (a reshape, a permutation) to the stream tensor ``x``; the chain goes on behind it if it can."""
    link = link_of(x, chain)
    y = view(x)
    if link is not None and link.tape.keep != torch.is_grad_enabled():
        link = _in_grad_mode(chain, chain.name, link, x)
    if link is None or not link.tape.relayout(view):
        return y
    return linked_view(y, link, view)


def _run(
    run: UnitRun, x: Tensor, extras: tuple[Any, ...], previous: Tensor, current: Tensor
) -> tuple[Tensor, torch.dtype, tuple[Any, ...]]:
    """(What carries x_{k+1}, the dtype of what the unit returns, side outputs): each chunk has a branch and a step of
    its own, whose nodes autograd visits one chunk after the other.
    """
    outs = []
    with run:
        for chunk, part, before, value in _pieces(run.chunks if run.tape.keep else (), x, previous, current):
            waiting, share = later(run, before)
            f, sides = run.branch(chunk, part, extras)
            dtype = result_dtype(run.unit, x, f)
            outs.append(outside_inference_mode(step, run, waiting, value, f, share, dtype))
        out = outs[0] if chunk is None else concatenated(outs, chunk.dim, current)
        run.join(out)
    return out, dtype, sides


def _pieces(
    chunks: tuple[Chunk, ...], x: Tensor, previous: Tensor, current: Tensor
) -> Iterator[tuple[Chunk | None, Tensor, Tensor, Tensor]]:
    """Each chunk, what its branch is given, and the carriers of x_{k-1} and x_k there; a whole unit is one."""
    if not chunks:
        yield None, x, previous, current
        return
    parts = parts_of(x, chunks)
    values = parts_of(current, chunks)  # after the parts: gradients then add up in the order of those of a whole unit
    draws = SharedDraws(x)
    for chunk, part, before, value in zip(chunks, parts, views_of(previous, chunks), values, strict=True):
        draws.before(chunk)
        yield chunk, part, before, value


def outside_inference_mode(call: Callable[..., T], *args: Any) -> T:
    """Make a call: inference tensors have no version, so a link could not tell a write to them."""
    if not torch.is_inference_mode_enabled():
        return call(*args)
    with recording_nothing():
        return call(*args)


def _give_out(link: Link, unit: Unit, out: Tensor, current: Tensor, dtype: torch.dtype, kind: Kind | None) -> Tensor:
    tape, chain = link.tape, link.tape.chain
    link.spend()
    if tape.position == chain.length:
        tape.range.close()
        out = out if tape.plain else _merged(tape, current, out)
        return dressed((gated(out, tape.range) if tape.range.late else out).to(dtype), kind)
    if tape.left:
        tape, current, out = _scaled_anew(chain, tape, current, out, dtype)
    if tape.moves and (move := next_point(tape, unit, current, out)) is not None:
        current, out = out, move
        if tape.left:
            tape, current, out = _scaled_anew(chain, tape, current, out, dtype)
    return linked(dressed(out.to(dtype), kind), tape, current, out)


def _merged(tape: Tape, current: Tensor, out: Tensor) -> Tensor:
    """The output of a chain, by what carries its last two states."""
    wide = stream_dtype(out.dtype)
    last = out.to(wide)
    found = tape.couplings[-1].merge(current.to(wide), last)
    return out if found is last else found


def _scaled_anew(
    chain: Chain, old: Tape, current: Tensor, out: Tensor, dtype: torch.dtype
) -> tuple[Tape, Tensor, Tensor]:
    """A tape for the rest of the chain, and what carries x_k and x_{k+1} in it; see Note [Out of range] in `range`."""
    before, after = (t.detach().to(stream_dtype(t.dtype)) for t in (current, out))
    of_branches = _of_branches(dtype, out.device)
    streams = _streams_for(chain, magnitude(before, after), usual_magnitude(after), after, of_branches)
    states = streams.enter(before), streams.enter(after)
    tape = Tape(chain, streams, states, position=old.position, keep=old.keep, source=source_of, plain=old.plain)
    if isinstance(streams, FixedStreams):
        current, out = enter(current, streams, states[0]), enter(out, streams, states[1])
    return tape, current, out


def _streams_for(chain: Chain, largest: float, usual: float, x: Tensor, branch: torch.dtype) -> Streams:
    """Integers for states such as ``x``, of magnitudes up to ``largest``, most of them up to ``usual``; floats, whose
    states are kept, where that is not finite. Branches compute in the dtype ``branch``.
    """
    try:
        return FixedStreams.for_range(largest, x.dtype, usual, branch, x.device)
    except RangeError:
        return FloatStreams(chain.tolerance, rebuilds=False)


def _of_branches(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which branches compute that are given this one."""
    casts = dtype == torch.float32 and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if casts else dtype


def _refuse(chain: Chain, unit: Unit, x: Tensor) -> None:
    """Raise where no chain can begin on ``x``, and warn where none should."""
    if not x.is_floating_point() or x.layout is not torch.strided or x.is_nested:
        raise ConversionError(
            f"{unit.path} ({chain.name}): got a stream of {x.dtype} ({x.layout}{', nested' if x.is_nested else ''}); "
            f"expected a dense tensor of a real floating-point dtype; exclude it: convert(..., exclude=[{unit.path!r}])"
        )
    torn = crosses_region(x)
    if unit.index and running_pass() != NO_PASS and HERE.region is None:
        if not runs_again(x, chain):  # else it began anew here in the forward, too
            raise _cut(chain, unit.path)
    elif unit.index and not chain.warned and (torn or comes_from_chain(x, chain)):
        # the name of a node raises where FSDP2 might have made it, and its nodes are not known
        made_by = "reentrant checkpointing: with use_reentrant=False it goes on" if torn else edge_behind(x)[0].name()
        chain.warned = True
        warnings.warn(
            f"{unit.where(chain.name)}: got a tensor that something between two units made ({made_by}); expected the "
            "output of the unit before, as at conversion. The chain begins anew here: gradients are right, but it "
            "keeps two more streams, and computes another function than planned. Usual causes: a hook that returns "
            "another tensor, or dropout between blocks in a model that was converted in eval mode (convert it in train "
            "mode)",
            stacklevel=2,
        )
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise _captured(chain, unit.path)


def _begin(chain: Chain, unit: Unit, host: nn.Module, x: Tensor) -> tuple[Tensor, Link]:
    _refuse(chain, unit, x)
    exported = exporting()  # then there are no values to scale the streams for
    kind, x = kind_of(x), plain_tensor(x)
    x = x if exported else canonical(x)
    wide = x.to(stream_dtype(x.dtype))
    plain = chain.original or (not host.training and any(c.plain_in_eval for c in chain.couplings))
    floats = plain or exported or not chain.exact
    late = not floats and _is_read_late(chain, host, wide)
    streams = FloatStreams(chain.tolerance) if floats else _begun(chain, unit, wide, x.dtype, late=late)
    state = streams.enter(wide)
    tape = Tape(
        chain,
        streams,
        (state, state),
        position=unit.index,
        keep=torch.is_grad_enabled(),
        source=source_of,
        plain=plain,
        late=late,
        training=host.training,
    )
    carrier = x if isinstance(streams, FloatStreams) else enter(x, streams, state, tape)
    if tape.range.late:
        tape.range.admit(unit, wide, carrier.detach())
    outward = dressed(carrier, kind)
    return outward, Link(tape, tape.progress, version_of(outward), carrier, None if outward is carrier else carrier)


def _in_grad_mode(chain: Chain, where: str, link: Link, x: Tensor) -> Link:
    """The streams behind ``x`` in a tape of the present grad mode; see Note [Grad mode]."""
    if not link.tape.keep and x.grad_fn is not None:
        raise _cut(chain, where)
    old = link.tape
    tape = Tape(
        chain,
        old.streams,
        old.intact_state(),
        position=old.position,
        keep=torch.is_grad_enabled(),
        source=source_of,
        plain=old.plain,
    )
    return Link(tape, tape.progress, link.version, link.previous, link.current)


def _captured(chain: Chain, where: str) -> UnsupportedTransformError:
    return UnsupportedTransformError(
        f"{where} ({chain.name}): got the capture of a CUDA graph; expected to run eagerly: the host reads the checks "
        "of each backward pass, and Python's part of a recompute would not be replayed; capture what is outside of "
        "chains, or revwire.revert(model)"
    )


def _cut(chain: Chain, where: str) -> ReconstructionError:
    return ReconstructionError(
        f"{where} ({chain.name}): got a part of the chain inside of torch.utils.checkpoint (or another function that "
        "recomputes it); expected the whole chain inside, or nothing of it; switch the model's own gradient "
        f"checkpointing off, or exclude the module: convert(..., exclude=[{where!r}])"
    )


def _is_read_late(chain: Chain, host: nn.Module, x: Tensor) -> bool:
    """Whether a forward is read in its backward pass only; see Note [Synchronisation] in `range`."""
    waits = torch.is_grad_enabled() and not chain.stored and stalls(x.device)
    return waits and chain.reach.awaits_backward(host.training)


def _begun(chain: Chain, unit: Unit, x: Tensor, dtype: torch.dtype, *, late: bool) -> Streams:
    """The streams of a forward that enters the chain at this unit, by a state that came in this dtype; one that is read
    ``late`` is not looked at.
    """
    followed, branch = chain.reach.begin(), _of_branches(dtype, x.device)
    if late:
        return _streams_for(chain, followed, chain.reach.beside, x, branch)
    largest = magnitude(x)
    if not isfinite(largest):
        if torch.is_grad_enabled():
            warn_of_what_is_not_finite(chain.reach, chain.name, unit)
        return FloatStreams(chain.tolerance, rebuilds=False)
    least = largest if chain.reach.calibrated is not None else largest * _HEADROOM_UNCALIBRATED
    usual = chain.reach.beside
    if largest > followed and asks_for_wide(largest, usual, branch):
        usual = max(usual, usual_magnitude(x))  # all of it may have grown
    if stalls(x.device):
        chain.reach.widen(least, usual)
    return _streams_for(chain, max(least, followed), usual, x, branch)


def result_dtype(unit: Unit, x: Tensor, f: Tensor) -> torch.dtype:
    """The dtype of what a unit returns."""
    return f.dtype if unit.kind == "block" or f.dtype == x.dtype else torch.promote_types(x.dtype, f.dtype)


def refuse_transforms(name: str) -> None:
    """Raise inside of `torch.func` transforms, whose tensors are not what they seem."""
    if transformed():
        raise UnsupportedTransformError(
            f"{name}: got a torch.func transform (grad, vmap, jvp ...); expected plain autograd; transform the "
            "original network instead: revwire.revert(model)"
        )
