"""The branch of a unit again, in backward: it saves what its gradient needs.

Note [What need not be rebuilt]
    A checkpointed unit (by a memory budget) keeps the state before it: in exact streams x_{k-1} alone, as x_k is
    rebuilt to the bit by those after it. So its recompute serves the gradient alone, and stops when the branch has
    saved the last tensor that this needs: what is left, often the largest product of a branch, is not computed a second
    time. The checks then compare a sample of each tensor that was saved, which is all that the gradient is made of.
    Where one differs (it may be a kernel's scratch space), the branch is computed to its end, now and from then on, and
    its result decides. As in `torch.utils.checkpoint`, a recompute ends in the midst of the branch, by an exception.
    Branches with hooks on their modules (which may come in pairs), those that save what cannot be compared, and all
    inside of ``set_checkpoint_early_stop(False)`` are computed to their end; so are the first unit of a chain and units
    with anchors, whose gain is small, and float streams, which see the result only.

Note [What is compared later]
    On accelerators these samples are compared at the end of the backward pass, where nothing can be computed again: one
    that differs is an error there. So a unit's first recompute, and the first of each size, compares at once; and the
    branch runs once more with all memory filled that PyTorch hands out (`deterministic_kernels` has it do so), which
    shows where samples fall on scratch space, even if that held the same twice. Such a branch is computed to its end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from revwire._errors import ReconstructionError
from revwire._runtime.autograd_graph import is_checkpointed
from revwire._runtime.chain import Chain
from revwire._runtime.entries import Stop, UnitRecord, meta_of
from revwire._runtime.faults import WROTE_INPUT
from revwire._runtime.follower import NOW
from revwire._runtime.kinds import dressed
from revwire._runtime.unit import evaluate
from revwire._streams.base import Streams
from revwire._streams.samples import glance, same_glances
from revwire._surroundings.buffers import buffers_exchanged
from revwire._surroundings.context import run_again
from revwire._surroundings.copies import recalled
from revwire._surroundings.inventory import Place
from revwire._surroundings.modes import NOTHING, deterministic_kernels
from revwire._surroundings.weights import lent, put_back
from revwire._torch import inside_checkpoint, set_grad_enabled

_NO_WRITE = "no in-place write before backward"


_OTHER_CALLS = "its recompute made other calls", "those of the forward"


_LENT_TO_CHECKPOINT = (
    "the weights that torch.func.functional_call lent it were taken back, and a torch.utils.checkpoint inside of it "
    "would run again without them",
    "no checkpointing inside of this branch",
)


class Again(NamedTuple):
    """A second evaluation of a branch.

    Attributes:
        x: the float value of x_k; None where the branch was given fewer bits, and its state will do.
        f: F_k(x_k); None where the branch was not run to its end.
        witnesses: those among what it saved.
        looks: glances at what it saved, where it may have stopped early.
        saved: what it saved, by number, with version counters.
    """

    x: Tensor | None
    f: Tensor | None
    witnesses: list[Tensor]
    looks: list[Tensor]
    saved: dict[int, tuple[Tensor, int]]


class _Enough(BaseException):
    """Ends a recompute when all is there that its gradient needs. No `Exception`, so that few handlers in a branch take
    it for a fault.
    """


class _Refill:
    """Around a recompute, which makes a graph: takes what the branch saves.

    Where it may ``stop``, it ends the recompute when there is ``enough``; whatever ends it does (TorchScript hides
    `_Enough` in another).
    """

    __slots__ = ("before", "chain", "complete", "enough", "looks", "record", "saved", "stop")

    def __init__(
        self, chain: Chain, record: UnitRecord, stop: Stop | None, complete: Callable[[], None] | None
    ) -> None:
        self.chain, self.record, self.stop, self.complete = chain, record, stop, complete
        self.saved: dict[int, tuple[Tensor, int]] = {}
        self.looks: list[Tensor] = []
        self.enough = False

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        set_grad_enabled(True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        set_grad_enabled(self.before)
        return self.enough and kind is not None and not issubclass(kind, (KeyboardInterrupt, SystemExit))

    def hook(self) -> Callable[[Tensor], None]:
        """The hook that is given each tensor that the branch saves."""
        expected, saved, looks = self.record.saved, self.saved, self.looks
        looked, size = {*self.stop.looked} if self.stop else (), len(expected)

        def pack(t: Tensor) -> None:
            if self.enough:  # a handler in the branch took it for a fault, and goes on
                raise _Enough
            index, meta = len(saved), meta_of(t)
            if index == size or expected[index] != meta:
                got = f"its recompute saved another tensor at {index}: {meta}"
                raise self.record.fault(self.chain, got, "the same as in forward")
            saved[index] = t.detach(), t._version
            if looked and index in looked and (found := glance(t)) is not None:
                looks.append(found)
            if index + 1 == size:
                self._all_there()

        return pack

    def _all_there(self) -> None:
        if self.complete:
            self.complete()
        if self.stop:
            self.enough = True
            raise _Enough


class _CheckpointWatch(TorchFunctionMode):
    """Finds out whether a run passes through non-reentrant activation checkpointing."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= inside_checkpoint()
        return func(*args, **(kwargs or {}))


@contextmanager
def _modules_found(record: UnitRecord, gone: list[Place], found: AbstractContextManager[None]) -> Iterator[None]:
    writers, held = record.owned.writing, record.held
    with (
        put_back(gone) if gone else NOTHING,
        held.undisturbed(writers) if writers or held.reached.changes else NOTHING,
        buffers_exchanged(writers, record.buffers) if writers else NOTHING,
        found,
    ):
        yield


