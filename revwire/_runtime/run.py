"""A chain as it sits in a converted model, and the links that join its units at run time.

Note [Links]
    Hosts need not know each other. The tensor that a unit returns carries a `Link` to the tape of its chain; the next
    unit that is given that very tensor, unchanged, continues the tape. Whatever Python runs between two blocks (loops,
    hidden-state lists, caches, flags) stays as it was written. A tensor without a valid link begins a new tape, which
    is the rule for the first unit, and for a tensor that something else than the chain made.

Note [Grad mode]
    A chain computes the same function in every grad mode, also if the mode changes between two of its units: the
    streams go on, in a tape that keeps records or does not. What must not happen is that a part of a chain runs under
    ``no_grad`` and gets its gradient from elsewhere, which is what `torch.utils.checkpoint` does with a part of it: the
    gradient of the second stream would be lost, and a recompute would begin new streams in the middle. Both are refused.

Note [Identities]
    FSDP2, and PyTorch where a module has backward hooks, hand a module its inputs (and PyTorch its caller the outputs) through an
    identity function, in whose backward pass they act. That makes another tensor, behind which the chain goes on. A backward hook
    sees, and may exchange, the whole gradient of a state, so no path may lead past its tensor: where the streams are wider than
    the tensor, and have carriers of their own, they are entered anew through it. (There the gradient has the tensor's dtype for
    a moment, as it has everywhere in the original network.) FSDP2 is content to hear that the gradient is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revwire._errors import ConversionError, RangeError, ReconstructionError, UnsupportedTransformError
from revwire._runtime import functions as _engine
from revwire._runtime.autograd_graph import running_pass
from revwire._runtime.chunks import Chunk, Cut, SharedDraws, concatenated, parts_of, views_of
from revwire._runtime.entries import UnitRecord
from revwire._runtime.links import _LINK, _VIEW, Link, _edge_behind, _edge_of, _layout_of, _link_behind, _linked, _through
from revwire._runtime.tape import Kept, Tape
from revwire._runtime.unit import Mode, Unit
from revwire._splitting.probe import Prober
from revwire._streams.base import Streams, canonical, stream_dtype
from revwire._streams.fixed import FixedStreams
from revwire._streams.floats import FloatStreams
from revwire._surroundings.inventory import version_of
from revwire._surroundings.modes import exporting, transformed
from revwire._surroundings.weights import Homes
from revwire.couplings.base import FLOAT_TOLERANCE, Coupling

_HEADROOM_UNCALIBRATED = 2.0**6


_eager = _disable_dynamo  # torch.compile would trace into the tape; as with torch.utils.checkpoint, it breaks its graph here


class Meter(Protocol):
    """Sees where a unit begins, what its branch saves, where it ends, when a recompute has saved all that its gradient needs, and when
    it is over."""

    def enter(self, chain: Chain, unit: Unit) -> None: ...

    def seeing(self, pack: Callable[[Tensor], int], record: UnitRecord, x: Tensor) -> Callable[[Tensor], int]: ...

    def leave(self, chain: Chain, unit: Unit, tape: Tape, out: Tensor) -> None: ...

    def complete(self, tape: Tape, position: int) -> None: ...

    def undone(self, tape: Tape, position: int) -> None: ...


class Monitor(Protocol):
    """Sees every state that a tape drops, and every state that it rebuilds."""

    def forward(self, tape: Tape, position: int, state: Tensor) -> None: ...

    def backward(self, tape: Tape, position: int, state: Tensor) -> None: ...


class Chain:
    """A run of units, as all the hosts of one converted model share it.

    Args:
        name: as reports and errors name it.
        coupling: the scheme, one for all units or one for each.
        exact: fixed-point streams (True) or float streams.
        length: number of units; after the last, the streams are merged.
        largest: the largest magnitude met in the streams at conversion, or None if not known.
        keeps_last: autograd may keep what the last unit saves (see Note [The last unit] in `_tape`).

    Attributes:
        modes: how each unit comes by its activations in backward, where a memory budget has chosen.
        meter: sees where each unit begins and ends, while a step is measured.
        cuts: how each unit is cut into chunks, where that was asked for.
        prober: finds how units may be cut, while it looks.
    """

    def __init__(
        self,
        name: str,
        coupling: Coupling | Sequence[Coupling],
        *,
        exact: bool,
        length: int,
        largest: float | None = None,
        keeps_last: bool = False,
    ) -> None:
        self.name = name
        self.couplings = (coupling,) * length if isinstance(coupling, Coupling) else tuple(coupling)
        self.exact = exact
        self.length = length
        self.largest = largest
        self.keeps_last = keeps_last
        self.set_anchors(None)
        self.run_whole: set[str] = set()  # units whose recompute was seen not to be comparable when it stops early
        self.waiting: ReferenceType[Kept] | None = None  # of the forward that keeps its last unit's activations
        self.modes: tuple[Mode, ...] | None = None
        self.meter: Meter | None = None
        self.homes = Homes()
        self.cuts: tuple[Cut | None, ...] | None = None
        self.prober: Prober | None = None
        self.stored = False
        self.original = False  # run as the original network, with ordinary autograd
        self.warned = False  # that something came between two units
        self.monitor: Monitor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": None}

    def set_anchors(self, spacing: int | None, *, adapts: bool = False, tolerance: float = FLOAT_TOLERANCE) -> None:
        """Keep the true state every ``spacing`` units (None: never); where it ``adapts``, more often if rebuilt states drift."""
        self.spacing, self.adapts, self.tolerance = spacing, adapts, tolerance

    def anchored(self, place: int) -> bool:
        """Whether the true state before the unit at this place is kept. (Before the first it need not be.)"""
        if self.checkpoints(place):
            return True
        return self.spacing is not None and place > 0 and place % self.spacing == 0

    def checkpoints(self, place: int) -> bool:
        """Whether a memory budget lets the unit at this place be recomputed from a kept state."""
        return self.modes is not None and self.modes[place] in ("checkpointed", "selective") and place > 0

    def selects(self, place: int) -> bool:
        """Whether its recompute finds what products gave in its forward; see Note [Selective units] in `_products`."""
        return self.modes is not None and self.modes[place] == "selective" and place > 0

    def stores(self, place: int) -> bool:
        """Whether the unit at this place always keeps its activations; see Note [Stored units] in `_tape`."""
        return self.modes is not None and self.modes[place] == "stored"

    def chunks(self, unit: Unit, tape: Tape, x: Tensor, extras: tuple[Any, ...]) -> tuple[Chunk, ...]:
        """The chunks in which the unit that a tape has come to runs on ``x`` and extra inputs; none where it runs whole."""
        place = unit.place(tape.position)
        cut = None if self.cuts is None or place is None or tape.plain else self.cuts[place]
        return () if cut is None else cut.chunks(x, extras)

    def drifted(self, error: float) -> None:
        """Hear of the relative error of a rebuilt state."""
        if self.adapts and self.spacing is not None and error > self.tolerance / 4:
            self.spacing = max(1, self.spacing // 2)

    @property
    def coupling_name(self) -> str:
        """The spelling of its coupling, or of its couplings."""
        return " + ".join(dict.fromkeys(c.name for c in self.couplings))

    @_eager
    def apply(self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...] = ()) -> tuple[Tensor, tuple[Any, ...]]:
        """As `run`, from anywhere."""
        return self.run(unit, host, x, extras)

    def run(self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...] = ()) -> tuple[Tensor, tuple[Any, ...]]:
        """Run one unit on the streams behind ``x`` (any shape): (the unit's output, side outputs of its branch).

        Raises:
            UnsupportedTransformError: under forward-mode AD or a `torch.func` transform.
            RangeError: a value left the range of the fixed-point streams.
            ReconstructionError: the streams were written in place, or `torch.utils.checkpoint` holds a part of the chain.
        """
        refuse_transforms(self.name)
        if self.meter:
            self.meter.enter(self, unit)
        link = self._link_of(unit, x)
        if link is None:
            x, link = self._begin(unit, host, x)
        elif link.tape.keep != torch.is_grad_enabled():
            link = self._in_grad_mode(unit.path, link, x)
        previous, current = link.carriers(x)
        if self.prober:
            self.prober(self, unit, host, x, extras)
        chunks = self.chunks(unit, link.tape, x, extras)
        if chunks and link.tape.keep:
            out, sides = self._in_chunks(chunks, link, (previous, current), unit, host, x, extras)
        else:
            previous, share = _engine.later(link.tape, unit, previous)
            f, sides = link.tape.branch(unit, host, x, extras, chunks)
            dtype = _result_dtype(unit, x, f)
            if torch.is_inference_mode_enabled():  # inference tensors have no version: a link could not tell a write to them
                with torch.inference_mode(False), torch.no_grad():
                    out = self._give_out(link, _engine.step(link.tape, unit, previous, current, f), current, dtype)
            else:
                out = self._give_out(link, _engine.step(link.tape, unit, previous, current, f, share), current, dtype)
        if self.meter:
            self.meter.leave(self, unit, link.tape, out)
        return out, sides

    @_eager
    def relayout(self, view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a view (a reshape, a permutation) to the stream tensor ``x``; the chain goes on behind it if it can."""
        link = self._link_of(None, x)
        y = view(x)
        if link is not None and link.tape.keep != torch.is_grad_enabled():
            link = self._in_grad_mode(self.name, link, x)
        if link is None or not link.tape.relayout(view):
            return y
        previous, current = (None if t is None else view(t) for t in (link.previous, link.current))
        link.spend()
        moved = _linked(y, link.tape, previous, y if current is None else current)
        if moved._base is not None:  # what stands for a view knows the tensor below the view only
            following: Link = getattr(moved, _LINK)
            following.seen_as = _edge_of(moved), _layout_of(moved)
            setattr(moved._base, _VIEW, following)
        return moved

    def _in_chunks(
        self,
        chunks: tuple[Chunk, ...],
        link: Link,
        carriers: tuple[Tensor, Tensor],
        unit: Unit,
        host: nn.Module,
        x: Tensor,
        extras: tuple[Any, ...],
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Run a unit chunk by chunk: each has a branch and a step of its own, whose nodes autograd visits one chunk after the other."""
        tape, (previous, current) = link.tape, carriers
        parts = parts_of(x, chunks)
        values = parts_of(current, chunks)  # made after the parts: gradients then add up in the order in which those of a whole unit do
        before = views_of(previous, chunks)
        with tape.in_chunks(unit):
            outs, draws = [], SharedDraws(x)
            for i, chunk in enumerate(chunks):
                draws.before(chunk)
                waiting, share = _engine.later(tape, unit, before[i])
                f, sides = tape.branch_on(chunk, unit, host, parts[i], extras)
                outs.append(_engine.step(tape, unit, waiting, values[i], f, share))
            out = concatenated(outs, chunks[0].dim, current)
            tape.join(out, unit)
        return self._give_out(link, out, current, _result_dtype(unit, x, f)), sides

    def _give_out(self, link: Link, out: Tensor, current: Tensor, dtype: torch.dtype) -> Tensor:
        tape = link.tape
        link.spend()
        if tape.position == self.length:
            tape.settle_range()
            return (out if tape.plain else tape.couplings[-1].merge(current, out)).to(dtype)
        return _linked(out.to(dtype), tape, current, out)

    def _link_of(self, unit: Unit | None, x: Tensor) -> Link | None:
        link, stands_for = getattr(x, _LINK, None), False
        if link is None and x._base is not None:
            link, stands_for = _link_behind(x), True
        if not isinstance(link, Link) or link.tape.chain is not self:
            return None
        newest = (link.tape.progress, version_of(x)) == (link.position, link.version)
        if not newest or (unit is not None and unit.place(link.tape.position) is None):
            return None
        return _through(x, link) if stands_for else link

    def _begin(self, unit: Unit, host: nn.Module, x: Tensor) -> tuple[Tensor, Link]:
        if not x.is_floating_point() or x.layout is not torch.strided or x.is_nested:
            raise ConversionError(
                f"{unit.path} ({self.name}): got a stream of {x.dtype} ({x.layout}{', nested' if x.is_nested else ''}); expected a dense "
                f"tensor of a real floating-point dtype; exclude it: convert(..., exclude=[{unit.path!r}])"
            )
        if unit.index and running_pass() != -1:
            raise self._cut(unit.path)
        if unit.index and not self.warned and _engine.comes_from(x, self):
            self.warned = True
            warnings.warn(
                f"{unit.path} ({self.name}): got a tensor that something between two units made ({_edge_behind(x)[0].name()}); expected "
                "the output of the unit before, as at conversion. The chain begins anew here: gradients are right, but it keeps two more "
                "streams, and computes another function than planned. Usual causes: a hook that returns another tensor, or dropout "
                "between blocks in a model that was converted in eval mode (convert it in train mode)",
                stacklevel=2,
            )
        exported = exporting()  # then there are no values to scale the streams for
        wide = x.to(stream_dtype(x.dtype)) if exported else canonical(x.to(stream_dtype(x.dtype)))
        plain = self.original or (not host.training and any(c.plain_in_eval for c in self.couplings))
        streams = FloatStreams(self.tolerance) if plain or exported or not self.exact else self._fixed_if_finite(unit, wide)
        state = streams.enter(wide)
        tape = Tape(self, streams, (state, state), position=unit.index, keep=torch.is_grad_enabled(), plain=plain)
        carrier = wide if isinstance(streams, FloatStreams) else _engine.enter(wide, streams, state)
        outward = carrier.to(x.dtype)
        return outward, Link(tape, tape.progress, version_of(outward), carrier, None if outward is carrier else carrier)

    def _in_grad_mode(self, where: str, link: Link, x: Tensor) -> Link:
        """The streams behind ``x`` in a tape of the present grad mode; see Note [Grad mode]."""
        if not link.tape.keep and x.grad_fn is not None:
            raise self._cut(where)
        old = link.tape
        if old.left_range is not None and torch.is_grad_enabled():
            raise old.left_range
        tape = Tape(self, old.streams, old.intact_state(), position=old.position, keep=torch.is_grad_enabled(), plain=old.plain)
        return Link(tape, tape.progress, link.version, link.previous, link.current)

    def _cut(self, where: str) -> ReconstructionError:
        return ReconstructionError(
            f"{where} ({self.name}): got a part of the chain inside of torch.utils.checkpoint (or another function that "
            "recomputes it); expected the whole chain inside, or nothing of it; switch the model's own gradient checkpointing off, "
            f"or exclude the module: convert(..., exclude=[{where!r}])"
        )

    def _fixed_if_finite(self, unit: Unit, x: Tensor) -> Streams:
        try:
            return self._fixed(unit, x)
        except RangeError:
            if torch.is_grad_enabled():
                raise
            return FloatStreams(self.tolerance)  # nothing will be rebuilt

    def _fixed(self, unit: Unit, x: Tensor) -> FixedStreams:
        largest = float(torch.stack(torch.aminmax(x.detach())).abs().amax()) if x.numel() else 0.0
        calibrated = largest * _HEADROOM_UNCALIBRATED if self.largest is None else self.largest
        try:
            return FixedStreams.for_range(max(largest, calibrated), x.dtype)
        except RangeError as error:
            raise RangeError(f"{unit.path} ({self.name}): {error}") from None


def _result_dtype(unit: Unit, x: Tensor, f: Tensor) -> torch.dtype:
    """The dtype of what a unit returns."""
    return f.dtype if unit.kind == "block" or f.dtype == x.dtype else torch.promote_types(x.dtype, f.dtype)


def refuse_transforms(name: str) -> None:
    """Raise inside of `torch.func` transforms, whose tensors are not what they seem."""
    if transformed():
        raise UnsupportedTransformError(
            f"{name}: got a torch.func transform (grad, vmap, jvp ...); expected plain autograd; transform the original "
            "network instead: revwire.revert(model)"
        )
