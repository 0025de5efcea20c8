"""The engine: checkpointing whose inputs are rebuilt instead of stored.

Note [Two kinds of graph node]
    The *step* (`_Step`) is an autograd node that computes x_{k+1} and saves nothing. Its backward is linear in the
    gradient, and it is the place where the tape moves one unit back. The *branch* keeps its ordinary autograd graph;
    what that graph saved is replaced by placeholders, and refilled by the one recompute that the step needs anyway.
    So gradients are ordinary autograd's, parameters are seen by autograd where they are used, and a whole chain never
    holds more than one unit's activations.

Note [Values and gradients]
    The tensors that enter the step carry gradients, in the dtype in which the plain network has them: where it hands on
    16 bits from block to block, the gradients of states have 16 bits. Then values are read from the tape's state where
    they are used; else that of ``current`` is its own. The value of ``previous`` is not used.

Note [Gradients that wait]
    A step gives b·g to x_{k-1}, a·g to x_k and c·g to the branch. The first is asked for last, when the branch has used
    the third: so it is made of the third then, by a node (`_Later`) that stands before the branch in forward, and
    therefore comes after it in backward. While the branch holds the most memory, one gradient of a state is there
    instead of two. The branch gets the exact c·g. A branch that writes to the gradient that it is given, which PyTorch
    forbids, would change that of x_{k-1} too: the node sees it, and refuses. A branch of fewer bits than x_{k-1}, under
    autocast, gets another tensor anyway, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from revwire._errors import UnsupportedTransformError
from revwire._runtime.autograd_graph import NO_PASS, nodes_behind, running_pass
from revwire._runtime.chain import Chain
from revwire._runtime.endings import Ending
from revwire._runtime.faults import fault
from revwire._runtime.range import RangeCheck
from revwire._runtime.rewind import Rewind
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit
from revwire._runtime.unit_run import UnitRun
from revwire._streams.base import Streams
from revwire._streams.gradients import multiples
from revwire._surroundings.inventory import version_of
from revwire._torch import backward_node


class _Enter(torch.autograd.Function):
    """``x`` as the streams hold it; rounding passes the gradient straight through. Where a chain begins, its tape lets
    go of the states when the gradient has come so far.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, streams: Streams, state: Tensor, tape: Tape | None) -> Tensor:
        ctx.dtype, ctx.tape = x.dtype, tape
        return streams.read(state).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        walk = None if ctx.tape is None else ctx.tape.passes.get(running_pass())
        if walk is not None:  # a chain that is stored as a whole has none
            walk.let_go()
        return grads[0].to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


class Share:
    """What the branch of a unit and x_{k-1} have in common: one gradient; see Note [Gradients that wait].

    Attributes:
        divisor: c/b, by which the gradient of the branch is divided to be that of x_{k-1}: a whole number in couplings
            with c = 1 + b.
        version: its version counter when the branch was given it.
    """

    __slots__ = ("chain", "divisor", "unit", "version")

    def __init__(self, chain: Chain, unit: Unit) -> None:
        self.chain, self.unit = chain, unit
        self.divisor = 1.0
        self.version = -1


class _Later(torch.autograd.Function):
    """``x``, whose gradient is divided when it is its turn; see Note [Gradients that wait]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        share, g = ctx.share, grads[0]
        if share.version >= 0 and version_of(g) != share.version:
            raise fault(
                share.unit,
                share.chain,
                "the backward of its last operation, or a hook on it, wrote to the gradient that it was given",
                "that gradient unchanged, as PyTorch asks of every backward",
            )
        return g if share.divisor == 1 else g / share.divisor, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


class _Gate(torch.autograd.Function):
    """The output of a chain whose range is read late, where gradients enter; see Note [Synchronisation] in `range`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, check: RangeCheck) -> Tensor:
        ctx.check = check
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = unless_spoiled(ctx.check, grads[0])
        ctx.check.gated = running_pass()
        return g, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