def _modules_as_found(record: UnitRecord, gone: list[Place]) -> AbstractContextManager[None]:
    """Let a recompute find weights, buffers and attributes as the forward did, where anything of these may be
    another.
    """
    found = record.held.found_again()
    if found is NOTHING and not (gone or record.owned.writing):
        return NOTHING
    return _modules_found(record, gone, found)


def evaluated_again(
    chain: Chain,
    streams: Streams,
    record: UnitRecord,
    state: Tensor,
    complete: Callable[[], None] | None,
    *,
    deferred: bool,
) -> Again:
    """The branch on the state x_k again, as far as that is needed; where what it saved seems to differ, to its end.

    ``complete`` is called as soon as all that its gradient needs is there. Comparisons may be ``deferred`` where they
    are known to tell; see Note [What is compared later].

    Raises:
        ReconstructionError: it is not what the forward was.
    """
    again = _recompute(chain, streams, record, state, record.stop, complete)
    if again.f is not None or record.stop is None:
        return again
    known = (record.unit.path, *record.saved) if deferred else None
    if known is not None and known in chain.comparable:
        return again
    if not same_glances(record.stop.looks, again.looks) or (deferred and _sees_scratch(chain, streams, record, state)):
        chain.run_whole.add(record.unit.path)
        record.products = None
        return _recompute(chain, streams, record, state, None, complete)
    if known is not None:
        chain.comparable.add(known)
    return again


def _sees_scratch(chain: Chain, streams: Streams, record: UnitRecord, state: Tensor) -> bool:
    """Whether glances fall on memory that no kernel writes to; see Note [What is compared later]."""
    assert record.stop is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            filled = _recompute(chain, streams, record, state, record.stop, None, deterministic_kernels())
    except ReconstructionError:  # other kernels save other tensors: it cannot be told
        return True
    pairs = zip(record.stop.looks, filled.looks, strict=True)
    found = [(b.isnan() & ~a.isnan()) if a.is_floating_point() else a != b for a, b in pairs]
    return bool(found) and bool(torch.cat(found).any())


def _recompute(
    chain: Chain,
    streams: Streams,
    record: UnitRecord,
    state: Tensor,
    stop: Stop | None,
    complete: Callable[[], None] | None,
    within: AbstractContextManager[None] = NOTHING,
) -> Again:
    """Evaluate the branch as in forward, until all is there that tells it to ``stop``, or to its end; ``within`` a
    context.
    """
    _check_versions(chain, record)
    wide: Tensor | None = streams.read(state)
    assert wide is not None
    x = dressed((wide if wide.dtype == record.dtype else wide.to(record.dtype)).detach(), record.kind)
    if wide.dtype != record.dtype:
        wide = None  # as large as all that a branch in 16 bits saves
    if record.input_requires_grad:
        x.requires_grad_()
    version = x._version
    gone = lent(record.owned.tables, chain.homes)
    refill = _Refill(chain, record, None if gone else stop, complete)
    watch = _CheckpointWatch() if gone else None
    f: Tensor | None = None
    products = record.products.recalled(partial(record.fault, chain, *_OTHER_CALLS)) if record.products else NOTHING
    hooks = saved_tensors_hooks(refill.hook(), _never)
    with (
        refill,
        record.surroundings.restored(),
        _modules_as_found(record, gone),
        hooks,
        watch or NOTHING,
        products,
        within,
    ):
        f = _branch_again(record, x)
    if x._version != version:
        raise record.fault(chain, *WROTE_INPUT)
    if len(refill.saved) != len(record.saved):
        got, expected = f"its recompute saved {len(refill.saved)} tensors", f"{len(record.saved)} as in forward"
        raise record.fault(chain, got, expected)
    if watch is not None and (watch.found or (f is not None and is_checkpointed(f))):
        raise record.fault(chain, *_LENT_TO_CHECKPOINT)
    witnesses = [refill.saved[number][0] for number in record.witnesses]
    return Again(wide, None if f is None or refill.enough else f.detach(), witnesses, refill.looks, refill.saved)


def _branch_again(record: UnitRecord, x: Tensor) -> Tensor:
    """F_k(x), in the shape of ``x``."""
    if record.replay is None:
        extras = tuple(map(recalled, record.extras)) if record.extras else ()
        f, _ = run_again(record.surroundings.context, evaluate, record.unit, record.host, x, extras)
        return f
    follower, NOW.follower = NOW.follower, None  # a backward pass may be begun by a host's own code
    try:
        f = run_again(record.surroundings.context, record.replay, x)
    finally:
        NOW.follower = follower
    return f if f.shape == x.shape else f.expand_as(x)


def _check_versions(chain: Chain, record: UnitRecord) -> None:
    """See that nobody has written to what the recompute will use."""
    for tensor, version in record.inputs:
        if tensor._version != version:
            raise record.fault(chain, "an extra input of it was modified in place", _NO_WRITE)
    if record.products and not record.products.intact:
        raise record.fault(chain, "the result of a product in it was modified in place", _NO_WRITE)
    for reference, version in record.stop.constants if record.stop else ():
        constant = reference()
        if constant is not None and constant._version != version:
            raise record.fault(chain, "a constant that it uses was modified in place", _NO_WRITE)
    for weight in record.owned.moved():
        got = f"its weight {_name(record, weight)!r} was modified in place"
        raise record.fault(chain, got, "the weights of the forward pass")


def _name(record: UnitRecord, weight: Tensor) -> str:
    names = (name for name, p in record.host.named_parameters() if p is weight)
    return next(names, "of the branch")


def _never(_: Any) -> Tensor:
    raise ReconstructionError("internal: the graph of a recompute was used; please report this")
