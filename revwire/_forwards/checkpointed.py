"""Modules outside of chains under activation checkpointing: blocks that change shape, or whatever the caller names.

Note [What checkpointing leaves to its caller]
    `torch.utils.checkpoint` runs a module again in backward, with its random state and autocast. It does not see that
    weights were written to meanwhile, takes those that stand there then (`torch.func.functional_call` has taken its own
    away), lets batch normalisation count a batch twice, writes to caches and other objects that it is given again, and
    believes what comes out. Here weights are compared by their version counters, those that were lent are put back, the
    recompute writes to copies of the buffers and gets containers, objects, settings and context variables as the
    forward found them; it runs to its end, and samples of its results must be those of the forward, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from revwire._capture.intercept import is_recording
from revwire._errors import ReconstructionError
from revwire._forwards.base import InstanceForward, put_on, standing_forward
from revwire._runtime.autograd_graph import NO_PASS, running_pass
from revwire._runtime.endings import Ending
from revwire._streams.samples import glance, same_bits_of, same_glances
from revwire._surroundings.buffers import Constants, Copies, Written, buffers_exchanged
from revwire._surroundings.context import context_kept, run_again
from revwire._surroundings.copies import is_stateful, snapshot
from revwire._surroundings.holdings import Held, Known
from revwire._surroundings.inventory import Inventory
from revwire._surroundings.modes import NOTHING, exporting, stalls, transformed
from revwire._surroundings.settings import kernels_not_searched, settings_now, settings_restored
from revwire._surroundings.weights import Homes, lent, put_back
from revwire._torch import TreeSpec, disable_dynamo, tree_flatten, tree_leaves, tree_unflatten


class CheckpointedForward(InstanceForward):
    """The forward of a checkpointed module.

    Attributes:
        on: whether it does so now; else the forward is as it was.
    """

    def __init__(self, module: nn.Module, path: str, original: Any = None) -> None:
        super().__init__(module, path, original)
        self.on = True
        self.homes = Homes()
        self.known = Known()
        self.homes.note(module)

    @disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on or not torch.is_grad_enabled() or is_recording() or exporting() or transformed():
            return self.plain(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        run = _Run(self, args, kwargs, structure)
        with set_checkpoint_early_stop(False):
            return checkpoint(run, *leaves, use_reentrant=False, context_fn=run.contexts)

    def on_replica(self, replica: nn.Module) -> CheckpointedForward:
        return CheckpointedForward(replica, self.path)


class _Run:
    """One forward of a checkpointed module, and its recomputes; see Note [What checkpointing leaves to its caller]."""

    def __init__(self, forward: CheckpointedForward, args: Any, kwargs: Any, structure: TreeSpec) -> None:
        self.forward = forward
        self.call: Any = args, kwargs  # until it has run: then only tensors and objects are kept, by `checkpoint`
        self.structure = structure
        self.owned = Inventory.of([forward.module])
        self.held = Held.by(forward.known, self.owned, forward.module.training)
        if not forward.homes:  # a copy, whose tensors are others
            forward.homes.note(forward.module)
        self.copies: Copies | None = None
        self.changed: frozenset[tuple[int, str]] = frozenset()  # buffers of integers that the forward wrote
        self.glances: list[Tensor] = []
        self.objects: dict[int, Any] = {}  # among the leaves, as the forward found them

    def __call__(self, *leaves: Any) -> Any:
        """Run the module: the first time on what it was called with, then on the same leaves."""
        if self.call is not None:
            (args, kwargs), self.call = self.call, None
            self.objects = {i: snapshot(leaf) for i, leaf in enumerate(leaves) if is_stateful(leaf)}
            out = self.forward.plain(*args, **kwargs)
            self.glances = _glances(out)
            return out
        found = [snapshot(self.objects[i]) if i in self.objects else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(found, self.structure)
        out = run_again(self.context, partial(self.forward.plain, *args, **kwargs))
        compared, task = _Compared(self, self.glances, _glances(out)), running_pass()
        if task != NO_PASS and compared.may_wait:
            Ending.of(task).add(compared)
        elif not same_glances(compared.before, compared.after):
            raise self.differs()
        return out

    def differs(self) -> ReconstructionError:
        """The error that says that a recompute gave something else."""
        return self._fault(
            "it computed other values", "the same as in the forward pass: no change of inputs, attributes or mode"
        )

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Those around the forward and around each recompute."""
        return self.first(), _Each(self.again)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the forward."""
        writers = self.owned.writing
        with self.held.undisturbed(writers):
            written, constants = (
                Written(writers, copied=True, unseen=self.held.reached.unseen),
                Constants(self.forward.module.modules()),
            )
            self.settings, self.context = settings_now(), context_kept()
            with self._pinned():
                yield
            self.copies, self.changed = written.copies(), constants.written()
            self.held.settle(self.forward.known, self.forward.module.training)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around a recompute.

        Raises:
            ReconstructionError: a weight was written to since.
        """
        for weight in self.owned.moved():
            name = next((n for n, p in self.forward.module.named_parameters() if p is weight), "of the module")
            raise self._fault(f"its weight {name!r} was modified in place", "the weights of the forward pass")
        holders = [m for m in self.forward.module.modules() if m._buffers]
        exchanged = buffers_exchanged(holders, self.copies, more=self.changed)
        restored, pinned = settings_restored(self.settings), self._pinned()
        lent_out = put_back(lent(self.owned.tables, self.forward.homes))
        with (
            self.held.undisturbed(holders),
            lent_out,
            exchanged,
            self.held.found_again(),
            restored,
            pinned,
        ):
            yield

    def _pinned(self) -> AbstractContextManager[None]:
        """On an accelerator, kernels are not searched for."""
        return kernels_not_searched() if any(stalls(w.device) for w in self.owned.weights) else NOTHING

    def _fault(self, got: str, expected: str) -> ReconstructionError:
        return ReconstructionError(
            f"{self.forward.path} (checkpointed): between forward and backward, {got}; expected {expected}. Gradients "
            "of this pass are not valid: zero them; then change nothing before backward, or leave the module as it is "
            "(convert(..., checkpoint=[]))"
        )


class _Compared(NamedTuple):
    """What a forward and its recompute gave, to be compared when the backward pass ends."""

    run: _Run
    before: list[Tensor]
    after: list[Tensor]

    @property
    def may_wait(self) -> bool:
        """Whether reading it at once would stall."""
        devices = {t.device for t in (*self.before, *self.after)}
        return len(devices) == 1 and len(self.before) == len(self.after) and stalls(*devices)

    def numbers(self) -> Tensor:
        return (~same_bits_of(self.before, self.after)).view(1).to(torch.float32)

    def judge(self, values: list[float] | None) -> None:
        if values and values[0] and not same_glances(self.before, self.after):
            raise self.run.differs()


class _Each:
    """A context that may be entered again and again."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self.make()
        context.__enter__()
        self.entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


def _glances(out: Any) -> list[Tensor]:
    return [found for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and (found := glance(leaf)) is not None]


def install_checkpoint(module: nn.Module, path: str) -> CheckpointedForward:
    """Put the checkpointed forward on a module."""
    forward = CheckpointedForward(module, path, standing_forward(module))
    put_on(forward)
    return forward


def checkpointed_of(module: nn.Module) -> CheckpointedForward | None:
    """The checkpointed forward of a module, if it has one."""
    forward = standing_forward(module)
    return forward if isinstance(forward, CheckpointedForward) else None
