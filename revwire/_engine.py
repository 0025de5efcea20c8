"""The engine: checkpointing whose inputs are rebuilt instead of stored.

Note [Two kinds of graph node]
    The *step* (`_Step`) is an autograd node that computes x_{k+1} and saves nothing. Its backward is linear in the
    gradient, and it is the place where the tape moves one unit back. The *branch* keeps its ordinary autograd graph;
    what that graph saved is replaced by placeholders, and refilled by the one recompute that the step needs anyway.
    So gradients are ordinary autograd's, parameters are seen by autograd where they are used, and a whole chain never
    holds more than one unit's activations.

Note [Values and gradients]
    The float tensors that enter the step carry gradients. Of their values only that of ``current`` is used, and it is
    the value of the tape's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from revwire._couplings.base import Factor
from revwire._errors import UnsupportedTransformError
from revwire._numerics import Streams
from revwire._rewind import Rewind
from revwire._tape import Tape as Tape

if TYPE_CHECKING:
    from revwire._module import Chain, Unit


class _Enter(torch.autograd.Function):
    """``x`` as the streams hold it; rounding passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streams: Streams, state: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return streams.read(state)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


class _Step(torch.autograd.Function):
    """x_{k+1} = a·x_k + b·x_{k-1} + c·F_k(x_k); see Note [Two kinds of graph node]."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: Unit, previous: Tensor, current: Tensor, f: Tensor) -> Tensor:
        ctx.rule, ctx.dtype = tape.now, f.dtype
        ctx.kept = tape.kept
        out = tape.step(current, f, unit)
        if tape.rewinds and ctx.kept is None:
            ctx.tape, ctx.position = tape, len(tape.records) - 1
        else:
            ctx.tape = None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.tape is not None:
            Rewind.of(ctx.tape).undo(ctx.position)
        ctx.kept = None
        rule, g = ctx.rule, grads[0]
        need = ctx.needs_input_grad
        branch = _scale(g, rule.c) if need[4] else None
        return (
            None,
            None,
            _scale(g, rule.back) if need[2] else None,
            _scale(g, rule.a) if need[3] else None,
            None if branch is None else branch.to(ctx.dtype),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


def _scale(g: Tensor, factor: Factor) -> Tensor | None:
    if isinstance(factor, Tensor):
        return g * factor
    if factor == 0:
        return None
    return g if factor == 1 else g * factor


def _refuse_forward_mode() -> NoReturn:
    raise UnsupportedTransformError(
        "reversible chain: got a forward-mode AD dual tensor; expected reverse mode; use revwire.revert(model) for jvp"
    )


def comes_from(x: Tensor, chain: Chain, most: int = 8) -> bool:
    """Whether ``x`` was made, by at most ``most`` operations, from the output of a unit of ``chain`` that was to be continued."""
    nodes = [x.grad_fn] if x.grad_fn is not None else []
    for node in nodes:  # grows
        if len(nodes) > most:
            break
        if isinstance(node, _Step._backward_cls):
            if node.tape is not None and node.tape.chain is chain:  # type: ignore[attr-defined]
                return True
        else:
            nodes += [before for before, _ in node.next_functions if before is not None]
    return False


def enter(x: Tensor, streams: Streams, state: Tensor) -> Tensor:
    """Differentiable entry of ``x`` into the streams, which hold it as ``state``."""
    return _Enter.apply(x, streams, state)  # type: ignore[no-any-return]


def step(tape: Tape, unit: Unit, previous: Tensor, current: Tensor, f: Tensor) -> Tensor:
    """Differentiable step: the float tensors carry gradients, the tape carries the state."""
    if tape.keep:
        return _Step.apply(tape, unit, previous, current, f)  # type: ignore[no-any-return]
    return tape.step(current, f, unit)