def unless_spoiled(check: RangeCheck, g: Tensor) -> Tensor:
    """A gradient, which is NaN where the forward was spoiled; behind a gate it is so already."""
    task = running_pass()
    if check.gated == task != NO_PASS:
        return g
    if task != NO_PASS:
        Ending.of(task).ranges[id(check)] = check
    if (task == NO_PASS or not check.late) and not check.settle():
        check.gated = task
        return g
    return check.poisoned(g)


class _Step(torch.autograd.Function):
    """x_{k+1} = a·x_k + b·x_{k-1} + c·F_k(x_k); see Note [Two kinds of graph node]."""

    @staticmethod
    def forward(
        ctx: Any,
        run: UnitRun,
        previous: Tensor,
        current: Tensor,
        f: Tensor,
        share: Share | None,
        dtype: torch.dtype,
    ) -> Tensor:
        tape = run.tape
        ctx.rule, ctx.share, ctx.dtypes = run.rule, share, (previous.dtype, current.dtype, f.dtype)
        ctx.kept, ctx.range, ctx.born = run.kept, tape.range, tape.born
        out = run.step(current, f, dtype)
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
        if ctx.range.deferred:
            g = unless_spoiled(ctx.range, g)
        need, share, c, back = ctx.needs_input_grad, ctx.share, rule.c, rule.back
        of_previous, of_current, of_branch = ctx.dtypes
        if of_branch != of_previous or isinstance(c, Tensor) or isinstance(back, Tensor) or not need[3]:
            share = None
        f, x, previous = multiples(
            g,
            (
                (c, of_branch) if need[3] else None,
                (rule.a, of_current) if need[2] else None,
                (back, of_previous) if need[1] and share is None else None,
            ),
        )
        if share is not None and f is not None:
            previous, share.divisor, share.version = f, c / back, version_of(f)
        return None, previous, x, f, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()


def _refuse_forward_mode() -> NoReturn:
    raise UnsupportedTransformError(
        "reversible chain: got a forward-mode AD dual tensor; expected reverse mode; use revwire.revert(model) for jvp"
    )


def comes_from_chain(x: Tensor, chain: Chain, most: int = 8) -> bool:
    """Whether ``x`` was made, by at most ``most`` operations, from the output of a unit of ``chain`` that was to be
    continued.
    """
    return any(node.tape is not None and node.tape.chain is chain for node in _steps_behind(x, most))


def runs_again(x: Tensor, chain: Chain) -> bool:
    """Whether ``x`` was made from the output of a unit of ``chain`` that ran in the present backward pass."""
    return (chain, running_pass()) in (node.born for node in _steps_behind(x))


def _steps_behind(x: Tensor, most: int | None = None) -> Iterator[Any]:
    """The nearest nodes of units behind ``x``."""
    step: Any = backward_node(_Step)
    return (n for n in nodes_behind(x, past=lambda n: not isinstance(n, step), most=most) if isinstance(n, step))


def enter(x: Tensor, streams: Streams, state: Tensor, tape: Tape | None = None) -> Tensor:
    """Differentiable entry of ``x`` into the streams, which hold it as ``state``; ``tape``: which begins with it."""
    return _Enter.apply(x, streams, state, tape)  # type: ignore[no-any-return]


def gated(out: Tensor, check: RangeCheck) -> Tensor:
    """``out``, which leaves a chain whose range this check has not read."""
    return _Gate.apply(out, check)  # type: ignore[no-any-return]


def later(run: UnitRun, previous: Tensor) -> tuple[Tensor, Share | None]:
    """``previous`` for the step of a unit that has not run yet; its gradient waits where it can be made of the
    branch's.
    """
    if not (run.tape.keep and previous.requires_grad and run.shares):
        return previous, None
    share = Share(run.tape.chain, run.unit)
    return _Later.apply(previous, share), share


def step(run: UnitRun, previous: Tensor, current: Tensor, f: Tensor, share: Share | None, dtype: torch.dtype) -> Tensor:
    """Differentiable step to what carries x_{k+1}, in this ``dtype`` where streams are wider: the tensors carry
    gradients, the tape carries the state; ``share`` as `later` gave it.
    """
    if run.tape.keep:
        return _Step.apply(run, previous, current, f, share, dtype)  # type: ignore[no-any-return]
    return run.step(current, f, dtype)
