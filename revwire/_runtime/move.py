"""The step between two units of a scheme on a pair of states (`revwire.couplings.base.Move`): engine and gradient.

A unit goes from the states (y_k, z_k) to (z_k, y_{k+1}); this goes on to (y_{k+1}, z_{k+1}). Its branch is a small
function of y_{k+1}, which a backward pass has again, so nothing is kept but the bits of z_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revwire._errors import UnsupportedTransformError
from revwire._runtime.entries import MoveRecord
from revwire._runtime.functions import unless_spoiled
from revwire._runtime.rewind import Rewind
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit
from revwire._streams.base import VALUE_BYTES, stream_dtype
from revwire._streams.floats import FloatStreams
from revwire.couplings.base import Move


class _MoveNode(torch.autograd.Function):
    """z_{k+1} = a·y_{k+1} + b·z_k + c·p(y_{k+1})."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: Unit, move: Move, z: Tensor, y: Tensor, value: Tensor) -> Tensor:
        out = _moved(tape, unit, move, value)
        ctx.move, ctx.range, ctx.tape, ctx.y, ctx.dtypes = move, tape.range, None, None, (z.dtype, y.dtype)
        if move.map is not None and not move.map.is_affine:
            if tape.records and isinstance(tape.records[-1], MoveRecord):
                ctx.tape, ctx.position = tape, len(tape.records) - 1
            else:
                ctx.y = value
        return out.to(y.dtype) if y.element_size() < VALUE_BYTES else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        move, g = ctx.move, grads[0]
        if ctx.range.deferred:
            g = unless_spoiled(ctx.range, g)
        need = ctx.needs_input_grad

        def value() -> Tensor:
            if torch.is_grad_enabled():
                raise UnsupportedTransformError(
                    f"{type(move.map).__name__}: got create_graph=True (a double backward) through a map that is not "
                    "affine; expected a first-order backward; compute it on `revwire.revert(model)`"
                )
            kept: Tensor | None = ctx.y
            if kept is not None:
                return kept
            tape: Tape = ctx.tape
            walk = Rewind.of(tape)
            walk.undo(ctx.position)
            assert walk.current is not None
            return tape.streams.read(walk.current)

        b, (of_z, of_y) = move.rule.b, ctx.dtypes
        z = (g if b == 1 else g * b).to(of_z) if need[3] else None  # no copy where there need be none
        y = move.pulled(g.to(stream_dtype(g.dtype)), value).to(of_y) if need[4] else None
        return None, None, None, z, y, None


def next_point(tape: Tape, unit: Unit, z: Tensor, y: Tensor) -> Tensor | None:
    """What carries z_{k+1}, if the scheme of the unit that has just run moves it; ``z`` and ``y`` carry the states z_k
    and y_{k+1}, with which the tape stands. Where it leaves the range, the tape ends before it.
    """
    place, chain = tape.position - 1, tape.chain
    move = tape.couplings[place].move
    if move is None:
        return None
    before, newest = tape.intact_state()
    value = _value(y, tape, newest)
    if chain.observer:
        move = chain.observer.on_move(chain, place, value, _value(z, tape, before)) or move
    if tape.keep:
        return _MoveNode.apply(tape, unit, move, z, y, value)  # type: ignore[no-any-return]
    out = _moved(tape, unit, move, value)
    return out.to(y.dtype) if y.element_size() < VALUE_BYTES else out


def _value(x: Tensor, tape: Tape, state: Tensor) -> Tensor:
    """The float value of a state that ``x`` carries, without a gradient."""
    return tape.streams.read(state) if x.element_size() < VALUE_BYTES else x.detach()


def _moved(tape: Tape, unit: Unit, move: Move, y: Tensor) -> Tensor:
    before, newest = tape.intact_state()
    p, more = move.value(y), tape.records_more
    done = tape.streams.step(before, y, p, move.rule, undone=more)
    if not tape.range.holds(unit, done):
        out = FloatStreams().step(tape.streams.read(before), y, p, move.rule).value
        tape.range.leave(unit, out)
        tape.left = True
        return out
    if more:
        tape.records.append(MoveRecord(move, done.bits))
    tape.advance((newest, done.state))
    return done.value
