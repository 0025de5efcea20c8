"""A chain as it sits in a converted model, and the links that join its units at run time.

Note [Links]
    Hosts need not know each other. The tensor that a unit returns carries a `Link` to the tape of its chain; the next
    unit that is given that very tensor, unchanged, continues the tape. Whatever Python runs between two blocks (loops,
    hidden-state lists, caches, flags) stays as it was written. A tensor without a valid link begins a new tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from revwire import _engine
from revwire._couplings import Coefficients, Coupling
from revwire._engine import Tape
from revwire._errors import RangeError, UnsupportedTransformError
from revwire._numerics import FixedStreams, FloatStreams, Streams, canonical, stream_dtype

_LINK = "_revwire_link"
_HEADROOM_UNCALIBRATED = 2.0**6

Branch = Callable[..., tuple[Tensor, tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class Unit:
    """One residual unit, ready to run.

    Attributes:
        path: qualified name under which reports and errors name it.
        index: its place in its chain, from 0.
        kind: ``"residual"``: the branch returns F(x); ``"block"``: it returns B(x), and F = B − x.
        branch: ``branch(host, x, *extras) -> (F(x) or B(x), side outputs)``.
        modules: ``modules(host)`` gives the modules whose parameters and buffers the branch uses.
    """

    path: str
    index: int
    kind: Literal["residual", "block"]
    branch: Branch
    modules: Callable[[nn.Module], Iterable[nn.Module]]

    def rule(self, coupling: Coupling) -> Coefficients:
        """The coefficients by which the branch's own value enters the step."""
        rule = coupling.coefficients
        return rule if self.kind == "residual" else rule.for_block


class Monitor(Protocol):
    """Sees every state that a tape drops, and every state that it rebuilds."""

    def forward(self, tape: Tape, position: int, state: Tensor) -> None: ...

    def backward(self, tape: Tape, position: int, state: Tensor) -> None: ...


@dataclass
class Link:
    """What the output of a unit knows of its chain: the tape, how far it had come, and the gradient carriers.

    ``previous`` and ``current`` are float tensors of the stream dtype, through which the gradients of x_{k-1} and x_k
    flow. ``current`` is None where the linked tensor itself carries x_k (a tensor must not refer to itself).
    """

    tape: Tape
    position: int
    version: int
    previous: Tensor | None
    current: Tensor | None


class Chain:
    """A run of units, as all the hosts of one converted model share it.

    Args:
        name: as reports and errors name it.
        coupling: the scheme.
        exact: fixed-point streams (True) or float streams.
        length: number of units; after the last, the streams are merged.
        largest: the largest magnitude met in the streams at conversion, or None if not known.
    """

    def __init__(self, name: str, coupling: Coupling, *, exact: bool, length: int, largest: float | None = None) -> None:
        self.name = name
        self.coupling = coupling
        self.exact = exact
        self.length = length
        self.largest = largest
        self.stored = False
        self.monitor: Monitor | None = None

    def apply(self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...] = ()) -> tuple[Tensor, tuple[Any, ...]]:
        """Run one unit on the streams behind ``x`` (any shape): (the unit's output, side outputs of its branch).

        Raises:
            UnsupportedTransformError: under forward-mode AD or a `torch.func` transform.
            RangeError: a value left the range of the fixed-point streams.
        """
        link = self._link_of(x)
        if link is None:
            x, link = self._begin(unit, x)
        tape, carrier = link.tape, x if link.current is None else link.current
        f, sides = tape.branch(unit, host, x, extras)
        out = _engine.step(tape, unit, carrier if link.previous is None else link.previous, carrier, f)
        link.previous = link.current = None
        if tape.position == self.length:
            return self.coupling.merge(carrier, out).to(x.dtype), sides
        return _linked(out.to(x.dtype), tape, carrier, out), sides

    def relayout(self, view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a view (a reshape, a permutation) to the stream tensor ``x``; the chain goes on behind it if it can."""
        link = self._link_of(x)
        y = view(x)
        if link is None or not link.tape.relayout(view):
            return y
        previous = None if link.previous is None else view(link.previous)
        current = y if link.current is None else view(link.current)
        link.previous = link.current = None
        return _linked(y, link.tape, previous, current)

    def _link_of(self, x: Tensor) -> Link | None:
        link: Link | None = getattr(x, _LINK, None)
        if link is None or link.tape.chain is not self or link.tape.keep != torch.is_grad_enabled():
            return None
        return link if (link.tape.progress, _version(x)) == (link.position, link.version) else None

    def _begin(self, unit: Unit, x: Tensor) -> tuple[Tensor, Link]:
        _refuse_transforms(self.name, x)
        wide = canonical(x.to(stream_dtype(x.dtype)))
        streams = self._streams(unit, wide)
        state = streams.enter(wide)
        tape = Tape(self, streams, state, first=unit.index, keep=torch.is_grad_enabled())
        carrier = _engine.enter(wide, streams, state) if self.exact else wide
        outward = carrier.to(x.dtype)
        return outward, Link(tape, tape.progress, _version(outward), None, None if outward is carrier else carrier)

    def _streams(self, unit: Unit, x: Tensor) -> Streams:
        if not self.exact:
            return FloatStreams()
        largest = float(x.detach().abs().amax()) if x.numel() else 0.0
        calibrated = self.largest if self.largest is not None else largest * _HEADROOM_UNCALIBRATED
        try:
            return FixedStreams.for_range(max(largest, calibrated), x.dtype, self.coupling)
        except RangeError as error:
            raise RangeError(f"{unit.path} ({self.name}): {error}") from None


def _linked(outward: Tensor, tape: Tape, previous: Tensor | None, current: Tensor) -> Tensor:
    link = Link(tape, tape.progress, _version(outward), previous, None if outward is current else current)
    setattr(outward, _LINK, link)
    return outward


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _refuse_transforms(name: str, x: Tensor) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedTransformError(
            f"{name}: got a torch.func transform (grad, vmap, jvp ...); expected plain autograd; transform the original "
            "network instead: revwire.revert(model)"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise UnsupportedTransformError(
            f"{name}: got a forward-mode AD dual tensor; expected reverse mode; use revwire.revert(model) for jvp"
        )
