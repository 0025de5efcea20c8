"""Modules outside of chains under activation checkpointing: blocks that change shape, or whatever the caller names.

Note [What checkpointing leaves to its caller]
    `torch.utils.checkpoint` runs a module again in backward, with its random state and autocast. It does not see that weights were
    written to meanwhile, takes those that stand there then (`torch.func.functional_call` has taken its own away), and lets batch
    normalisation count a batch twice. Here weights are compared by their version counters, those that were lent are put back, and the
    recompute writes to copies of the buffers. What it computes is not compared, as it is in chains: a kernel that is not deterministic
    is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from revwire._errors import ReconstructionError
from revwire._intercept import is_recording
from revwire._replay import Copies, Homes, Inventory, Written, buffers_exchanged, exporting, lent, put_back, undisturbed, version_of

_FORWARD, _REPLICATE = "forward", "_replicate_for_data_parallel"


class CheckpointedForward:
    """The forward of a checkpointed module: an attribute of the instance, so that its class stays as it is.

    Args:
        module: the module.
        path: its qualified name in the model, for errors.
        original: an instance attribute ``forward`` that was there before, or None.

    Attributes:
        on: whether it does so now; else the forward is as it was.
    """

    def __init__(self, module: nn.Module, path: str, original: Any = None) -> None:
        self.module = module
        self.path = path
        self.original = original
        self.on = True
        self.homes = Homes()
        self.homes.note(module)

    @_disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on or not torch.is_grad_enabled() or is_recording() or exporting() or _transformed():
            return self.plain(*args, **kwargs)
        return checkpoint(self.plain, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as it was before conversion."""
        forward = self.original if self.original is not None else type(self.module).forward.__get__(self.module)
        return forward(*args, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        run = _Run(self)
        return run.first(), run.again()


class _Run:
    """One forward of a checkpointed module; see Note [What checkpointing leaves to its caller]."""

    def __init__(self, forward: CheckpointedForward) -> None:
        self.forward = forward
        self.owned = Inventory.of([forward.module])
        if not forward.homes:  # a copy, whose tensors are others
            forward.homes.note(forward.module)
        self.copies: Copies | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the forward."""
        writers = [m for m in self.owned.writers if m.training]
        with undisturbed(writers):
            written = Written(writers)
            yield
            self.copies = written.copies()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around the recompute.

        Raises:
            ReconstructionError: a weight was written to since.
        """
        for weight, version in self.owned.weights:
            if version_of(weight) != version:
                name = next((n for n, p in self.forward.module.named_parameters() if p is weight), "of the module")
                raise ReconstructionError(
                    f"{self.forward.path} (checkpointed): between forward and backward, its weight {name!r} was modified in place; "
                    "expected the weights of the forward pass; step the optimizer after backward, or convert with checkpoint=[]"
                )
        with put_back(lent(self.owned.places, self.forward.homes)), buffers_exchanged(self.owned.writers, self.copies):
            yield


class _Replicate:
    """`nn.DataParallel` copies a module's attributes; the copy's forward must run on the copy's weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[no-untyped-call]
        forward = checkpointed_of(self.module)
        if forward is not None:
            vars(replica)[_FORWARD] = CheckpointedForward(replica, forward.path)
            vars(replica).pop(_REPLICATE, None)
        return replica


def _transformed() -> bool:
    """Whether a `torch.func` transform is in force: saved-tensor hooks do not work there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def install_checkpoint(module: nn.Module, path: str) -> CheckpointedForward:
    """Put the checkpointed forward on a module."""
    forward = CheckpointedForward(module, path, vars(module).get(_FORWARD))
    vars(module)[_FORWARD] = forward
    vars(module)[_REPLICATE] = _Replicate(module)
    return forward


def uninstall_checkpoint(module: nn.Module) -> None:
    """Take it off again."""
    forward = vars(module).pop(_FORWARD)
    vars(module).pop(_REPLICATE, None)
    if forward.original is not None:
        vars(module)[_FORWARD] = forward.original


def checkpointed_of(module: nn.Module) -> CheckpointedForward | None:
    """The checkpointed forward of a module, if it has one."""
    forward = vars(module).get(_FORWARD)
    return forward if isinstance(forward, CheckpointedForward) else None
